"""Average pooling, GroupNorm and linear in plain PyTorch: the definition of the operator."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastvit_kernels.ops.normalization import group_statistics, normalize_by
from fastvit_kernels.ops.operator import Outputs, Tensors
from fastvit_kernels.ops.pooling import average_pool
from fastvit_kernels.ops.precision import wide


class Static(NamedTuple):
    """The operator's static arguments."""

    in_norm_eps: float | None
    norm_eps: float | None
    height: int
    width: int
    kernel_size: int
    ceil_mode: bool
    dtype: torch.dtype


STATIC_SCHEMA = (
    "float? in_norm_eps, float? norm_eps, SymInt height, SymInt width, int kernel_size, bool ceil_mode, "
    "ScalarType dtype"
)


def reference(tensors: Tensors, static: Static) -> Outputs:
    """`linear(norm(avg_pool(in_norm(x))))`.

    Of `[x, in_norm_weight, in_norm_bias, in_norm_statistics, norm_weight, norm_bias, weight, bias]`. Averages of a
    normalised map are the normalised averages, so the map itself is not normalised.
    """
    x, in_norm_weight, in_norm_bias, statistics, norm_weight, norm_bias, weight, bias = tensors
    assert x is not None and weight is not None
    dtype, precise = static.dtype, wide(x.dtype)
    if statistics is None and static.in_norm_eps is not None:
        statistics = group_statistics(x)
    maps = x.transpose(1, 2).unflatten(2, (static.height, static.width))
    pooled = average_pool(maps, static.kernel_size, static.ceil_mode).flatten(2).transpose(1, 2)
    if static.in_norm_eps is not None:
        pooled = normalize_by("group", pooled, statistics, in_norm_weight, in_norm_bias, static.in_norm_eps, precise)
    if static.norm_eps is not None:
        pooled = normalize_by("group", pooled, None, norm_weight, norm_bias, static.norm_eps, dtype)
    return (F.linear(pooled.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)),)
