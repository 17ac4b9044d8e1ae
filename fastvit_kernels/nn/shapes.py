"""Gradients of PyTorch's operators that only move values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastvit_kernels.nn.chain import Rule

aten = torch.ops.aten


def rule_of(func: Any, args: tuple[Any, ...], outs: list[Tensor]) -> Rule | None:
    """How the gradients of a call's tensors come from those of its results; None for any other call."""
    make = _RULES.get(func)
    return None if make is None else make(args, outs)


def _as_before(args: tuple[Any, ...], outs: list[Tensor]) -> Rule:
    shape = tuple(args[0].shape)
    return lambda grads: [_given(grads[0]).reshape(shape)]


def _permuted(args: tuple[Any, ...], outs: list[Tensor]) -> Rule:
    dims = [d % outs[0].ndim for d in args[1]]
    back = sorted(range(len(dims)), key=dims.__getitem__)
    return lambda grads: [_given(grads[0]).permute(back)]


def _transposed(args: tuple[Any, ...], outs: list[Tensor]) -> Rule:
    first, second = args[1], args[2]
    return lambda grads: [_given(grads[0]).transpose(first, second)]


def _joined(args: tuple[Any, ...], outs: list[Tensor]) -> Rule | None:
    tensors, dim = args[0], args[1] if len(args) > 1 else 0
    sizes = [t.shape[dim] for t in tensors]
    if any(t.ndim != outs[0].ndim or t.dtype is not outs[0].dtype for t in tensors):
        return None
    return lambda grads: list(_given(grads[0]).split_with_sizes(sizes, dim))


def _split(args: tuple[Any, ...], outs: list[Tensor]) -> Rule:
    dim = args[2] if len(args) > 2 else 0
    like = [(tuple(o.shape), o.dtype, o.device) for o in outs]

    def rule(grads: list[Tensor | None]) -> list[Tensor]:
        whole = [
            torch.zeros(shape, dtype=dtype, device=device) if g is None else g
            for g, (shape, dtype, device) in zip(grads, like, strict=True)
        ]
        return [torch.cat(whole, dim)]

    return rule


def _given(grad: Tensor | None) -> Tensor:
    """The gradient of a call's only result; without it nobody asks."""
    assert grad is not None
    return grad


_RULES: dict[Any, Callable[[tuple[Any, ...], list[Tensor]], Rule | None]] = {
    aten.view.default: _as_before,
    aten._unsafe_view.default: _as_before,
    aten.unsqueeze.default: _as_before,
    aten.squeeze.dim: _as_before,
    aten.permute.default: _permuted,
    aten.transpose.int: _transposed,
    aten.cat.default: _joined,
    aten.split_with_sizes.default: _split,
}
