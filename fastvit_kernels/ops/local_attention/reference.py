"""Attention inside square windows of a map in plain PyTorch: the definition of the operator."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit_kernels.ops.attention import Attend, attend
from fastvit_kernels.ops.normalization import group_statistics, normalize_by
from fastvit_kernels.ops.operator import Outputs, Tensors
from fastvit_kernels.ops.precision import wide


class Static(NamedTuple):
    """The operator's static arguments."""

    norm: str
    norm_eps: float
    height: int
    width: int
    window_size: int
    num_heads: int
    scale: float
    pad: str
    return_statistics: bool
    dtype: torch.dtype


STATIC_SCHEMA = (
    "str norm, float norm_eps, SymInt height, SymInt width, int window_size, int num_heads, float scale, str pad, "
    "bool return_statistics, ScalarType dtype"
)


def partition(tokens: Tensor, static: Static) -> Tensor:
    """`[B, H*W, C]` as windows `[B, H/g, W/g, g*g, C]`, behind zeros on the right and at the bottom where g asks."""
    g = static.window_size
    maps = tokens.unflatten(1, (static.height, static.width))
    if static.pad != "none":
        maps = F.pad(maps, (0, 0, 0, -static.width % g, 0, -static.height % g))
    return maps.unflatten(2, (-1, g)).unflatten(1, (-1, g)).transpose(2, 3).flatten(3, 4)


def reverse(windows: Tensor, static: Static) -> Tensor:
    """The inverse of `partition`, without the padding."""
    g = static.window_size
    maps = windows.unflatten(3, (g, g)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return maps[:, : static.height, : static.width].flatten(1, 2)


def reference(tensors: Tensors, static: Static) -> Outputs:
    """`softmax(q k^T * scale + bias) v` per head and window, then linear and residual.

    Of `[x, k, v, norm_weight, norm_bias, norm_statistics, qkv_weight, qkv_bias, attn_bias, proj_weight, proj_bias,
    residual]`: x holds the queries beside k and v; what q, k and v are made from, with a qkv_weight; or all three.
    """
    return around(attend, tensors, static)


def around(attention: Attend, tensors: Tensors, static: Static) -> Outputs:
    """The operator with this attention of heads in its middle."""
    x, k, v, norm_weight, norm_bias, statistics, qkv_weight, qkv_bias, attn_bias, *rest = tensors
    proj_weight, proj_bias, residual = rest
    assert x is not None
    dtype = static.dtype
    windows = partition(
        normalize_by(static.norm, x, statistics, norm_weight, norm_bias, static.norm_eps, dtype), static
    )
    if k is not None and v is not None:
        q, k, v = windows, partition(k.to(dtype), static), partition(v.to(dtype), static)
    else:
        if qkv_weight is not None:
            windows = _linear(windows, qkv_weight, qkv_bias, dtype)
        q, k, v = windows.chunk(3, dim=-1)
    q, k, v = (t.unflatten(-1, (static.num_heads, -1)).transpose(-3, -2) for t in (q, k, v))
    absent = None
    if static.pad == "mask":
        pixels = partition(x.new_ones((1, static.height * static.width, 1)), static)
        absent = pixels.transpose(-2, -1).unsqueeze(3) == 0
    out = attention(q, k, v, attn_bias, absent, static.scale)
    out = reverse(out.transpose(-3, -2).flatten(-2), static)
    if proj_weight is not None:
        out = _linear(out, proj_weight, proj_bias, dtype)
    out = out if residual is None else residual + out
    return out, group_statistics(out) if static.return_statistics else out.new_empty(0, dtype=wide(out.dtype))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
