"""Tensors made of parameters, kept from call to call.

Packed weights are known by the tensors they were made from. An operator that takes something computed from parameters
(a table of biases spread over pairs of pixels) must therefore get the same tensor at each call as long as the
parameters are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastvit_kernels.ops.packing import PackedWeights

Made = tuple[Tensor, ...]


class Derived:
    """What was made last, and copies of what it was made from. Copies and pickles of this object start empty."""

    def __init__(self) -> None:
        # Replaced as a whole, so that another thread never sees the results of one call with the sources of another.
        self._entry: tuple[Made, Made] | None = None

    def get(self, sources: Sequence[Tensor], make: Callable[[], Made]) -> Made:
        """`make()`, or what it returned before if all values are what they were then."""
        entry = self._entry
        if entry is None or not all(map(_same, entry[0], sources)):
            entry = tuple(source.detach().clone() for source in sources), make()
            self._entry = entry
        return entry[1]

    def __reduce__(self) -> tuple[type[Derived], tuple[()]]:
        return Derived, ()


def derive(
    derived: Derived, packed: dict[str, PackedWeights] | None, sources: Sequence[Tensor], make: Callable[[], Made]
) -> Made:
    """`make()`, which computes from `sources` alone; kept in `derived` where a call is going to use packed weights."""
    if packed is None or torch.is_grad_enabled() or torch.compiler.is_compiling() or not all(map(_is_plain, sources)):
        return make()
    return derived.get(sources, make)


def _same(old: Tensor, new: Tensor) -> bool:
    return old.dtype is new.dtype and old.shape == new.shape and torch.equal(old, new)


def _is_plain(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and type(tensor) in (Tensor, nn.Parameter)
