"""Triton kernels of global_attention: a softmax that never stores its scores, then the output projection."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit_kernels.ops import library, triton_support
from fastvit_kernels.ops.global_attention.reference import Static
from fastvit_kernels.ops.normalization import normalize_by
from fastvit_kernels.ops.operator import Outputs, Tensors
from fastvit_kernels.ops.precision import wide
from fastvit_kernels.ops.primitives import dot, finite_maximum, in_log2
from fastvit_kernels.ops.triton_linear import linear
from fastvit_kernels.ops.triton_moments import group_statistics

_SMALLEST_DOT = 16


@triton.jit
def block_scores(
    q,
    k_ptr,
    start,
    keys,
    channels,
    scale,
    bias_rows,
    m_mask,
    WIDTH: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Scaled scores of BLOCK_N keys, with a bias where there is one; minus infinity past the last key."""
    n = start + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    mask = (d < WIDTH)[:, None] & (n < keys)[None, :]
    k = tl.load(k_ptr + n.to(tl.int64)[None, :] * channels + d[:, None], mask=mask, other=0.0)
    scores = dot(q, k, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), ARITHMETIC) * scale
    if bias_rows is not None:
        bias = tl.load(bias_rows[:, None] + n[None, :], mask=m_mask[:, None] & (n < keys)[None, :], other=0.0)
        scores += in_log2(bias.to(tl.float32))
    return tl.where((n < keys)[None, :], scores, float("-inf"))


