"""A depthwise convolution of tokens with the norms around it in plain PyTorch: the definition of the operator."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastvit_kernels.ops.batch_norm import batch_moments, batch_normalize
from fastvit_kernels.ops.convolution import convolution
from fastvit_kernels.ops.normalization import normalize
from fastvit_kernels.ops.operator import Outputs, Tensors


class Static(NamedTuple):
    """The operator's static arguments."""

    norm_eps: float | None
    bn_eps: float
    training: bool
    height: int
    width: int
    stride: int
    padding: int
    dtype: torch.dtype


STATIC_SCHEMA = (
    "float? norm_eps, float bn_eps, bool training, SymInt height, SymInt width, int stride, int padding, "
    "ScalarType dtype"
)


def output_grid(static: Static, kernel: int) -> tuple[int, int]:
    """Height and width of the result."""
    stride, padding = static.stride, static.padding
    return (
        (static.height + 2 * padding - kernel) // stride + 1,
        (static.width + 2 * padding - kernel) // stride + 1,
    )


def reference(tensors: Tensors, static: Static) -> Outputs:
    """Of `[x, weight, bias, norm_weight, norm_bias, bn_weight, bn_bias, bn_mean, bn_var, residual]`.

    With `training` batch statistics are recomputed here; `bn_mean` only says that there is a batch norm.
    """
    bn_weight, bn_bias, mean, var, residual = tensors[5:]
    maps = _convolved(tensors, static)
    if mean is not None and var is not None:
        if static.training:
            mean, var = batch_moments(maps)
        maps = batch_normalize(maps, bn_weight, bn_bias, mean, var, static.bn_eps)
    rows = maps.flatten(2).transpose(1, 2)
    return ((rows if residual is None else residual + rows).contiguous(),)


def batch_statistics(tensors: Tensors, static: Static) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of the convolution's result."""
    return batch_moments(_convolved(tensors, static))


def _convolved(tensors: Tensors, static: Static) -> Tensor:
    x, weight, bias, norm_weight, norm_bias = tensors[:5]
    assert x is not None and weight is not None
    normed = normalize(x, norm_weight, norm_bias, static.norm_eps, static.dtype)
    maps = normed.transpose(1, 2).reshape(x.shape[0], x.shape[2], static.height, static.width)
    return convolution(maps, weight, bias, static.stride, static.padding, groups=x.shape[2])
