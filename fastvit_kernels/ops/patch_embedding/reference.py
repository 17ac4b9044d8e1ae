"""A strided convolution, an activation and norms in plain PyTorch: the definition of the operator."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastvit_kernels.ops.activations import activate
from fastvit_kernels.ops.batch_norm import batch_moments, batch_normalize
from fastvit_kernels.ops.convolution import convolution
from fastvit_kernels.ops.normalization import normalize
from fastvit_kernels.ops.operator import Outputs, Tensors
from fastvit_kernels.ops.precision import wide


class Static(NamedTuple):
    """The operator's static arguments."""

    norm_eps: float | None
    in_norm_eps: float | None
    stride: int
    padding: int
    activation: str
    bn_after_activation: bool
    bn_eps: float
    training: bool
    dtype: torch.dtype
    out_dtype: torch.dtype


STATIC_SCHEMA = (
    "float? norm_eps, float? in_norm_eps, int stride, int padding, str activation, bool bn_after_activation, "
    "float bn_eps, bool training, ScalarType dtype, ScalarType out_dtype"
)


def output_size(size: int, kernel: int, static: Static) -> int:
    """Height or width of the result."""
    return (size + 2 * static.padding - kernel) // static.stride + 1


def reference(tensors: Tensors, static: Static) -> Outputs:
    """Maps as `[B, H, W, C]`.

    Of `[x, weight, bias, norm_weight, norm_bias, in_norm_weight, in_norm_bias, bn_weight, bn_bias, bn_mean, bn_var]`.
    A norm without its epsilon is only its weight and bias. With `training` batch statistics are recomputed here;
    `bn_mean` only says that there is a batch norm.
    """
    norm_weight, norm_bias = tensors[3:5]
    bn_weight, bn_bias, mean, var = tensors[7:]
    maps = _in_front_of_batch_norm(tensors, static)
    if mean is not None and var is not None:
        if static.training:
            mean, var = batch_moments(maps)
        maps = batch_normalize(maps, bn_weight, bn_bias, mean, var, static.bn_eps)
    if not static.bn_after_activation:
        maps = activate(maps, static.activation)
    rows = maps.permute(0, 2, 3, 1).contiguous()
    return (_norm(rows, norm_weight, norm_bias, static.norm_eps, static.out_dtype),)


def only_scales(weight: Tensor | None, bias: Tensor | None, eps: float | None) -> bool:
    """Whether a norm is only its weight and bias."""
    return eps is None and (weight is not None or bias is not None)


def has_bare_scales(tensors: Tensors, static: Static) -> bool:
    """Whether either norm of a call is that."""
    norms = ((3, static.norm_eps), (5, static.in_norm_eps))
    return any(only_scales(tensors[first], tensors[first + 1], eps) for first, eps in norms)


def scale_and_shift(x: Tensor, scale: Tensor | None, shift: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Of each channel, the last axis, in at least fp32, then a cast to `dtype`."""
    x = x.to(wide(x.dtype))
    x = x if scale is None else x * scale.to(x.dtype)
    return (x if shift is None else x + shift.to(x.dtype)).to(dtype)


def batch_statistics(tensors: Tensors, static: Static) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of what the batch norm meets."""
    return batch_moments(_in_front_of_batch_norm(tensors, static))


def _in_front_of_batch_norm(tensors: Tensors, static: Static) -> Tensor:
    x, weight, bias, _, _, in_norm_weight, in_norm_bias = tensors[:7]
    assert x is not None and weight is not None
    x = _norm(x, in_norm_weight, in_norm_bias, static.in_norm_eps, static.dtype)
    maps = convolution(x.permute(0, 3, 1, 2), weight, bias, static.stride, static.padding)
    return activate(maps, static.activation) if static.bn_after_activation else maps


def _norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float | None, dtype: torch.dtype) -> Tensor:
    if only_scales(weight, bias, eps):
        return scale_and_shift(x, weight, bias, dtype)
    return normalize(x, weight, bias, eps, dtype)
