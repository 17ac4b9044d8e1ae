"""Weights kept in the layout of the CPU kernels between calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvit_kernels.ops.operator import Operator, Tensors


class PackedWeights:
    """The packed weights of one operator call site.

    They are made at the first call and again whenever a weight has changed: another tensor, an in-place update, another
    compute dtype. What these checks cannot see (a write through `.data`) the kernel notices by comparing samples of
    the weights with those taken when packing; it then reads the weights themselves.

    Copies and pickles start empty: the layout belongs to this machine.
    """

    def __init__(self) -> None:
        self._key: tuple[Any, ...] | None = None
        self._packed: Tensor | None = None

    def get(self, operator: Operator, tensors: Tensors, static: Any) -> Tensor | None:
        """The packed weights for this call; while torch.compile traces, those of the last eager call."""
        if torch.compiler.is_compiling():
            return self._packed
        key = _key(operator, tensors, static)
        if key != self._key:
            pack = getattr(torch.ops.fastvit, f"{operator.name}_pack").default
            with torch.no_grad():
                self._packed = pack(tensors, *static)
            self._key = key
        return self._packed

    @property
    def nbytes(self) -> int:
        return 0 if self._packed is None else self._packed.numel()

    def __reduce__(self) -> tuple[type[PackedWeights], tuple[()]]:
        return PackedWeights, ()


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _key(operator: Operator, tensors: Tensors, static: Any) -> tuple[Any, ...]:
    weights = (tensors[index] for index in operator.parameters)
    return (static.dtype, *((t.data_ptr(), _version(t)) for t in weights if t is not None))
