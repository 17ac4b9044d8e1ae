"""Weights kept in the layout of the CPU kernels between calls."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvit_kernels.ops.operator import Operator, Tensors


class _Entry(NamedTuple):
    """Packed weights and what they were made from. Holding the weights keeps their memory from being used again."""

    packing: tuple[Any, ...]
    weights: tuple[Tensor | None, ...]
    state: list[int]
    packed: Tensor


Listener = Callable[[Tensor, Operator, "PackedWeights"], None]


class _Local(threading.local):
    listener: Listener | None = None


_local = _Local()


def listen(listener: Listener | None) -> Listener | None:
    """Tell `listener` from now on which packed weights this thread's calls use; returns the one before."""
    previous, _local.listener = _local.listener, listener
    return previous


class PackedWeights:
    """The packed weights of one operator call site.

    Compiled and exported graphs pack for themselves at each call: nothing in them could notice a changed weight.

    They are made at the first call and again whenever a weight has changed: another tensor, an in-place update, another
    compute dtype. What these checks cannot see (a write through `.data`, an update of a tensor made in inference mode)
    the kernel notices by comparing samples of the weights with those taken when packing; it then reads the weights
    themselves. A write of that kind that leaves most elements as they were can escape the eight samples.

    Copies and pickles start empty: the layout belongs to this machine.
    """

    def __init__(self) -> None:
        # Replaced as a whole, so that another thread never sees weights of one call with the packing of another.
        self._entry: _Entry | None = None

    def get(self, operator: Operator, tensors: Tensors, static: Any) -> Tensor | None:
        """The packed weights for this call; None while torch.compile traces."""
        if torch.compiler.is_compiling():
            return None
        entry = self._entry
        packing = (static.dtype, *operator.packing(static))
        weights = tuple([tensors[index] for index in operator.parameters])
        found = state([t for t in weights if t is not None])
        if (
            entry is None
            or entry.state != found
            or entry.packing != packing
            or not (all(map(is_, entry.weights, weights)) or all(map(_alike, entry.weights, weights)))
        ):
            pack = getattr(torch.ops.fastvit, f"{operator.name}_pack").default
            with torch.no_grad():
                packed = torch.ops.fastvit.shelve.default(pack(tensors, *static))
                entry = _Entry(packing, weights, found, packed)
            self._entry = entry
        if _local.listener is not None:
            _local.listener(entry.packed, operator, self)
        return entry.packed

    @property
    def nbytes(self) -> int:
        entry = self._entry
        return 0 if entry is None else entry.packed.numel()

    def __reduce__(self) -> tuple[type[PackedWeights], tuple[()]]:
        return PackedWeights, ()


def check_packed(packed: object) -> PackedWeights | None:
    """The argument `packed` of an operator."""
    if packed is not None and not isinstance(packed, PackedWeights):
        raise TypeError(f"packed: expected PackedWeights or None, got {type(packed).__name__}")
    return packed


def _alike(old: Tensor | None, new: Tensor | None) -> bool:
    """Whether two tensors of the same address are the same view: the one that is held keeps the memory its own."""
    if old is None or new is None:
        return old is new
    return old.shape == new.shape and old.stride() == new.stride() and old.dtype is new.dtype


def state(weights: Sequence[Tensor]) -> list[int]:
    """Addresses and version counters: what an in-place update or a swap of `.data` changes."""
    return [t.data_ptr() for t in weights] + versions(weights)


def versions(weights: Sequence[Tensor]) -> list[int]:
    """Version counters: what an in-place update changes."""
    try:
        return [t._version for t in weights]
    except RuntimeError:  # tensors made in inference mode count no versions
        return [0 if t.is_inference() else t._version for t in weights]
