"""Triton kernels of local_attention: a softmax inside each window of the map, without partitioning it."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit_kernels.ops import library, triton_support
from fastvit_kernels.ops.local_attention.reference import Static
from fastvit_kernels.ops.operator import Outputs, Tensors
from fastvit_kernels.ops.precision import wide
from fastvit_kernels.ops.primitives import dot, finite_maximum, in_log2, vector
from fastvit_kernels.ops.triton_configs import Config
from fastvit_kernels.ops.triton_heads import norm_of_rows, normalized, store_result
from fastvit_kernels.ops.triton_linear import linear
from fastvit_kernels.ops.triton_moments import empty_moments, group_statistics, merged_statistics
from fastvit_kernels.ops.triton_specs import Empty, Spec

_SMALLEST_DOT = 16
# Pixels of a window whose queries, keys and values are in registers together.
_LARGEST_TILE = 64
_LOG2_E = math.log2(math.e)


@triton.jit
def pixels(index, top, left, height, width, WINDOW: tl.constexpr):
    """Rows of the tokens at these places of a window, and whether they are pixels of the map."""
    y, x = top + index // WINDOW, left + index % WINDOW
    return y * width + x, (index < WINDOW * WINDOW) & (y < height) & (x < width)


@triton.jit
def locate(window, height, width, WINDOW: tl.constexpr):
    """Sample, first row and first column of a window, which go row by row through sample after sample."""
    across, down = tl.cdiv(width, WINDOW), tl.cdiv(height, WINDOW)
    return window // across // down, window // across % down * WINDOW, window % across * WINDOW


@triton.jit
def window_bias(bias_ptr, m, n, WINDOW: tl.constexpr):
    """What one head's table adds to the scores, in units of log2(e)."""
    places = (m < WINDOW * WINDOW)[:, None] & (n < WINDOW * WINDOW)[None, :]
    bias = tl.load(bias_ptr + m[:, None] * (WINDOW * WINDOW) + n[None, :], mask=places, other=0.0)
    return in_log2(bias.to(tl.float32))


@triton.jit
def block_rows(start, pointer, zero_ptr, top, left, height, width, stride, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where BLOCK_N keys or values of a window begin, and which of them are there to be read."""
    n = start + tl.arange(0, BLOCK_N)
    rows, inside = pixels(n, top, left, height, width, WINDOW)
    pointers = pointer + rows.to(tl.int64) * stride
    if zero_ptr is not None:
        pointers = tl.where(inside, pointers, zero_ptr)
        inside = n < WINDOW * WINDOW
    return pointers, inside


@triton.jit
def block_scores(
    q,
    m,
    start,
    k_ptrs,
    inside,
    bias_ptr,
    scale,
    WINDOW: tl.constexpr,
    MASK: tl.constexpr,
    WIDTH: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Scaled and biased scores of BLOCK_N keys, in units of log2(e); minus infinity where there is none."""
    n = start + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    k = tl.load(k_ptrs[None, :] + d[:, None], mask=(d < WIDTH)[:, None] & inside[None, :], other=0.0)
    scores = dot(q, k, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), ARITHMETIC) * scale
    keys = inside if MASK else n < WINDOW * WINDOW
    if bias_ptr is not None:
        scores += window_bias(bias_ptr, m, n, WINDOW)
    return tl.where(keys[None, :], scores, float("-inf"))


