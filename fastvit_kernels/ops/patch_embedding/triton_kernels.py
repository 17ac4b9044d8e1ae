"""Triton kernels of patch_embedding: the weight in the order of the gathered rows, then a product with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit_kernels.ops import library, triton_support
from fastvit_kernels.ops.operator import Outputs, Tensors
from fastvit_kernels.ops.patch_embedding.reference import Static, only_scales, output_size, scale_and_shift
from fastvit_kernels.ops.primitives import dot, rows_and_columns, vector
from fastvit_kernels.ops.triton_channel_moments import row_moments
from fastvit_kernels.ops.triton_configs import ALIGNMENT, Config
from fastvit_kernels.ops.triton_normalization import normalize_rows, row_normalize
from fastvit_kernels.ops.triton_specs import Empty, Spec
from fastvit_kernels.ops.triton_steps import Step, apply_step


@triton.jit
def pack_kernel(
    weight_ptr,
    packed_ptr,
    out_channels,
    channels,
    stride,
    TAPS: tl.constexpr,
    CHANNELS_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`[C_out, C, TAPS]` in another dtype, as rows of (channel, tap) or (tap, channel) with zeros up to `stride`."""
    tiles = tl.cdiv(stride, BLOCK_K)
    row = (tl.program_id(0) // tiles * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    k = (tl.program_id(0) % tiles * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    source = k if CHANNELS_FIRST else k % channels * TAPS + k // channels
    mask = (row < out_channels) & (k < channels * TAPS)
    weight = tl.load(weight_ptr + row * (channels * TAPS) + source, mask=mask, other=0.0).to(tl.float32)
    tl.store(packed_ptr + row * stride + k, weight, mask=(row < out_channels) & (k < stride))


@triton.jit(do_not_specialize=["num_rows", "height", "width", "out_height", "out_width"])
def embed_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    bn,
    norm,
    before_ptr,
    out_ptr,
    num_rows,
    height,
    width,
    out_height,
    out_width,
    channels,
    out_channels,
    weight_stride,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    CHANNELS_FIRST: tl.constexpr,
    ONE_TAP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BN_AFTER_ACTIVATION: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_M pixels of the result and BLOCK_N of its channels, all of them where there is a norm.

    A row of the product is the pixel's window of x: all taps of a channel behind each other with `CHANNELS_FIRST`,
    otherwise all channels of a tap, where with `ONE_TAP` a block never holds two taps. `before_ptr` gets what batch
    norm and activation take.
    """
    TAPS: tl.constexpr = KERNEL * KERNEL
    # Programs that share pixels are neighbours.
    rows, columns = rows_and_columns(tl.program_id(0), out_channels, BLOCK_M, BLOCK_N)
    row_mask = rows < num_rows
    column_mask = columns < out_channels
    top = rows // out_width % out_height * STRIDE - PADDING
    left = rows % out_width * STRIDE - PADDING
    first = (rows // out_width // out_height).to(tl.int64) * height * width * channels
    if CHANNELS_FIRST:
        pixels = x_ptr + (first + top * width + left)[:, None]
    else:
        pixels = x_ptr + (first + (top * width + left).to(tl.int64) * channels)[:, None]
    weight_columns = weight_ptr + columns.to(tl.int64)[None, :] * weight_stride
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, channels * TAPS, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        if ONE_TAP:
            tap = start // channels
            off_y = tap // KERNEL
            off_x = tap % KERNEL
            inside = row_mask & (top + off_y >= 0) & (top + off_y < height)
            inside = inside & (left + off_x >= 0) & (left + off_x < width)
            source = (off_y * width + off_x).to(tl.int64) * channels + start % channels + tl.arange(0, BLOCK_K)
            x = tl.load(pixels + source[None, :], mask=inside[:, None], other=0.0)
            weight = tl.load(weight_columns + k[:, None], mask=column_mask[None, :], other=0.0)
        else:
            if CHANNELS_FIRST:
                tap = k % TAPS
                off_y = tap // KERNEL
                off_x = tap % KERNEL
                source = (k // TAPS).to(tl.int64) * height * width + off_y * width + off_x
            else:
                tap = k // channels
                off_y = tap // KERNEL
                off_x = tap % KERNEL
                source = (off_y * width + off_x).to(tl.int64) * channels + k % channels
            y = top[:, None] + off_y[None, :]
            inside = row_mask[:, None] & (k < channels * TAPS)[None, :] & (y >= 0) & (y < height)
            column = left[:, None] + off_x[None, :]
            inside = inside & (column >= 0) & (column < width)
            x = tl.load(pixels + source[None, :], mask=inside, other=0.0)
            weight_mask = (k < weight_stride)[:, None] & column_mask[None, :]
            weight = tl.load(weight_columns + k[:, None], mask=weight_mask, other=0.0)
        accumulator = dot(x, weight, accumulator, ARITHMETIC)
    y = accumulator + vector(bias_ptr, columns, column_mask, 0.0, BLOCK_N)[None, :]
    offsets = rows.to(tl.int64)[:, None] * out_channels + columns[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    if before_ptr is not None:
        tl.store(before_ptr + offsets, y, mask=mask)
    y = apply_step(y, bn, columns, column_mask, ACTIVATION, BN_AFTER_ACTIVATION, BLOCK_N)
    if norm is not None:
        y = row_normalize(y, norm, columns, column_mask, out_channels, BLOCK_N)
    tl.store(out_ptr + offsets, y, mask=mask)


class Source(NamedTuple):
    """A map `[B, H, W, C]` as the convolution reads it: normalised, and dense with its channels first or last."""

    x: Tensor
    channels_first: bool


def readable(x: Tensor, in_norm_weight: Tensor | None, in_norm_bias: Tensor | None, static: Static) -> Source:
    """The map is normalised, or scaled, into memory: its pixels are gathered more than once."""
    if only_scales(in_norm_weight, in_norm_bias, static.in_norm_eps):
        x = scale_and_shift(x, in_norm_weight, in_norm_bias, static.dtype)
    channels_first = static.in_norm_eps is None and not x.is_contiguous() and x.permute(0, 3, 1, 2).is_contiguous()
    if not channels_first:
        x = x.contiguous()
    if static.in_norm_eps is not None:
        normed = torch.empty_like(x, dtype=static.dtype)
        normalize_rows(x, normed, in_norm_weight, in_norm_bias, static.in_norm_eps)
        x = normed
    return Source(x, channels_first)


def step_of(bn: Sequence[Tensor | None], static: Static) -> Step:
    """What stands between the convolution and the norm behind it."""
    return Step(static.activation, (*bn, static.bn_eps), static.bn_after_activation, static.training)


def run(tensors: Tensors, static: Static) -> Outputs:
    """The weight packed, the convolution as a product, and a norm in its epilogue where a tile holds whole rows.

    Wider rows are normalised by a launch of their own.
    """
    x, *rest = tensors
    assert x is not None
    weight, bias, norm_weight, norm_bias, in_norm_weight, in_norm_bias, *bn = library.dense(rest)
    assert weight is not None
    out_channels, kernel = weight.shape[0], weight.shape[-1]
    grid = (output_size(size, kernel, static) for size in x.shape[1:3])
    out = x.new_empty((x.shape[0], *grid, out_channels), dtype=static.out_dtype)
    if out.numel() == 0:
        return (out,)
    source, step = readable(x, in_norm_weight, in_norm_bias, static), step_of(bn, static)
    norm = norm_weight, norm_bias, static.norm_eps
    if only_scales(*norm):
        rows = torch.empty_like(out, dtype=static.dtype)
        embed(source, weight, bias, step, static, rows)
        return (scale_and_shift(rows, norm_weight, norm_bias, static.out_dtype),)
    if static.norm_eps is None:
        embed(source, weight, bias, step, static, out)
    elif out_channels <= _config(source, weight, static).block_n:
        embed(source, weight, bias, step, static, out, norm=norm)
    else:
        rows = torch.empty_like(out, dtype=static.dtype)
        embed(source, weight, bias, step, static, rows)
        normalize_rows(rows, out, norm_weight, norm_bias, static.norm_eps)
    return (out,)


def _config(source: Source, weight: Tensor, static: Static) -> Config:
    out_channels, channels = weight.shape[:2]
    arithmetic = triton_support.arithmetic(static.dtype, weight.device)
    return triton_support.config("embedding", arithmetic, out_channels, 0 if source.channels_first else channels)


def embed(
    source: Source,
    weight: Tensor,
    bias: Tensor | None,
    step: Step,
    static: Static,
    out: Tensor,
    *,
    before: Tensor | None = None,
    norm: tuple[Tensor | None, Tensor | None, float | None] | None = None,
) -> None:
    """Write the convolution into `before`, if given, and what `step` and `norm` make of it into `out`."""
    x, channels_first = source
    out_channels, channels, kernel, _ = weight.shape
    packed = _pack(weight, channels_first, static.dtype)
    config = _config(source, weight, static)
    num_rows = out.numel() // out_channels
    triton_support.launch(
        embed_kernel,
        config.tiles(num_rows, out_channels),
        x.device,
        config,
        x,
        packed,
        bias,
        step.bn,
        norm,
        before,
        out,
        num_rows,
        *x.shape[1:3],
        *out.shape[1:3],
        channels,
        out_channels,
        packed.shape[1],
        KERNEL=kernel,
        STRIDE=static.stride,
        PADDING=static.padding,
        CHANNELS_FIRST=channels_first,
        ONE_TAP=not channels_first and channels % config.block_k == 0,
        ACTIVATION=step.activation,
        BN_AFTER_ACTIVATION=step.bn_after_activation,
        ARITHMETIC=triton_support.arithmetic(static.dtype, x.device).constexpr(),
    )


def statistics(tensors: Tensors, static: Static) -> Tensor:
    """`reference.batch_statistics`; what the convolution gives goes through memory."""
    x, *rest = tensors
    assert x is not None
    weight, bias, _, _, in_norm_weight, in_norm_bias, *_ = library.dense(rest)
    assert weight is not None
    grid = (output_size(size, weight.shape[-1], static) for size in x.shape[1:3])
    convolved = x.new_empty((x.shape[0], *grid, weight.shape[0]), dtype=static.dtype)
    embed(readable(x, in_norm_weight, in_norm_bias, static), weight, bias, Step("none"), static, convolved)
    return row_moments(convolved, static.activation if static.bn_after_activation else "none")


def _pack(weight: Tensor, channels_first: bool, dtype: torch.dtype) -> Tensor:
    """The weight as `embed_kernel` reads it, its rows padded with zeros to a length that vector loads like."""
    out_channels, channels, kernel, _ = weight.shape
    length = channels * kernel**2
    stride = triton.cdiv(length, ALIGNMENT) * ALIGNMENT
    if stride == length and weight.dtype == dtype and (channels_first or kernel == 1):
        return weight.flatten(1)
    packed = weight.new_empty((out_channels, stride), dtype=dtype)
    config = triton_support.config("normalize", triton_support.arithmetic(dtype, weight.device), stride)
    triton_support.launch(
        pack_kernel,
        triton.cdiv(out_channels, config.block_m) * triton.cdiv(stride, config.block_k),
        weight.device,
        config,
        weight,
        packed,
        out_channels,
        channels,
        stride,
        TAPS=kernel**2,
        CHANNELS_FIRST=channels_first,
    )
    return packed


def _of_pvt(empty: Empty) -> Outputs:
    """PVTv2's, to its stage 2."""
    rest = [empty(128, 64, 3, 3), *(empty(128) for _ in range(3)), *[None] * 6]
    static = Static(1e-6, None, 2, 1, "none", False, 0.0, False, empty.dtype, empty.dtype)
    return run([empty(8, 56, 56, 64), *rest], static)


SPECS = (Spec(embed_kernel, _of_pvt, products=True), Spec(pack_kernel, _of_pvt))
