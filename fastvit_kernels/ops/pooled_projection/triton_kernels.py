"""Triton kernels of pooled_projection: the averages, then `triton_linear` on their rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit_kernels.ops import triton_support
from fastvit_kernels.ops.operator import Outputs, Tensors
from fastvit_kernels.ops.pooled_projection.reference import Static
from fastvit_kernels.ops.pooling import pooled_side
from fastvit_kernels.ops.primitives import normalize
from fastvit_kernels.ops.triton_linear import linear
from fastvit_kernels.ops.triton_moments import group_statistics
from fastvit_kernels.ops.triton_specs import Empty, Spec


@triton.jit(do_not_specialize=["num_squares", "height", "width", "pooled_height", "pooled_width"])
def pool_kernel(
    x_ptr,
    norm,
    pooled_ptr,
    num_squares,
    height,
    width,
    pooled_height,
    pooled_width,
    kernel_size,
    channels,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The averages of BLOCK_M squares in BLOCK_N channels, of the pixels that are there, normalised by statistics of x.

    Averages of a normalised map are the normalised averages, so the map itself is not normalised.
    """
    column_tiles = tl.cdiv(channels, BLOCK_N)
    squares = tl.program_id(0) // column_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    square_mask = squares < num_squares
    column_mask = columns < channels
    sample = squares // pooled_width // pooled_height
    top = squares // pooled_width % pooled_height * kernel_size
    left = squares % pooled_width * kernel_size
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # A square as large as the map may be cut off at its side: no pixel lies behind that.
    for row in range(0, tl.minimum(kernel_size, height)):
        for column in range(0, tl.minimum(kernel_size, width)):
            inside = square_mask & (top + row < height) & (left + column < width)
            pixel = (sample.to(tl.int64) * height + top + row) * width + left + column
            mask = inside[:, None] & column_mask[None, :]
            total += tl.load(x_ptr + pixel[:, None] * channels + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    rows, wide = tl.minimum(height - top, kernel_size), tl.minimum(width - left, kernel_size)
    pooled = total / (rows * wide).to(tl.float32)[:, None]
    if norm is not None:
        weight_ptr, bias_ptr, statistics_ptr, eps = norm
        mean = tl.load(statistics_ptr + 2 * sample, mask=square_mask, other=0.0)
        rstd = tl.rsqrt(tl.load(statistics_ptr + 2 * sample + 1, mask=square_mask, other=0.0) + eps)
        pooled = normalize(pooled, mean, rstd, weight_ptr, bias_ptr, columns, column_mask, BLOCK_N)
    offsets = squares.to(tl.int64)[:, None] * channels + columns[None, :]
    tl.store(pooled_ptr + offsets, pooled, mask=square_mask[:, None] & column_mask[None, :])


def average(x: Tensor, norm: tuple[Tensor | float | None, ...] | None, static: Static) -> Tensor:
    """The pooled rows of dense `[B, N, C]` in fp32, normalised by `norm`: weight, bias, statistics, eps."""
    channels = x.shape[2]
    height, width = (pooled_side(s, static.kernel_size, static.ceil_mode) for s in (static.height, static.width))
    pooled = x.new_empty((x.shape[0], height * width, channels), dtype=torch.float32)
    num_squares = pooled.numel() // channels
    arithmetic = triton_support.arithmetic(torch.float32, x.device)
    config = triton_support.config("pool", arithmetic, channels)
    triton_support.launch(
        pool_kernel,
        config.tiles(num_squares, channels),
        x.device,
        config,
        x,
        norm,
        pooled,
        num_squares,
        static.height,
        static.width,
        height,
        width,
        static.kernel_size,
        channels,
    )
    return pooled


def run(tensors: Tensors, static: Static) -> Outputs:
    """The pooled rows in fp32, their statistics where there is a norm behind the pooling, and the linear."""
    x, in_norm_weight, in_norm_bias, statistics, norm_weight, norm_bias, weight, bias = tensors
    assert x is not None and weight is not None
    height, width = (pooled_side(s, static.kernel_size, static.ceil_mode) for s in (static.height, static.width))
    if len(x) * height * width == 0:
        return (x.new_empty((len(x), height * width, weight.shape[0]), dtype=static.dtype),)
    if static.in_norm_eps is not None and statistics is None:
        statistics = group_statistics(x)
    in_norm = None if static.in_norm_eps is None else (in_norm_weight, in_norm_bias, statistics, static.in_norm_eps)
    pooled = average(x, in_norm, static)
    found = linear(
        pooled,
        weight,
        bias,
        static.dtype,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        norm_eps=static.norm_eps,
        norm_statistics=None if static.norm_eps is None else group_statistics(pooled),
    )
    return (found,)


def _of_hat_net(empty: Empty) -> Tensor:
    """Stage 2 of HAT-Net-Small."""
    static = Static(1e-6, 1e-6, 28, 28, 4, False, empty.dtype)
    return average(empty(8, 784, 128), (empty(128), empty(128), empty.wide(8, 2), 1e-6), static)


SPECS = (Spec(pool_kernel, _of_hat_net),)
