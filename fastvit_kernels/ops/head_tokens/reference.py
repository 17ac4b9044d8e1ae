"""Normalised tokens and one further token for each head, in plain PyTorch: the definition of the operator."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastvit_kernels.ops.normalization import normalize
from fastvit_kernels.ops.operator import Outputs, Tensors


class Static(NamedTuple):
    """The operator's static arguments."""

    num_heads: int
    norm_eps: float | None
    head_norm_eps: float
    dtype: torch.dtype


STATIC_SCHEMA = "int num_heads, float? norm_eps, float head_norm_eps, ScalarType dtype"


def reference(tensors: Tensors, static: Static) -> Outputs:
    """Of `[x, norm_weight, norm_bias, weight, bias, head_norm_weight, head_norm_bias, pos_embed]`."""
    x, norm_weight, norm_bias, weight, bias, head_norm_weight, head_norm_bias, pos_embed = tensors
    assert x is not None and weight is not None and pos_embed is not None
    dtype = static.dtype
    rows = normalize(x, norm_weight, norm_bias, static.norm_eps, dtype)
    means = rows.mean(1).unflatten(-1, (static.num_heads, -1))
    heads = F.linear(means, weight.to(dtype), None if bias is None else bias.to(dtype))
    heads = heads.unflatten(-1, (static.num_heads, -1))
    heads = F.gelu(normalize(heads, head_norm_weight, head_norm_bias, static.head_norm_eps, dtype))
    return (torch.cat([rows, heads.flatten(2) + pos_embed.to(dtype)], dim=1),)
