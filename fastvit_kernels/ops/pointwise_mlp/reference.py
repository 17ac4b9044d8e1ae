"""LayerNorm, linear, activation, linear, residual in plain PyTorch: the definition of the operator."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastvit_kernels.ops.activations import activate
from fastvit_kernels.ops.normalization import normalize
from fastvit_kernels.ops.operator import Outputs, Tensors


class Static(NamedTuple):
    """The operator's static arguments."""

    norm_eps: float | None
    activation: str
    dtype: torch.dtype


STATIC_SCHEMA = "float? norm_eps, str activation, ScalarType dtype"


def reference(tensors: Tensors, static: Static) -> Outputs:
    """Of `[x, norm_weight, norm_bias, weight1, bias1, weight2, bias2, residual]`."""
    x, norm_weight, norm_bias, weight1, bias1, weight2, bias2, residual = tensors
    assert x is not None and weight1 is not None and weight2 is not None
    dtype = static.dtype
    h = normalize(x, norm_weight, norm_bias, static.norm_eps, dtype)
    h = activate(F.linear(h, weight1.to(dtype), None if bias1 is None else bias1.to(dtype)), static.activation)
    out = F.linear(h, weight2.to(dtype), None if bias2 is None else bias2.to(dtype))
    return (out if residual is None else residual + out,)
