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
from fastvit_kernels.ops.primitives import dot, finite_maximum, in_log2
from fastvit_kernels.ops.triton_linear import linear
from fastvit_kernels.ops.triton_moments import group_statistics

_SMALLEST_DOT = 16
_LOG2_E = math.log2(math.e)


@triton.jit
def pixels(index, top, left, height, width, WINDOW: tl.constexpr):
    """Rows of the tokens at these places of a window, and whether they are pixels of the map."""
    y, x = top + index // WINDOW, left + index % WINDOW
    return y * width + x, (index < WINDOW * WINDOW) & (y < height) & (x < width)


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
        places = (m < WINDOW * WINDOW)[:, None] & (n < WINDOW * WINDOW)[None, :]
        bias = tl.load(bias_ptr + m[:, None] * (WINDOW * WINDOW) + n[None, :], mask=places, other=0.0)
        scores += in_log2(bias.to(tl.float32))
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
    across, down = tl.cdiv(width, WINDOW), tl.cdiv(height, WINDOW)
    left = window % across * WINDOW
    top = window // across % down * WINDOW
    first = (window // across // down).to(tl.int64) * height * width
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
    if residual_ptr is not None:
        y += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, y, mask=mask)


def run(tensors: Tensors, static: Static) -> Outputs:
    """The norm with the projection of queries, keys and values; the attention; the output projection; the statistics.

    Every product's tiles differ: attention goes by head and window, while a projection needs all heads of a row.
    """
    x, k, v, norm_weight, norm_bias, statistics, qkv_weight, qkv_bias, attn_bias, *rest = library.dense(tensors)
    proj_weight, proj_bias, residual = rest
    assert x is not None
    if qkv_weight is not None:
        if static.norm == "group" and statistics is None:
            statistics = group_statistics(x)
        x = linear(
            x,
            qkv_weight,
            qkv_bias,
            static.dtype,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            norm_eps=None if static.norm == "none" else static.norm_eps,
            norm_statistics=statistics,
        )
    # What the projection makes of an added pixel; None where that is zero.
    zero = None if qkv_bias is None or static.pad != "zero" else qkv_bias.to(x.dtype)
    # Without a projection the residual is added here.
    out = attend(x, k, v, zero, attn_bias, residual if proj_weight is None else None, static)
    if proj_weight is not None:
        out = linear(out, proj_weight, proj_bias, static.dtype, residual=residual)
    return out, group_statistics(out) if static.return_statistics else out.new_empty(0, dtype=wide(out.dtype))


def attend(
    x: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    zero: Tensor | None,
    attn_bias: Tensor | None,
    added: Tensor | None,
    static: Static,
) -> Tensor:
    """The attention of dense queries, keys and values, side by side in x or on their own, plus `added`.

    `zero` is the row that pixels off the map have, or None for zeros.
    """
    batch, tokens, channels = x.shape
    if v is None:
        channels //= 3
    value_channels = channels if v is None else v.shape[2]
    heads, window = static.num_heads, static.window_size
    width, value_width = channels // heads, value_channels // heads
    dtype = static.dtype if added is None else torch.promote_types(added.dtype, static.dtype)
    out = x.new_empty((batch, tokens, value_channels), dtype=dtype)
    if out.numel() > 0:
        arithmetic = triton_support.arithmetic(static.dtype, x.device)
        config = triton_support.config("window_attention", arithmetic, max(width, value_width), width, value_width)
        # A small window is one tile of its own size.
        smallest = max(_SMALLEST_DOT, triton.next_power_of_2(window**2))
        config = config._replace(block_m=min(config.block_m, smallest), block_n=min(config.block_n, smallest))
        windows = triton.cdiv(static.height, window) * triton.cdiv(static.width, window)
        triton_support.launch(
            window_attention_kernel,
            triton.cdiv(window**2, config.block_m) * heads * windows * batch,
            x.device,
            config,
            x,
            k,
            v,
            zero,
            attn_bias,
            added,
            out,
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
        )
    return out
