"""Head tokens added to the class token, in plain PyTorch: the definition of the operator."""

from __future__ import annotations

from typing import NamedTuple

import torch

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
