"""How exactly float32 matrices are multiplied, whatever the caller's program allows elsewhere."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

__all__ = ["fast_products", "full_precision"]


def full_precision() -> AbstractContextManager[None]:
    """No TF32 and no bfloat16 inside: logits need the digits. It is the process's: nest it around threads."""
    return _products(cuda="ieee", mkldnn="ieee", older="highest")


def fast_products() -> AbstractContextManager[None]:
    """TF32 or bfloat16 inside where the hardware has them, summed in float32: for gradients and other rough figures.

    On a CPU it also lets oneDNN multiply, which is faster than MKL on processors that MKL does not know: 2.2 times for
    1,280 x 512 x 512 in one thread of an EPYC (which rounds nothing, as it has no matrix unit).
    """
    return _products(cuda="tf32", mkldnn="bf16", older="medium")


@contextmanager
def _products(*, cuda: str, mkldnn: str, older: str) -> Iterator[None]:
    """These precisions inside; `older` for torch before 2.9."""
    matmuls: list[tuple[Any, str]] = [
        (getattr(backend, "matmul", None), wanted)
        for backend, wanted in ((torch.backends.cuda, cuda), (torch.backends.mkldnn, mkldnn))
    ]
    allowed = [(each, wanted, each.fp32_precision) for each, wanted in matmuls if hasattr(each, "fp32_precision")]
    if not allowed:  # later versions refuse this setting where the caller used the new ones
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(older)
    for matmul, wanted, _ in allowed:
        matmul.fp32_precision = wanted
    try:
        yield
    finally:
        for matmul, _, previous in allowed:
            matmul.fp32_precision = previous
        if not allowed:
            torch.set_float32_matmul_precision(precision)
