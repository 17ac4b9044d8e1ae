"""Memory that a kernel should write, filled with NaN before it does."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")

_M_PERTURB = -6
# glibc fills every new block with the complement of this value's low byte: 0xFF in every byte is a NaN in all floating
# dtypes. The bits above keep the value from being 0, which would switch the filling off.
_ALL_ONES = 0x100
# Some versions of glibc hand out recently freed small blocks without filling them.
_LARGER_THAN_CACHED_BLOCKS = 64 * 1024


def on_poisoned_memory(function: Callable[[], T]) -> T:
    """`function()` where all memory obtained on the host starts as NaN: outputs, temporaries and C++ scratch.

    It runs in a thread of its own, because scratch that a thread keeps from earlier calls would not be new.
    `torch.utils.deterministic.fill_uninitialized_memory` would not do: it does not reach what is allocated through
    LibTorch's stable ABI. The allocator underneath (glibc's `malloc`) does.

    Raises:
        RuntimeError: the C library does not support it, or the filling did not take.
    """
    with _poisoned_malloc(), ThreadPoolExecutor(max_workers=1) as executor:
        executor.submit(_check_filling).result()
        return executor.submit(function).result()


@contextmanager
def _poisoned_malloc() -> Iterator[None]:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or mallopt(_M_PERTURB, _ALL_ONES) != 1:
        raise RuntimeError("on_poisoned_memory: expected glibc's mallopt, which this C library lacks")
    try:
        yield
    finally:
        mallopt(_M_PERTURB, 0)


def _check_filling() -> None:
    torch.zeros(_LARGER_THAN_CACHED_BLOCKS)
    if not bool(torch.empty(_LARGER_THAN_CACHED_BLOCKS).isnan().all()):
        raise RuntimeError("on_poisoned_memory: new memory is not filled; is another malloc preloaded?")
