"""Matrix products in true float32, whatever the caller's program allows elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["full_precision"]


@contextmanager
def full_precision() -> Iterator[None]:
    """No TF32 and no bfloat16 inside: logits need the digits. It is the process's: nest it around threads."""
    matmuls: list[Any] = [getattr(backend, "matmul", None) for backend in (torch.backends.cuda, torch.backends.mkldnn)]
    allowed = [(matmul, matmul.fp32_precision) for matmul in matmuls if hasattr(matmul, "fp32_precision")]
    if not allowed:  # torch before 2.9; later ones refuse this setting where the caller used the new ones
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
    for matmul, _ in allowed:
        matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        for matmul, previous in allowed:
            matmul.fp32_precision = previous
        if not allowed:
            torch.set_float32_matmul_precision(precision)
