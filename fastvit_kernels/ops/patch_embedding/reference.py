"""A strided convolution and a LayerNorm over channels in plain PyTorch: the definition of the operator."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastvit_kernels.ops.convolution import convolution
from fastvit_kernels.ops.normalization import normalize
from fastvit_kernels.ops.operator import Outputs, Tensors


class Static(NamedTuple):
    """The operator's static arguments."""

    norm_eps: float | None
    in_norm_eps: float | None
    stride: int
    padding: int
    dtype: torch.dtype
    out_dtype: torch.dtype


STATIC_SCHEMA = "float? norm_eps, float? in_norm_eps, int stride, int padding, ScalarType dtype, ScalarType out_dtype"


def output_size(size: int, kernel: int, static: Static) -> int:
    """Height or width of the result."""
    return (size + 2 * static.padding - kernel) // static.stride + 1


def reference(tensors: Tensors, static: Static) -> Outputs:
    """Of `[x, weight, bias, norm_weight, norm_bias, in_norm_weight, in_norm_bias]`, maps as `[B, H, W, C]`."""
    x, weight, bias, norm_weight, norm_bias, in_norm_weight, in_norm_bias = tensors
    assert x is not None and weight is not None
    x = normalize(x, in_norm_weight, in_norm_bias, static.in_norm_eps, static.dtype)
    maps = x.permute(0, 3, 1, 2)
    maps = convolution(maps, weight, bias, static.stride, static.padding)
    rows = maps.permute(0, 2, 3, 1).contiguous()
    return (normalize(rows, norm_weight, norm_bias, static.norm_eps, static.out_dtype),)