@triton.jit(do_not_specialize=["height", "width", "heads"])
def window_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    zero_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    moments_ptr,
    height,
    width,
    heads,
    channels,
    value_channels,
    scale,
    WINDOW: tl.constexpr,
    MASK: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_M queries of one head and window against its keys; `scale` carries a factor log2(e): powers are of 2.

    Without `k_ptr` a row of q goes on with keys and values. `zero_ptr` is laid out like such a row and holds what the
    projection makes of a zero. Programs that share a window are neighbours.
    """
    tiles: tl.constexpr = (WINDOW * WINDOW + BLOCK_M - 1) // BLOCK_M
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % heads
    window = tl.program_id(0) // tiles // heads
    sample, top, left = locate(window, height, width, WINDOW)
    first = sample.to(tl.int64) * height * width
    row_stride = channels
    value_stride = value_channels
    if k_ptr is None:
        row_stride = 3 * channels
        value_stride = 3 * channels
        k_ptr = q_ptr + channels
        v_ptr = q_ptr + 2 * channels
    q_ptr += first * row_stride + head * WIDTH
    k_ptr += first * row_stride + head * WIDTH
    v_ptr += first * value_stride + head * VALUE_WIDTH
    zero_k_ptr = zero_ptr
    zero_v_ptr = zero_ptr
    if zero_ptr is not None:
        zero_k_ptr += channels + head * WIDTH
        zero_v_ptr += 2 * channels + head * VALUE_WIDTH
    if bias_ptr is not None:
        bias_ptr += head * (WINDOW * WINDOW * WINDOW * WINDOW)

    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_V)
    rows, inside = pixels(m, top, left, height, width, WINDOW)
    q_mask = inside[:, None] & (d < WIDTH)[None, :]
    q = tl.load(q_ptr + rows.to(tl.int64)[:, None] * row_stride + d[None, :], mask=q_mask, other=0.0)
    accumulator = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, WINDOW * WINDOW, BLOCK_N):
        k_ptrs, k_inside = block_rows(start, k_ptr, zero_k_ptr, top, left, height, width, row_stride, WINDOW, BLOCK_N)
        scores = block_scores(
            q, m, start, k_ptrs, k_inside, bias_ptr, scale, WINDOW, MASK, WIDTH, ARITHMETIC, BLOCK_M, BLOCK_N, BLOCK_D
        )
        larger = tl.maximum(largest, tl.max(scores, 1))
        shift = finite_maximum(larger)
        rescale = tl.exp2(largest - shift)
        p = tl.exp2(scores - shift[:, None])
        total = total * rescale + tl.sum(p, 1)
        v_ptrs, v_inside = block_rows(start, v_ptr, zero_v_ptr, top, left, height, width, value_stride, WINDOW, BLOCK_N)
        v = tl.load(v_ptrs[:, None] + e[None, :], mask=v_inside[:, None] & (e < VALUE_WIDTH)[None, :], other=0.0)
        accumulator = dot(p, v, accumulator * rescale[:, None], ARITHMETIC)
        largest = larger
    y = accumulator / total[:, None]
    offsets = (first + rows)[:, None] * value_channels + head * VALUE_WIDTH + e[None, :]
    mask = inside[:, None] & (e < VALUE_WIDTH)[None, :]
    store_result(y, out_ptr, residual_ptr, moments_ptr, tl.program_id(0), offsets, mask)


@triton.jit(do_not_specialize=["height", "width", "heads"])
def projected_window_attention_kernel(
    x_ptr,
    norm,
    weight_ptr,
    qkv_bias_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    moments_ptr,
    height,
    width,
    heads,
    in_channels,
    channels,
    scale,
    WINDOW: tl.constexpr,
    MASK: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One head of one window of at most BLOCK_M pixels: norm, projection, attention; nothing of it leaves the chip.

    Programs that share a window are neighbours.
    """
    head = tl.program_id(0) % heads
    sample, top, left = locate(tl.program_id(0) // heads, height, width, WINDOW)
    first = sample.to(tl.int64) * height * width
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    rows, inside = pixels(m, top, left, height, width, WINDOW)
    x_ptr += first * in_channels
    mean, rstd = norm_of_rows(x_ptr, norm, sample, rows, inside, in_channels, BLOCK_M, BLOCK_K)
    row_ptrs = x_ptr + rows.to(tl.int64) * in_channels
    columns = head * WIDTH + d
    d_mask = d < WIDTH
    step = tl.cast(channels, tl.int64) * in_channels
    weights = weight_ptr + head.to(tl.int64) * WIDTH * in_channels + d[None, :] * in_channels
    q = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    k = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    v = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, in_channels, BLOCK_K):
        c = start + tl.arange(0, BLOCK_K)
        # Pixels off the map are zeros behind the norm.
        x = normalized(row_ptrs, inside, norm, mean, rstd, c, c < in_channels, BLOCK_K)
        mask = (c < in_channels)[:, None] & d_mask[None, :]
        q = dot(x, tl.load(weights + c[:, None], mask=mask, other=0.0), q, ARITHMETIC)
        k = dot(x, tl.load(weights + step + c[:, None], mask=mask, other=0.0), k, ARITHMETIC)
        v = dot(x, tl.load(weights + 2 * step + c[:, None], mask=mask, other=0.0), v, ARITHMETIC)
    q += vector(qkv_bias_ptr, columns, d_mask, 0.0, BLOCK_D)[None, :]
    k += vector(qkv_bias_ptr, channels + columns, d_mask, 0.0, BLOCK_D)[None, :]
    v += vector(qkv_bias_ptr, 2 * channels + columns, d_mask, 0.0, BLOCK_D)[None, :]
    scores = dot(q, tl.trans(k.to(ARITHMETIC[0])), tl.zeros((BLOCK_M, BLOCK_M), tl.float32), ARITHMETIC) * scale
    if bias_ptr is not None:
        scores += window_bias(bias_ptr + head * (WINDOW * WINDOW * WINDOW * WINDOW), m, m, WINDOW)
    scores = tl.where((inside if MASK else m < WINDOW * WINDOW)[None, :], scores, float("-inf"))
    p = tl.exp2(scores - finite_maximum(tl.max(scores, 1))[:, None])
    y = dot(p, v, tl.zeros((BLOCK_M, BLOCK_D), tl.float32), ARITHMETIC) / tl.sum(p, 1)[:, None]
    offsets = (first + rows)[:, None] * channels + columns[None, :]
    store_result(y, out_ptr, residual_ptr, moments_ptr, tl.program_id(0), offsets, inside[:, None] & d_mask[None, :])


