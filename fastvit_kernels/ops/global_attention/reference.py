"""Multi-head attention over token rows in plain PyTorch: the definition of the operator."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastvit_kernels.ops.operator import Outputs, Tensors
from fastvit_kernels.ops.precision import wide


class Static(NamedTuple):
    """The operator's static arguments."""

    num_heads: int
    scale: float
    dtype: torch.dtype


STATIC_SCHEMA = "int num_heads, float scale, ScalarType dtype"


def reference(tensors: Tensors, static: Static) -> Outputs:
    """`softmax(q k^T * scale) v` per head, then linear and residual; of `[q, k, v, weight, bias, residual]`."""
    q, k, v, proj_weight, proj_bias, residual = tensors
    assert q is not None and k is not None and v is not None
    q, k, v = (t.to(static.dtype).unflatten(-1, (static.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    scores = (q * static.scale) @ k.transpose(-2, -1)
    probabilities = scores.softmax(-1, dtype=wide(static.dtype)).to(static.dtype)
    out = (probabilities @ v).transpose(1, 2).flatten(2)
    if proj_weight is not None:
        bias = None if proj_bias is None else proj_bias.to(static.dtype)
        out = F.linear(out, proj_weight.to(static.dtype), bias)
    return (out if residual is None else residual + out,)
