"""depthwise_conv in Triton: the shared depthwise convolution, behind a launch that normalises."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvit_kernels.ops import library
from fastvit_kernels.ops.depthwise_conv.reference import Static, output_grid
from fastvit_kernels.ops.operator import Outputs, Tensors
from fastvit_kernels.ops.triton_depthwise import Geometry, depthwise, depthwise_moments, filter_rows
from fastvit_kernels.ops.triton_normalization import normalize_rows
from fastvit_kernels.ops.triton_steps import Step


def run(tensors: Tensors, static: Static) -> Outputs:
    """The tokens are normalised into memory, because every pixel is read by all taps; then one launch does the rest.

    A residual that is not the convolution's own input takes another pass.
    """
    x, weight, bias, norm_weight, norm_bias, *bn, residual = library.dense(tensors)
    assert x is not None and weight is not None
    sizes = geometry(weight, static)
    dtype = static.dtype if residual is None else torch.promote_types(residual.dtype, static.dtype)
    shape = (x.shape[0], sizes.out_height * sizes.out_width, x.shape[2])
    # Where the map keeps its size the pixel in the filter's middle is the residual's.
    adds_input = residual is not None and static.norm_eps is None and _same_memory(residual, x)
    adds_input = adds_input and static.stride == 1 and sizes.kernel == 2 * static.padding + 1
    direct = residual is None or adds_input
    out = x.new_empty(shape, dtype=dtype if direct else static.dtype)
    depthwise(
        normalized(x, norm_weight, norm_bias, static),
        filter_rows(weight),
        bias,
        sizes,
        Step("none", (bn[0], bn[1], bn[2], bn[3], static.bn_eps)),
        None,
        out,
        "after_activation" if adds_input else "none",
    )
    return (out if direct or residual is None else residual + out,)


def geometry(weight: Tensor, static: Static) -> Geometry:
    """The sizes of the convolution."""
    kernel = weight.shape[-1]
    window = kernel, static.stride, static.padding
    return Geometry(static.height, static.width, *output_grid(static, kernel), *window, 0)


def normalized(x: Tensor, weight: Tensor | None, bias: Tensor | None, static: Static) -> Tensor:
    """What the convolution takes."""
    if static.norm_eps is None:
        return x
    normed = torch.empty_like(x, dtype=static.dtype)
    normalize_rows(x, normed, weight, bias, static.norm_eps)
    return normed


def statistics(tensors: Tensors, static: Static) -> Tensor:
    """`reference.batch_statistics`."""
    x, weight, bias, norm_weight, norm_bias = library.dense(tensors)[:5]
    assert x is not None and weight is not None
    normed = normalized(x, norm_weight, norm_bias, static)
    return depthwise_moments(normed, filter_rows(weight), bias, geometry(weight, static), static.dtype)


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.dtype is b.dtype and a.shape == b.shape and a.stride() == b.stride()
