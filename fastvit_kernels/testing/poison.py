"""Memory that a kernel should write, filled with NaN before it does."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_M_PERTURB = -6
# glibc fills every new block with the complement of this value's low byte: 0xFF in every byte is a NaN in all floating
# dtypes. The bits above keep the value from being 0, which would switch the filling off.
_ALL_ONES = 0x100
_LARGER_THAN_CACHED_BLOCKS = 64 * 1024


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """In this block all memory that the process obtains on the host starts as NaN, C++ scratch included.

    `torch.utils.deterministic.fill_uninitialized_memory` does not reach allocations through LibTorch's stable ABI; the
    allocator underneath (glibc's `malloc`) does. Not to be entered from two threads at once.

    Raises:
        RuntimeError: the C library does not support it, or the filling did not take.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or mallopt(_M_PERTURB, _ALL_ONES) != 1:
        raise RuntimeError("poisoned_memory: expected glibc's mallopt, which this C library lacks")
    try:
        _check_filling()
        yield
    finally:
        mallopt(_M_PERTURB, 0)


def _check_filling() -> None:
    torch.zeros(_LARGER_THAN_CACHED_BLOCKS)
    if not bool(torch.empty(_LARGER_THAN_CACHED_BLOCKS).isnan().all()):
        raise RuntimeError("poisoned_memory: new memory is not filled; is another malloc preloaded?")
