"""Head tokens added to the class token, in plain PyTorch: the definition of the operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastvit_kernels.ops.operator import Outputs, Tensors


class Static(NamedTuple):
    """The operator's static arguments."""

    num_heads: int
    dtype: torch.dtype


STATIC_SCHEMA = "int num_heads, ScalarType dtype"


def reference(tensors: Tensors, static: Static) -> Outputs:
    """Of `[x, residual]`."""
    x, residual = tensors
    assert x is not None
    rows, heads = x.to(static.dtype).tensor_split([x.shape[1] - static.num_heads], dim=1)
    out = rows if residual is None else residual + rows
    return (torch.cat([out[:, :1] + heads.mean(1, keepdim=True), out[:, 1:]], dim=1),)


def gradients(grads: Sequence[Tensor], tensors: Tensors, needs: Sequence[bool], static: Static) -> list[Tensor]:
    """Those that autograd finds behind `reference`: copies and a share of the class token's for each head."""
    x, residual = tensors
    of_x, of_residual = needs
    assert x is not None
    found = []
    if of_x:
        rows = grads[0].to(static.dtype)
        heads = (rows[:, :1] / static.num_heads).expand(-1, static.num_heads, -1)
        found.append(torch.cat([rows, heads], dim=1).to(x.dtype))
    if of_residual:
        assert residual is not None
        found.append(grads[0].to(residual.dtype, copy=True))
    return found
