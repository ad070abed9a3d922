"""The fused kernel of s-CLIPLoss: a tile of logits is multiplied, exponentiated and summed both ways in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["slab_sums"]

LOG2_E = 1.4426950408889634


def slab_sums(image: Tensor, text: Tensor, image_scale: Tensor, text_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of exp(image_scale_i text_scale_j image_i.text_j) over j, and over i.

    Args:
        image: (R, D), float16 or bfloat16, contiguous, as stored; text: (C, D), likewise.
        image_scale: (R,), float32, 1 / (|image_i| temperature); text_scale: (C,), float32, 1 / |text_j|.

    Returns:
        (R,) and (C,), float32. Partial sums are stored and added in a fixed order, so that equal input gives equal
        bits.
    """
    block_rows, block_columns = 128, 128
    row_blocks, column_blocks = triton.cdiv(len(image), block_rows), triton.cdiv(len(text), block_columns)
    row_partials = torch.empty(column_blocks, len(image), device=image.device)
    column_partials = torch.empty(row_blocks, len(text), device=image.device)
    _slab_kernel[(row_blocks * column_blocks,)](
        image,
        text,
        image_scale,
        text_scale,
        row_partials,
        column_partials,
        len(image),
        len(text),
        image.shape[1],
        LOG2_E,
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=block_columns,
        BLOCK_DIM=64,
        GROUP=8,
        num_warps=8,
        num_stages=3,
    )
    return row_partials.sum(dim=0), column_partials.sum(dim=0)


@triton.jit
def _slab_kernel(  # type: ignore[no-untyped-def]
    image,
    text,
    image_scale,
    text_scale,
    row_partials,
    column_partials,
    rows,
    columns,
    dim,
    log2_e,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    GROUP: tl.constexpr,
):
    # blocks are walked in groups of GROUP rows, so that what neighbours read is still in the cache
    program = tl.program_id(0)
    row_blocks = tl.cdiv(rows, BLOCK_ROWS)
    column_blocks = tl.cdiv(columns, BLOCK_COLUMNS)
    group = program // (GROUP * column_blocks)
    group_rows = min(row_blocks - group * GROUP, GROUP)
    row_block = group * GROUP + (program % (GROUP * column_blocks)) % group_rows
    column_block = (program % (GROUP * column_blocks)) // group_rows

    i = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    j = column_block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    product = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    for start in range(0, dim, BLOCK_DIM):
        d = start + tl.arange(0, BLOCK_DIM)
        images = tl.load(
            image + i[:, None] * dim + d[None, :], mask=(i < rows)[:, None] & (d < dim)[None, :], other=0.0
        )
        texts = tl.load(
            text + j[None, :] * dim + d[:, None], mask=(j < columns)[None, :] & (d < dim)[:, None], other=0.0
        )
        product = tl.dot(images, texts, product)
    row_scale = tl.load(image_scale + i, mask=i < rows, other=0.0) * log2_e
    column_scale = tl.load(text_scale + j, mask=j < columns, other=0.0)
    weights = tl.exp2(product * row_scale[:, None] * column_scale[None, :])
    weights = tl.where((i < rows)[:, None] & (j < columns)[None, :], weights, 0.0)
    tl.store(row_partials + column_block * rows + i, tl.sum(weights, axis=1), mask=i < rows)
    tl.store(column_partials + row_block * columns + j, tl.sum(weights, axis=0), mask=j < columns)