@triton.jit
def block_values(v_ptr, start, keys, channels, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Values of BLOCK_N keys; zeros past the last key."""
    n = start + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    mask = (n < keys)[:, None] & (d < WIDTH)[None, :]
    return tl.load(v_ptr + n.to(tl.int64)[:, None] * channels + d[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["queries", "keys", "heads"])
def attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    queries,
    keys,
    heads,
    channels,
    value_channels,
    scale,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_M queries of one head against all keys; `scale` carries a factor log2(e): exponentials are powers of 2.

    A head is a slice of the channels and is read where it lies. With `ONE_BLOCK` a block holds all keys and one pass
    suffices; otherwise the running maximum, sum and output are rescaled from block to block.
    """
    tiles = tl.cdiv(queries, BLOCK_M)
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % heads
    image = (tl.program_id(0) // tiles // heads).to(tl.int64)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    m_mask = m < queries
    rows = (image * queries + m)[:, None]
    d = tl.arange(0, BLOCK_D)
    q_mask = m_mask[:, None] & (d < WIDTH)[None, :]
    q = tl.load(q_ptr + rows * channels + head * WIDTH + d[None, :], mask=q_mask, other=0.0)
    k_ptr += image * keys * channels + head * WIDTH
    v_ptr += image * keys * value_channels + head * VALUE_WIDTH
    accumulator = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    bias_rows = None
    if bias_ptr is not None:
        bias_rows = bias_ptr + (head * queries + m).to(tl.int64) * keys
    if ONE_BLOCK:
        scores = block_scores(
            q, k_ptr, 0, keys, channels, scale, bias_rows, m_mask, WIDTH, ARITHMETIC, BLOCK_M, BLOCK_N, BLOCK_D
        )
        p = tl.exp2(scores - tl.max(scores, 1)[:, None])
        total = tl.sum(p, 1)
        v = block_values(v_ptr, 0, keys, value_channels, VALUE_WIDTH, BLOCK_N, BLOCK_V)
        accumulator = dot(p, v, accumulator, ARITHMETIC)
    else:
        largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(0, keys, BLOCK_N):
            scores = block_scores(
                q, k_ptr, start, keys, channels, scale, bias_rows, m_mask, WIDTH, ARITHMETIC, BLOCK_M, BLOCK_N, BLOCK_D
            )
            larger = tl.maximum(largest, tl.max(scores, 1))
            shift = finite_maximum(larger)
            rescale = tl.exp2(largest - shift)
            p = tl.exp2(scores - shift[:, None])
            total = total * rescale + tl.sum(p, 1)
            v = block_values(v_ptr, start, keys, value_channels, VALUE_WIDTH, BLOCK_N, BLOCK_V)
            accumulator = dot(p, v, accumulator * rescale[:, None], ARITHMETIC)
            largest = larger
    y = accumulator / total[:, None]
    e = tl.arange(0, BLOCK_V)
    offsets = rows * value_channels + head * VALUE_WIDTH + e[None, :]
    mask = m_mask[:, None] & (e < VALUE_WIDTH)[None, :]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, y, mask=mask)


def run(tensors: Tensors, static: Static) -> Outputs:
    """The norm with the projection of the queries; the attention; the output projection; the statistics.

    They stay apart because their tiles differ: attention goes head by head, while a column of a projection needs all
    heads, and the accumulators of all columns fit the registers in models of one or two heads only.
    """
    q, k, v, *weights, statistics, residual = tensors
    assert q is not None and k is not None
    if v is None:
        k, v = k.chunk(2, dim=-1)
    q, k, v, *weights, statistics, residual = library.dense([q, k, v, *weights, statistics, residual])
    proj_weight, proj_bias, norm_weight, norm_bias, query_weight, query_bias, attn_bias = weights
    assert q is not None and k is not None and v is not None
    if static.norm == "group" and statistics is None:
        statistics = group_statistics(q)
    rows = None
    if static.add_query_input or (static.norm != "none" and query_weight is None):
        rows = q = normalize_by(
            static.norm, q, statistics, norm_weight, norm_bias, static.norm_eps, static.dtype
        ).contiguous()
    if query_weight is not None:
        q = linear(
            q,
            query_weight,
            query_bias,
            static.dtype,
            norm_weight=norm_weight if rows is None else None,
            norm_bias=norm_bias if rows is None else None,
            norm_eps=None if static.norm == "none" or rows is not None else static.norm_eps,
            norm_statistics=statistics if rows is None else None,
        )
    # Added by the attention itself: the queries' rows, or without a projection behind it the residual.
    added = rows if static.add_query_input else residual if proj_weight is None else None
    out = attend(q, k, v, attn_bias, added, static)
    if proj_weight is not None:
        out = linear(out, proj_weight, proj_bias, static.dtype, residual=residual)
    elif static.add_query_input and residual is not None:
        out = residual + out
    return out, group_statistics(out) if static.return_statistics else out.new_empty(0, dtype=wide(out.dtype))


def attend(q: Tensor, k: Tensor, v: Tensor, attn_bias: Tensor | None, added: Tensor | None, static: Static) -> Tensor:
    """The attention of dense queries, keys and values, plus `added`."""
    (batch, queries, channels), (_, keys, value_channels) = q.shape, v.shape
    heads = static.num_heads
    width, value_width = channels // heads, value_channels // heads
    dtype = static.dtype if added is None else torch.promote_types(added.dtype, static.dtype)
    out = q.new_empty((batch, queries, value_channels), dtype=dtype)
    if out.numel() > 0:
        arithmetic = triton_support.arithmetic(static.dtype, q.device)
        # In fp32 a tile of biases beside the scores takes the registers of a head twice as wide.
        crowded = attn_bias is not None and static.dtype is torch.float32
        widest = max(width, value_width) * (2 if crowded else 1)
        config = triton_support.config("attention", arithmetic, widest, width, value_width)
        triton_support.launch(
            attention_kernel,
            triton.cdiv(queries, config.block_m) * heads * batch,
            q.device,
            config,
            q,
            k,
            v,
            attn_bias,
            added,
            out,
            queries,
            keys,
            heads,
            channels,
            value_channels,
            static.scale * math.log2(math.e),
            WIDTH=width,
            VALUE_WIDTH=value_width,
            BLOCK_D=max(_SMALLEST_DOT, triton.next_power_of_2(width)),
            BLOCK_V=max(_SMALLEST_DOT, triton.next_power_of_2(value_width)),
            ONE_BLOCK=keys <= config.block_n,
            ARITHMETIC=arithmetic.constexpr(),
        )
    return out
