"""Triton kernels of global_attention: a softmax that never stores its scores, and all that stands around it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit_kernels.ops import library, triton_support
from fastvit_kernels.ops.global_attention.reference import Static
from fastvit_kernels.ops.operator import Outputs, Tensors
from fastvit_kernels.ops.precision import wide
from fastvit_kernels.ops.primitives import dot, finite_maximum, in_log2, vector
from fastvit_kernels.ops.triton_configs import Config
from fastvit_kernels.ops.triton_heads import norm_of_rows, normalized, store_result
from fastvit_kernels.ops.triton_linear import linear
from fastvit_kernels.ops.triton_moments import empty_moments, group_statistics, merged_statistics
from fastvit_kernels.ops.triton_specs import Empty, Spec

_SMALLEST_DOT = 16


@triton.jit
def head_queries(
    row_ptrs,
    m_mask,
    norm,
    mean,
    rstd,
    query,
    head,
    in_channels,
    WIDTH: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The queries of one head: a slice of the normalised rows, or what the head's slice of a weight makes of them."""
    weight_ptr, bias_ptr = query
    d = tl.arange(0, BLOCK_D)
    columns = head * WIDTH + d
    if weight_ptr is None:
        q = normalized(row_ptrs, m_mask, norm, mean, rstd, columns, d < WIDTH, BLOCK_D)
    else:
        q = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        weight_columns = weight_ptr + tl.cast(head, tl.int64) * WIDTH * in_channels + d[None, :] * in_channels
        for start in range(0, in_channels, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            mask = (k < in_channels)[:, None] & (d < WIDTH)[None, :]
            weight = tl.load(weight_columns + k[:, None], mask=mask, other=0.0)
            x = normalized(row_ptrs, m_mask, norm, mean, rstd, k, k < in_channels, BLOCK_K)
            q = dot(x, weight, q, ARITHMETIC)
        q += vector(bias_ptr, columns, d < WIDTH, 0.0, BLOCK_D)[None, :]
    return q.to(ARITHMETIC[0])


@triton.jit
def block_scores(
    q,
    k_ptr,
    start,
    keys,
    key_stride,
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
    k = tl.load(k_ptr + n.to(tl.int64)[None, :] * key_stride + d[:, None], mask=mask, other=0.0)
    scores = dot(q, k, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), ARITHMETIC) * scale
    if bias_rows is not None:
        bias = tl.load(bias_rows[:, None] + n[None, :], mask=m_mask[:, None] & (n < keys)[None, :], other=0.0)
        scores += in_log2(bias.to(tl.float32))
    return tl.where((n < keys)[None, :], scores, float("-inf"))


@triton.jit
def block_values(v_ptr, start, keys, value_stride, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Values of BLOCK_N keys; zeros past the last key."""
    n = start + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    mask = (n < keys)[:, None] & (d < WIDTH)[None, :]
    return tl.load(v_ptr + n.to(tl.int64)[:, None] * value_stride + d[None, :], mask=mask, other=0.0)


@triton.jit
def attend_head(
    q,
    k_ptr,
    v_ptr,
    bias_rows,
    m_mask,
    keys,
    key_stride,
    value_stride,
    scale,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_M queries of one head against all its keys; `scale` carries a factor log2(e): powers are of 2.

    With `ONE_BLOCK` a block holds all keys and one pass suffices; otherwise the running maximum, sum and output are
    rescaled from block to block. Few keys are the rule (49 in most published models), and one pass spares them the
    rescaling: it is worth a second variant of the kernel, of the same tiles.
    """
    accumulator = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    if ONE_BLOCK:
        scores = block_scores(
            q,
            k_ptr,
            0,
            keys,
            key_stride,
            scale,
            bias_rows,
            m_mask,
            *(WIDTH, ARITHMETIC, BLOCK_M, BLOCK_N, BLOCK_D),
        )
        p = tl.exp2(scores - tl.max(scores, 1)[:, None])
        total = tl.sum(p, 1)
        v = block_values(v_ptr, 0, keys, value_stride, VALUE_WIDTH, BLOCK_N, BLOCK_V)
        accumulator = dot(p, v, accumulator, ARITHMETIC)
    else:
        largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(0, keys, BLOCK_N):
            scores = block_scores(
                q,
                k_ptr,
                start,
                keys,
                key_stride,
                scale,
                bias_rows,
                m_mask,
                *(WIDTH, ARITHMETIC, BLOCK_M, BLOCK_N, BLOCK_D),
            )
            larger = tl.maximum(largest, tl.max(scores, 1))
            shift = finite_maximum(larger)
            rescale = tl.exp2(largest - shift)
            p = tl.exp2(scores - shift[:, None])
            total = total * rescale + tl.sum(p, 1)
            v = block_values(v_ptr, start, keys, value_stride, VALUE_WIDTH, BLOCK_N, BLOCK_V)
            accumulator = dot(p, v, accumulator * rescale[:, None], ARITHMETIC)
            largest = larger
    return accumulator / total[:, None]


@triton.jit
def sample_head(
    head,
    image,
    m,
    m_mask,
    q_ptr,
    norm,
    mean,
    rstd,
    query,
    k_ptr,
    v_ptr,
    bias_ptr,
    queries,
    keys,
    in_channels,
    key_stride,
    value_stride,
    scale,
    ADD_ROWS: tl.constexpr,
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
    """From BLOCK_M rows of a sample to one head's result; a head is a slice of the channels, read where it lies.

    With `ADD_ROWS` the normalised rows are added.
    """
    row_ptrs = q_ptr + (image * queries + m) * in_channels
    q = head_queries(
        *(row_ptrs, m_mask, norm, mean, rstd, query, head, in_channels),
        *(WIDTH, ARITHMETIC, BLOCK_M, BLOCK_D, BLOCK_K),
    )
    k_ptr += image * keys * key_stride + head * WIDTH
    v_ptr += image * keys * value_stride + head * VALUE_WIDTH
    bias_rows = None
    if bias_ptr is not None:
        bias_rows = bias_ptr + (head * queries + m).to(tl.int64) * keys
    # Not in a tuple, where Triton takes no None that has a name.
    y = attend_head(
        q,
        k_ptr,
        v_ptr,
        bias_rows,
        m_mask,
        *(keys, key_stride, value_stride, scale),
        *(WIDTH, VALUE_WIDTH, BLOCK_D, BLOCK_V, ONE_BLOCK, ARITHMETIC, BLOCK_M, BLOCK_N),
    )
    if ADD_ROWS:
        e = tl.arange(0, BLOCK_V)
        rows = normalized(row_ptrs, m_mask, norm, mean, rstd, head * VALUE_WIDTH + e, e < VALUE_WIDTH, BLOCK_V)
        y += rows.to(tl.float32)
    return y


@triton.jit(do_not_specialize=["queries", "keys", "heads"])
def attention_kernel(
    q_ptr,
    norm,
    query,
    k_ptr,
    v_ptr,
    queries,
    keys,
    heads,
    in_channels,
    value_channels,
    key_stride,
    value_stride,
    scale,
    bias_ptr,
    residual_ptr,
    out_ptr,
    moments_ptr,
    ADD_ROWS: tl.constexpr,
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
    """BLOCK_M queries of one head against all keys; `scale` carries a factor log2(e): exponentials are powers of 2."""
    tiles = tl.cdiv(queries, BLOCK_M)
    head = tl.program_id(0) // tiles % heads
    image = (tl.program_id(0) // tiles // heads).to(tl.int64)
    m = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    m_mask = m < queries
    sample_ptr = q_ptr + image * queries * in_channels
    mean, rstd = norm_of_rows(sample_ptr, norm, image, m, m_mask, in_channels, BLOCK_M, BLOCK_K)
    y = sample_head(
        *(head, image, m, m_mask, q_ptr, norm, mean, rstd, query, k_ptr, v_ptr, bias_ptr),
        *(queries, keys, in_channels, key_stride, value_stride, scale, ADD_ROWS, WIDTH, VALUE_WIDTH),
        *(BLOCK_D, BLOCK_V, ONE_BLOCK, ARITHMETIC, BLOCK_M, BLOCK_N, BLOCK_K),
    )
    e = tl.arange(0, BLOCK_V)
    offsets = (image * queries + m)[:, None] * value_channels + head * VALUE_WIDTH + e[None, :]
    mask = m_mask[:, None] & (e < VALUE_WIDTH)[None, :]
    store_result(y, out_ptr, residual_ptr, moments_ptr, tl.program_id(0), offsets, mask)


@triton.jit(do_not_specialize=["queries", "keys", "heads"])
def attention_projection_kernel(
    q_ptr,
    norm,
    query,
    k_ptr,
    v_ptr,
    queries,
    keys,
    heads,
    in_channels,
    value_channels,
    key_stride,
    value_stride,
    scale,
    proj,
    out_channels,
    residual_ptr,
    out_ptr,
    moments_ptr,
    ADD_ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """As `attention_kernel`, head after head, with the output projection behind them; a block holds all keys."""
    proj_weight_ptr, proj_bias_ptr = proj
    tiles = tl.cdiv(queries, BLOCK_M)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    m = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    m_mask = m < queries
    sample_ptr = q_ptr + image * queries * in_channels
    mean, rstd = norm_of_rows(sample_ptr, norm, image, m, m_mask, in_channels, BLOCK_M, BLOCK_K)
    e = tl.arange(0, BLOCK_V)
    columns = tl.arange(0, BLOCK_OUT)
    column_mask = columns < out_channels
    result = tl.zeros((BLOCK_M, BLOCK_OUT), tl.float32)
    for head in range(0, heads):
        y = sample_head(
            *(head, image, m, m_mask, q_ptr, norm, mean, rstd, query, k_ptr, v_ptr, None),
            *(queries, keys, in_channels, key_stride, value_stride, scale, ADD_ROWS, WIDTH, VALUE_WIDTH),
            *(BLOCK_D, BLOCK_V, True, ARITHMETIC, BLOCK_M, BLOCK_N, BLOCK_K),
        )
        weight_ptrs = proj_weight_ptr + head * VALUE_WIDTH + columns[None, :] * value_channels + e[:, None]
        weight = tl.load(weight_ptrs, mask=(e < VALUE_WIDTH)[:, None] & column_mask[None, :], other=0.0)
        result = dot(y, weight, result, ARITHMETIC)
    result += vector(proj_bias_ptr, columns, column_mask, 0.0, BLOCK_OUT)[None, :]
    offsets = (image * queries + m)[:, None] * out_channels + columns[None, :]
    mask = m_mask[:, None] & column_mask[None, :]
    store_result(result, out_ptr, residual_ptr, moments_ptr, tl.program_id(0), offsets, mask)


class Front(NamedTuple):
    """What stands in front of the attention: all of it optional.

    Attributes:
        norm: weight, bias, statistics and epsilon, as `norm_of_rows` takes them.
        query: weight and bias of the projection of the queries.
        add_rows: whether the normalised rows are added to the attention's result.
    """

    norm: tuple[Tensor | float | None, ...] = (None, None, None, None)
    query: tuple[Tensor | None, Tensor | None] = (None, None)
    add_rows: bool = False


_NOTHING = Front()


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_bias: Tensor | None,
    static: Static,
    front: Front = _NOTHING,
    residual: Tensor | None = None,
    return_statistics: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`residual` plus the attention of dense rows q to k and v, which may be slices of dense rows; its statistics.

    They are None where they are not asked for, and of an empty result.
    """
    heads, keys, value_channels = static.num_heads, *v.shape[1:]
    out = _result(q, value_channels, residual, static)
    if out.numel() == 0:
        return out, None
    width, value_width = k.shape[2] // heads, value_channels // heads
    arithmetic = triton_support.arithmetic(static.dtype, q.device)
    # In fp32 a tile of biases beside the scores takes the registers of a head twice as wide.
    crowded = attn_bias is not None and static.dtype is torch.float32
    widest = max(width, value_width) * (2 if crowded else 1)
    place = "attention", arithmetic, widest, width, value_width, q.shape[2]
    config = triton_support.config(*place)
    programs = triton.cdiv(q.shape[1], config.block_m) * heads
    moments = empty_moments(out, programs) if return_statistics else None
    more = attn_bias, residual, out, moments
    options = triton_support.all_registers(config, *place)
    one_block = keys <= config.block_n
    _launch(attention_kernel, programs, config, q, k, v, front, static, more, ONE_BLOCK=one_block, **options)
    return out, None if moments is None else merged_statistics(moments)


def _attend_and_project(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    static: Static,
    front: Front,
    proj: tuple[Tensor, Tensor | None],
    residual: Tensor | None,
    config: Config,
) -> tuple[Tensor, Tensor | None]:
    """As `attend`, with weight and bias of the output projection behind it."""
    out_channels = proj[0].shape[0]
    out = _result(q, out_channels, residual, static)
    if out.numel() == 0:
        return out, None
    programs = triton.cdiv(q.shape[1], config.block_m)
    moments = empty_moments(out, programs) if static.return_statistics else None
    more = proj, out_channels, residual, out, moments
    block_out = max(_SMALLEST_DOT, triton.next_power_of_2(out_channels))
    _launch(attention_projection_kernel, programs, config, q, k, v, front, static, more, BLOCK_OUT=block_out)
    return out, None if moments is None else merged_statistics(moments)


def _result(q: Tensor, channels: int, residual: Tensor | None, static: Static) -> Tensor:
    dtype = static.dtype if residual is None else torch.promote_types(residual.dtype, static.dtype)
    return q.new_empty((*q.shape[:2], channels), dtype=dtype)


def _launch(
    kernel: Any,
    programs: int,
    config: Config,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    front: Front,
    static: Static,
    more: tuple[Any, ...],
    **constexprs: int,
) -> None:
    """So many programs for each sample; `more` are the kernel's last arguments, which only one of them has."""
    (batch, queries, in_channels), heads = q.shape, static.num_heads
    width, value_width = k.shape[2] // heads, v.shape[2] // heads
    triton_support.launch(
        kernel,
        programs * batch,
        q.device,
        config,
        q,
        front.norm,
        front.query,
        k,
        v,
        queries,
        k.shape[1],
        heads,
        in_channels,
        v.shape[2],
        k.stride(1),
        v.stride(1),
        static.scale * math.log2(math.e),
        *more,
        ADD_ROWS=front.add_rows,
        WIDTH=width,
        VALUE_WIDTH=value_width,
        BLOCK_D=max(_SMALLEST_DOT, triton.next_power_of_2(width)),
        BLOCK_V=max(_SMALLEST_DOT, triton.next_power_of_2(value_width)),
        ARITHMETIC=triton_support.arithmetic(static.dtype, q.device).constexpr(),
        **constexprs,
    )


def run(tensors: Tensors, static: Static) -> Outputs:
    """Norm, projection of the queries, attention and, where it fits, the output projection in one launch."""
    q, k, v, proj_weight, proj_bias, norm_weight, norm_bias, query_weight, query_bias, *rest = library.dense(tensors)
    attn_bias, statistics, residual = rest
    assert q is not None and k is not None
    if v is None:
        k, v = k.chunk(2, dim=-1)
    if static.norm == "group" and statistics is None:
        statistics = group_statistics(q)
    front = Front(
        (norm_weight, norm_bias, statistics, None if static.norm == "none" else static.norm_eps),
        (query_weight, query_bias),
        static.add_query_input,
    )
    found = None
    if proj_weight is None:
        out, found = attend(q, k, v, attn_bias, static, front, residual, static.return_statistics)
    elif (config := _projecting_config(q, k, v, proj_weight, attn_bias, static)) is not None:
        out, found = _attend_and_project(q, k, v, static, front, (proj_weight, proj_bias), residual, config)
    else:
        attended, _ = attend(q, k, v, attn_bias, static, front)
        out = linear(attended, proj_weight, proj_bias, static.dtype, residual=residual)
    if not static.return_statistics:
        return out, out.new_empty(0, dtype=wide(out.dtype))
    return out, group_statistics(out) if found is None else found


def _projecting_config(
    q: Tensor, k: Tensor, v: Tensor, proj_weight: Tensor, attn_bias: Tensor | None, static: Static
) -> Config | None:
    """The launch configuration with the output projection in the attention's kernel; None where it does not fit.

    A column of the output projection needs all heads: a program that goes through them one after the other keeps all
    columns in its registers. Those are enough for the published models' stages of one or two heads, with all keys in
    one block and no bias beside their scores. Elsewhere the output projection and the statistics behind it are launches
    of their own.
    """
    if attn_bias is not None:
        return None
    arithmetic = triton_support.arithmetic(static.dtype, q.device)
    widths = k.shape[2] // static.num_heads, v.shape[2] // static.num_heads
    place = (
        "attention_projection",
        arithmetic,
        max(*widths, proj_weight.shape[0]),
        *widths,
        *proj_weight.shape,
        q.shape[2],
    )
    if not triton_support.fits(*place):
        return None
    config = triton_support.config(*place)
    return config if k.shape[1] <= config.block_n else None


def _attention(empty: Empty, heads: int, channels: int, table: bool) -> Outputs:
    """PVTv2's behind its LayerNorm, or with a table CMT's."""
    linear = [empty(channels, channels), empty(channels)]
    rows, keys = empty(8, 784, channels), empty(8, 49, 2 * channels)
    bias = empty(heads, 784, 49) if table else None
    tensors = [rows, keys, None, *linear, empty(channels), empty(channels), *linear, bias, None, rows]
    return run(tensors, Static(heads, 0.125, "layer", 1e-6, False, False, empty.dtype))


SPECS = (
    Spec(attention_kernel, lambda empty: _attention(empty, 2, 128, table=True), products=True),
    Spec(attention_projection_kernel, lambda empty: _attention(empty, 1, 64, table=False), products=True),
)