def run(tensors: Tensors, static: Static) -> Outputs:
    """Norm, projection, attention and the statistics behind it in one launch; the output projection in another.

    A column of the output projection needs all heads of a pixel, while the attention goes by head and window. A window
    that is more than one tile, or whose head is too wide for queries, keys and values in registers, has its projection
    in a launch of its own as well.
    """
    x, k, v, norm_weight, norm_bias, statistics, qkv_weight, qkv_bias, attn_bias, *rest = library.dense(tensors)
    proj_weight, proj_bias, residual = rest
    assert x is not None
    if static.norm == "group" and statistics is None:
        statistics = group_statistics(x)
    norm = norm_weight, norm_bias, statistics, None if static.norm == "none" else static.norm_eps
    # Without a projection residual and statistics belong to the attention.
    added, summed = (residual, static.return_statistics) if proj_weight is None else (None, False)
    if qkv_weight is None:
        out, found = attend(x, k, v, None, attn_bias, added, static, summed)
    elif (config := _projecting_config(x, qkv_weight, static)) is not None:
        out, found = _project_and_attend(x, norm, qkv_weight, qkv_bias, attn_bias, added, static, summed, config)
    else:
        x = linear(
            *(x, qkv_weight, qkv_bias, static.dtype),
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            norm_eps=norm[3],
            norm_statistics=statistics,
        )
        # What the projection makes of an added pixel; None where that is zero.
        zero = None if qkv_bias is None or static.pad != "zero" else qkv_bias.to(x.dtype)
        out, found = attend(x, None, None, zero, attn_bias, added, static, summed)
    if proj_weight is not None:
        out = linear(out, proj_weight, proj_bias, static.dtype, residual=residual)
    if not static.return_statistics:
        return out, out.new_empty(0, dtype=wide(out.dtype))
    return out, group_statistics(out) if found is None else found


