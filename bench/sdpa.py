"""`F.scaled_dot_product_attention` in place of an explicit softmax: in `global_attention` and in the plain models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fastvit_kernels.bench import plain_attention
from fastvit_kernels.ops import library
from fastvit_kernels.ops.global_attention.sdpa import compose


@contextmanager
def sdpa_attention() -> Iterator[None]:
    """Inside, the reference of `global_attention` and the plain models attend by PyTorch's function."""
    operator = library.operators["global_attention"]
    previous, operator.reference = operator.reference, compose
    try:
        with plain_attention.sdpa():
            yield
    finally:
        operator.reference = previous
