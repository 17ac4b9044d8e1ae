"""The normalisation in front of an operator, as every reference applies it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit_kernels.ops.precision import wide

NORMS = ("none", "layer", "group")


def normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float | None, dtype: torch.dtype) -> Tensor:
    """LayerNorm over the last axis in at least fp32, then a cast to `dtype`; only the cast when `eps` is None."""
    if eps is not None:
        dtype_of_sums = wide(x.dtype)
        weight = None if weight is None else weight.to(dtype_of_sums)
        bias = None if bias is None else bias.to(dtype_of_sums)
        x = F.layer_norm(x.to(dtype_of_sums), (x.shape[-1],), weight, bias, eps)
    return x.to(dtype)


def group_statistics(x: Tensor, num_prefix_tokens: int = 0) -> Tensor:
    """Mean and biased variance `[B, 2]` of each sample of `[B, P + N, C]` but its P prefix rows, in at least fp32."""
    tokens = x[:, num_prefix_tokens:].to(wide(x.dtype))
    mean = tokens.mean((1, 2))
    # Not torch.var_mean, which warns at an empty batch.
    var = (tokens - mean[:, None, None]).square().mean((1, 2))
    return torch.stack([mean, var], 1)


def group_normalize(
    x: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """GroupNorm with one group of `[B, N, C]` by these statistics `[B, 2]` in at least fp32, then a cast to `dtype`."""
    dtype_of_sums = wide(x.dtype)
    mean, var = statistics.to(dtype_of_sums)[:, None, None].unbind(-1)
    y = (x.to(dtype_of_sums) - mean) * torch.rsqrt(var + eps)
    if weight is not None:
        y = y * weight.to(dtype_of_sums)
    if bias is not None:
        y = y + bias.to(dtype_of_sums)
    return y.to(dtype)


def normalize_by(
    kind: str,
    x: Tensor,
    statistics: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    num_prefix_tokens: int = 0,
) -> Tensor:
    """One of `NORMS` of `[B, P + N, C]`, then a cast to `dtype`; `statistics` None: those of x without its prefix rows.

    Prefix rows of a `"group"` norm come out scaled by statistics that they took no part in.
    """
    if kind == "group":
        if statistics is None:
            statistics = group_statistics(x, num_prefix_tokens)
        return group_normalize(x, statistics, weight, bias, eps, dtype)
    return normalize(x, weight, bias, eps if kind == "layer" else None, dtype)
