"""Gradients of patch_embedding in Triton: the convolution's are products with gathered rows, as it is one itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit_kernels.ops import library, triton_support
from fastvit_kernels.ops.operator import Tensors
from fastvit_kernels.ops.patch_embedding.reference import Static
from fastvit_kernels.ops.patch_embedding.triton_kernels import Source, embed, readable, step_of
from fastvit_kernels.ops.primitives import dot
from fastvit_kernels.ops.triton_norm_gradients import layer_norm_gradient
from fastvit_kernels.ops.triton_specs import Empty, Spec
from fastvit_kernels.ops.triton_steps import Step, through_step
from fastvit_kernels.ops.triton_sums import split_rows, sum_parts

# A part writes as much as it reads in about so many blocks of rows.
_FEWEST_BLOCKS = 4


@triton.jit(do_not_specialize=["num_rows", "part_rows", "height", "width", "out_height", "out_width"])
def filter_gradient_kernel(
    grad_ptr,
    x_ptr,
    parts_ptr,
    num_rows,
    part_rows,
    height,
    width,
    out_height,
    out_width,
    channels,
    out_channels,
    weight_size,
    WINDOW: tl.constexpr,
    CHANNELS_FIRST: tl.constexpr,
    ONE_TAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """What `part_rows` pixels of the result add to BLOCK_M rows and BLOCK_N columns of the weight's gradient.

    Columns are ordered as the rows of `embed_kernel`'s product; with `ONE_TAP` those of a tile are of the same tap. A
    part holds the gradient of the weight and, behind it, that of the bias, which the first tile of every row of tiles
    takes along.
    """
    KERNEL: tl.constexpr = WINDOW[0]
    STRIDE: tl.constexpr = WINDOW[1]
    PADDING: tl.constexpr = WINDOW[2]
    length = channels * (KERNEL * KERNEL)
    column_tiles = tl.cdiv(length, BLOCK_N)
    tiles = tl.cdiv(out_channels, BLOCK_M) * column_tiles
    # Programs that share pixels are neighbours.
    tile = tl.program_id(0) % tiles
    part = tl.program_id(0) // tiles
    m = tile // column_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    m_mask = m < out_channels
    n_mask = n < length
    if CHANNELS_FIRST:
        tap = n % (KERNEL * KERNEL)
        shift = (n // (KERNEL * KERNEL)).to(tl.int64) * height * width + (tap // KERNEL * width + tap % KERNEL)
    else:
        tap = n // channels
        shift = (tap // KERNEL * width + tap % KERNEL).to(tl.int64) * channels + n % channels
    first = part * part_rows
    end = tl.minimum(first + part_rows, num_rows)
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sums = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(first, end, BLOCK_K):
        rows = start + tl.arange(0, BLOCK_K)
        inside = rows < end
        grad_ptrs = grad_ptr + rows.to(tl.int64)[None, :] * out_channels + m[:, None]
        grad = tl.load(grad_ptrs, mask=inside[None, :] & m_mask[:, None], other=0.0)
        top = rows // out_width % out_height * STRIDE - PADDING
        left = rows % out_width * STRIDE - PADDING
        image = (rows // out_width // out_height).to(tl.int64) * height * width * channels
        pixels = image + (top * width + left).to(tl.int64) * (1 if CHANNELS_FIRST else channels)
        if ONE_TAP:
            y = top + tile % column_tiles * BLOCK_N // channels // KERNEL
            x = left + tile % column_tiles * BLOCK_N // channels % KERNEL
            there = (inside & (y >= 0) & (y < height) & (x >= 0) & (x < width))[:, None]
        else:
            y = top[:, None] + (tap // KERNEL)[None, :]
            x = left[:, None] + (tap % KERNEL)[None, :]
            there = inside[:, None] & n_mask[None, :] & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        gathered = tl.load(x_ptr + pixels[:, None] + shift[None, :], mask=there, other=0.0)
        accumulator = dot(grad, gathered, accumulator, ARITHMETIC)
        if HAS_BIAS and tile % column_tiles == 0:
            sums += tl.sum(grad.to(tl.float32), 1)
    parts_ptr += part.to(tl.int64) * (weight_size + (out_channels if HAS_BIAS else 0))
    offsets = m.to(tl.int64)[:, None] * length + n[None, :]
    tl.store(parts_ptr + offsets, accumulator, mask=m_mask[:, None] & n_mask[None, :])
    if HAS_BIAS and tile % column_tiles == 0:
        tl.store(parts_ptr + weight_size + m, sums, mask=m_mask)


@triton.jit(do_not_specialize=["num_rows", "height", "width", "out_height", "out_width"])
def pixel_gradient_kernel(
    grad_ptr,
    weight_ptr,
    out_ptr,
    num_rows,
    height,
    width,
    out_height,
    out_width,
    channels,
    out_channels,
    WINDOW: tl.constexpr,
    EVEN_K: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The gradients of BLOCK_M pixels of the convolution's input and BLOCK_N of its channels.

    The pixels of a tile lie multiples of the stride apart: the same taps of the filter reach all of them. `num_rows`
    counts those of all samples. The weight comes as `[taps, C_out, C]`.
    """
    KERNEL: tl.constexpr = WINDOW[0]
    STRIDE: tl.constexpr = WINDOW[1]
    PADDING: tl.constexpr = WINDOW[2]
    column_tiles = tl.cdiv(channels, BLOCK_N)
    columns = tl.program_id(0) % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = columns < channels
    # Programs that share pixels of the result are neighbours.
    program = tl.program_id(0) // column_tiles
    places_x = tl.minimum(width, STRIDE)
    places_y = tl.minimum(height, STRIDE)
    place_x = program % places_x
    place_y = program // places_x % places_y
    rows = program // places_x // places_y * BLOCK_M + tl.arange(0, BLOCK_M)
    across = tl.cdiv(width, STRIDE)
    down = tl.cdiv(height, STRIDE)
    line = rows // across % down
    column = rows % across
    sample = (rows // across // down).to(tl.int64)
    row_mask = (rows < num_rows) & (line * STRIDE + place_y < height) & (column * STRIDE + place_x < width)
    tap_y = (place_y + PADDING) % STRIDE
    tap_x = (place_x + PADDING) % STRIDE
    last_y = line + (place_y + PADDING) // STRIDE
    last_x = column + (place_x + PADDING) // STRIDE
    taps_x = (KERNEL - tap_x + STRIDE - 1) // STRIDE
    taps = (KERNEL - tap_y + STRIDE - 1) // STRIDE * taps_x
    blocks = tl.cdiv(out_channels, BLOCK_K)
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for index in range(0, taps * blocks):
        number = index // blocks
        k = index % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
        y = last_y - number // taps_x
        x = last_x - number % taps_x
        there = row_mask & (y >= 0) & (y < out_height) & (x >= 0) & (x < out_width)
        tap = (tap_y + number // taps_x * STRIDE) * KERNEL + tap_x + number % taps_x * STRIDE
        grad_ptrs = grad_ptr + ((sample * out_height + y) * out_width + x)[:, None] * out_channels + k[None, :]
        weight_ptrs = weight_ptr + (tap.to(tl.int64) * out_channels + k)[:, None] * channels + columns[None, :]
        if EVEN_K:
            grad = tl.load(grad_ptrs, mask=there[:, None], other=0.0)
            weight = tl.load(weight_ptrs, mask=column_mask[None, :], other=0.0)
        else:
            k_mask = k < out_channels
            grad = tl.load(grad_ptrs, mask=there[:, None] & k_mask[None, :], other=0.0)
            weight = tl.load(weight_ptrs, mask=k_mask[:, None] & column_mask[None, :], other=0.0)
        accumulator = dot(grad, weight, accumulator, ARITHMETIC)
    pixels = (sample * height + line * STRIDE + place_y) * width + column * STRIDE + place_x
    mask = row_mask[:, None] & column_mask[None, :]
    tl.store(out_ptr + pixels[:, None] * channels + columns[None, :], accumulator, mask=mask)


def run(grads: Sequence[Tensor], tensors: Tensors, needs: Sequence[bool], static: Static) -> list[Tensor]:
    """The convolution again where a norm or an activation behind it asks for it; then backwards, as far as needed."""
    x, *rest = tensors
    assert x is not None
    weight, bias, norm_weight, norm_bias, in_norm_weight, in_norm_bias, *bn = library.dense(rest)
    assert weight is not None
    grad = grads[0].contiguous()
    found: list[Tensor | None] = [None] * len(tensors)
    if grad.numel() == 0:
        return [torch.zeros_like(t) for t, needed in zip(tensors, needs, strict=True) if needed and t is not None]
    source, step = readable(x, in_norm_weight, in_norm_bias, static), step_of(bn, static)
    behind_norm = any(needs[:3]) or any(needs[5:])
    if static.norm_eps is not None or not step.is_nothing:
        before = stepped = torch.empty_like(grad, dtype=static.dtype)
        if static.norm_eps is None or step.is_nothing:
            embed(source, weight, bias, Step("none"), static, before)
        else:
            stepped = torch.empty_like(before)
            embed(source, weight, bias, step, static, stepped, before=before)
    if static.norm_eps is not None:
        affine = norm_weight, norm_bias, static.norm_eps, (behind_norm, *needs[3:5])
        through, *found[3:5] = layer_norm_gradient(grad, stepped, *affine)
        grad = grad if through is None else through
    if behind_norm:
        if not step.is_nothing:
            grad, found[7:11] = through_step(grad, before, step, needs[7:11])
        found[1:3] = _weight_gradient(grad, source, weight, bias, static, needs[1:3])
        if needs[0] or needs[5] or needs[6]:
            out = grad.new_empty(x.shape, dtype=x.dtype if static.in_norm_eps is None else static.dtype)
            _input_gradient(grad, weight, static, out)
            found[0] = out
            if static.in_norm_eps is not None:
                affine = in_norm_weight, in_norm_bias, static.in_norm_eps, (needs[0], *needs[5:7])
                found[0], *found[5:7] = layer_norm_gradient(out, x.contiguous(), *affine)
    return [g for g, needed in zip(found, needs, strict=True) if needed and g is not None]


def _weight_gradient(
    grad: Tensor,
    source: Source,
    weight: Tensor,
    bias: Tensor | None,
    static: Static,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of weight and bias, each None where it is not needed, from that of the convolution's result."""
    if bias is None or not needs[1]:
        bias = None
    if not needs[0]:
        return None, None if bias is None else grad.flatten(0, 2).sum(0, dtype=torch.float32).to(bias.dtype)
    x, channels_first = source
    out_channels, channels, kernel, _ = weight.shape
    length = channels * kernel**2
    num_rows = grad.numel() // out_channels
    arithmetic = triton_support.arithmetic(static.dtype, grad.device)
    place = "patch_weight_gradient", arithmetic, out_channels, 0 if channels_first else channels
    config = triton_support.config(*place)
    tiles = config.tiles(out_channels, length)
    num_parts, part_rows = split_rows(num_rows, config.block_k, tiles, _FEWEST_BLOCKS)
    size = weight.numel() + (0 if bias is None else out_channels)
    parts = grad.new_empty((num_parts, size), dtype=torch.float32)
    triton_support.launch(
        filter_gradient_kernel,
        tiles * num_parts,
        grad.device,
        config,
        grad,
        x,
        parts,
        num_rows,
        part_rows,
        *x.shape[1:3],
        *grad.shape[1:3],
        channels,
        out_channels,
        weight.numel(),
        WINDOW=(kernel, static.stride, static.padding),
        CHANNELS_FIRST=channels_first,
        ONE_TAP=not channels_first and channels % config.block_n == 0,
        HAS_BIAS=bias is not None,
        ARITHMETIC=arithmetic.constexpr(),
        **triton_support.all_registers(config, *place),
    )
    found = sum_parts(parts, weight, bias)
    filter = found[0]
    if not channels_first and kernel > 1:
        filter = filter.view(out_channels, kernel, kernel, channels).permute(0, 3, 1, 2).contiguous()
    return filter, found[1] if bias is not None else None


def _input_gradient(grad: Tensor, weight: Tensor, static: Static, out: Tensor) -> None:
    """Write the gradient of the convolution's input `[B, H, W, C]`."""
    out_channels, channels, kernel, _ = weight.shape
    batch, height, width, _ = out.shape
    stride = static.stride
    num_rows = batch * triton.cdiv(height, stride) * triton.cdiv(width, stride)
    arithmetic = triton_support.arithmetic(static.dtype, grad.device)
    place = "patch_input_gradient", arithmetic, channels, out_channels
    config = triton_support.config(*place)
    triton_support.launch(
        pixel_gradient_kernel,
        triton.cdiv(num_rows, config.block_m)
        * min(height, stride)
        * min(width, stride)
        * triton.cdiv(channels, config.block_n),
        grad.device,
        config,
        grad,
        weight.to(static.dtype).permute(2, 3, 0, 1).contiguous(),
        out,
        num_rows,
        height,
        width,
        *grad.shape[1:3],
        channels,
        out_channels,
        WINDOW=(kernel, stride, static.padding),
        EVEN_K=out_channels % config.block_k == 0,
        ARITHMETIC=arithmetic.constexpr(),
        **triton_support.all_registers(config, *place),
    )


def _static(empty: Empty) -> Static:
    return Static(None, None, 2, 1, "none", False, 0.0, False, empty.dtype, empty.dtype)


SPECS = (
    Spec(
        filter_gradient_kernel,
        lambda empty: _weight_gradient(
            *(empty(8, 28, 28, 128), Source(empty(8, 56, 56, 64), False), empty(128, 64, 3, 3), empty(128)),
            *(_static(empty), (True, True)),
        ),
        products=True,
    ),
    Spec(
        pixel_gradient_kernel,
        lambda empty: _input_gradient(
            *(empty(8, 28, 28, 128), empty(128, 64, 3, 3), _static(empty), empty(8, 56, 56, 64))
        ),
        products=True,
    ),
)