def _projecting_config(x: Tensor, qkv_weight: Tensor, static: Static) -> Config | None:
    """The launch configuration with the projection in the attention's kernel; None where it does not fit."""
    if static.window_size**2 > _LARGEST_TILE:
        return None
    width = qkv_weight.shape[0] // (3 * static.num_heads)
    arithmetic = triton_support.arithmetic(static.dtype, x.device)
    # Numbers of twice the size, without tensor cores, take the registers of a head four times as wide.
    place = "projected_window_attention", arithmetic, width * (static.dtype.itemsize // 2) ** 2, width, x.shape[2]
    if not triton_support.fits(*place):
        return None
    return triton_support.config(*place)._replace(block_m=_tile(static))


def _tile(static: Static) -> int:
    """Pixels of a tile that holds a whole window."""
    return max(_SMALLEST_DOT, triton.next_power_of_2(static.window_size**2))


def _result(x: Tensor, channels: int, added: Tensor | None, static: Static) -> Tensor:
    dtype = static.dtype if added is None else torch.promote_types(added.dtype, static.dtype)
    return x.new_empty((*x.shape[:2], channels), dtype=dtype)


def _windows(static: Static) -> int:
    """Of one sample."""
    return triton.cdiv(static.height, static.window_size) * triton.cdiv(static.width, static.window_size)


def _project_and_attend(
    x: Tensor,
    norm: tuple[Tensor | float | None, ...],
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    attn_bias: Tensor | None,
    added: Tensor | None,
    static: Static,
    return_statistics: bool,
    config: Config,
) -> tuple[Tensor, Tensor | None]:
    """As `attend`, of the queries, keys and values that `qkv_weight` makes of normalised rows."""
    channels = qkv_weight.shape[0] // 3
    width = channels // static.num_heads
    out = _result(x, channels, added, static)
    if out.numel() == 0:
        return out, None
    programs = static.num_heads * _windows(static)
    moments = empty_moments(out, programs) if return_statistics else None
    arithmetic = triton_support.arithmetic(static.dtype, x.device)
    triton_support.launch(
        projected_window_attention_kernel,
        programs * len(x),
        x.device,
        config,
        x,
        norm,
        qkv_weight,
        qkv_bias,
        attn_bias,
        added,
        out,
        moments,
        static.height,
        static.width,
        static.num_heads,
        x.shape[2],
        channels,
        static.scale * _LOG2_E,
        WINDOW=static.window_size,
        MASK=static.pad == "mask",
        WIDTH=width,
        BLOCK_D=max(_SMALLEST_DOT, triton.next_power_of_2(width)),
        ARITHMETIC=arithmetic.constexpr(),
    )
    return out, None if moments is None else merged_statistics(moments)


def attend(
    x: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    zero: Tensor | None,
    attn_bias: Tensor | None,
    added: Tensor | None,
    static: Static,
    return_statistics: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The attention of dense queries, keys and values, side by side in x or on their own, plus `added`; its statistics.

    `zero` is the row that pixels off the map have, or None for zeros. An empty result has no statistics.
    """
    channels = x.shape[2]
    if v is None:
        channels //= 3
    value_channels = channels if v is None else v.shape[2]
    heads, window = static.num_heads, static.window_size
    width, value_width = channels // heads, value_channels // heads
    out = _result(x, value_channels, added, static)
    if out.numel() == 0:
        return out, None
    arithmetic = triton_support.arithmetic(static.dtype, x.device)
    config = triton_support.config("window_attention", arithmetic, max(width, value_width), width, value_width)
    # A small window is one tile of its own size.
    config = config._replace(block_m=min(config.block_m, _tile(static)), block_n=min(config.block_n, _tile(static)))
    programs = triton.cdiv(window**2, config.block_m) * heads * _windows(static)
    moments = empty_moments(out, programs) if return_statistics else None
    triton_support.launch(
        window_attention_kernel,
        programs * len(x),
        x.device,
        config,
        x,
        k,
        v,
        zero,
        attn_bias,
        added,
        out,
        moments,
        static.height,
        static.width,
        heads,
        channels,
        value_channels,
        static.scale * _LOG2_E,
        WINDOW=window,
        MASK=static.pad == "mask",
        WIDTH=width,
        VALUE_WIDTH=value_width,
        BLOCK_D=max(_SMALLEST_DOT, triton.next_power_of_2(width)),
        BLOCK_V=max(_SMALLEST_DOT, triton.next_power_of_2(value_width)),
        ARITHMETIC=arithmetic.constexpr(),
        **triton_support.all_registers_of_windows(arithmetic, config, max(width, value_width)),
    )
    return out, None if moments is None else merged_statistics(moments)


def _of_swin(empty: Empty) -> Outputs:
    """Stage 1 of Swin-T, but for its output projection."""
    qkv = [empty(96), empty(96), None, empty(288, 96), empty(288)]
    tensors = [empty(8, 56 * 56, 96), None, None, *qkv, empty(3, 49, 49), None, None, empty(8, 56 * 56, 96)]
    return run(tensors, Static("layer", 1e-5, 56, 56, 7, 3, 32**-0.5, "mask", True, empty.dtype))


def _of_rows(empty: Empty) -> object:
    """Of windows that are more than one tile."""
    static = Static("none", 0.0, 28, 28, 14, 2, 32**-0.5, "mask", False, empty.dtype)
    return attend(empty(8, 784, 192), None, None, None, empty(2, 196, 196), None, static)


SPECS = (
    Spec(window_attention_kernel, _of_rows, products=True),
    Spec(projected_window_attention_kernel, _of_swin, products=True),
)
