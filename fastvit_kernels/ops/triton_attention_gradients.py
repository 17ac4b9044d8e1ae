"""Gradients of softmax attention in Triton, of all rows or inside windows of a map; no matrix of scores is stored.

Queries, keys and values are rows `[B, N, h * d]`, whose stride between rows may be longer than the row. With `WINDOW`
a group of queries and keys is a window of pixels, otherwise all rows of a sample.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit_kernels.ops import triton_support
from fastvit_kernels.ops.primitives import dot, finite_maximum, in_log2
from fastvit_kernels.ops.triton_configs import Config
from fastvit_kernels.ops.triton_specs import Empty, Spec
from fastvit_kernels.ops.triton_sums import split_rows, sum_parts

_SMALLEST_DOT = 16
# A part of the queries writes gradients of all keys: it should have a few blocks to sum.
_FEWEST_BLOCKS = 4
# Where the launch configurations are.
_SAVED, _GRADIENT, _BIAS = "attention_saved", "attention_gradient", "bias_gradient"


class Attention(NamedTuple):
    """One attention and the gradient of its result.

    Attributes:
        q, k, v: rows; grad: of the result, rows of v's heads side by side.
        bias: of the scores `[h, N, M]`, or None.
        heads, scale: of the attention.
        dtype: of the products.
        window: the side of a window, or 0 for none.
        height, width: of the map that windows lie in.
        masked: pixels off the map are no keys; otherwise keys and values of zeros.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    bias: Tensor | None
    heads: int
    scale: float
    dtype: torch.dtype
    window: int = 0
    height: int = 0
    width: int = 0
    masked: bool = True

    @property
    def groups(self) -> int:
        batch = self.q.shape[0]
        if self.window == 0:
            return batch
        return batch * triton.cdiv(self.height, self.window) * triton.cdiv(self.width, self.window)

    @property
    def queries(self) -> int:
        return self.window**2 or self.q.shape[1]

    @property
    def keys(self) -> int:
        return self.window**2 or self.k.shape[1]

    @property
    def widths(self) -> tuple[int, int]:
        return self.q.shape[2] // self.heads, self.v.shape[2] // self.heads


@triton.jit
def locate(index, group, count, height, width, WINDOW: tl.constexpr):
    """The rows of these places of a group, and which of them there are."""
    if WINDOW == 0:
        rows = group.to(tl.int64) * count + index
        inside = index < count
    else:
        across = tl.cdiv(width, WINDOW)
        down = tl.cdiv(height, WINDOW)
        y = group // across % down * WINDOW + index // WINDOW
        x = group % across * WINDOW + index % WINDOW
        rows = (group // across // down).to(tl.int64) * (height * width) + (y * width + x)
        inside = (index < count) & (y < height) & (x < width)
    return rows, inside


@triton.jit
def load_rows(pointer, rows, inside, stride, columns, WIDTH: tl.constexpr):
    """A tile `[rows, columns]`; zeros where there is none."""
    mask = inside[:, None] & (columns < WIDTH)[None, :]
    return tl.load(pointer + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def log2_scores(q, k, bias_ptr, m, n, valid, queries, keys, scale, ARITHMETIC: tl.constexpr):
    """Scaled and biased scores in units of log2(e); minus infinity for what is no key."""
    scores = dot(q, tl.trans(k), tl.zeros((m.shape[0], n.shape[0]), tl.float32), ARITHMETIC) * scale
    if bias_ptr is not None:
        places = (m < queries)[:, None] & (n < keys)[None, :]
        bias = tl.load(bias_ptr + m.to(tl.int64)[:, None] * keys + n[None, :], mask=places, other=0.0)
        scores += in_log2(bias.to(tl.float32))
    return tl.where(valid[None, :], scores, float("-inf"))


@triton.jit
def score_gradient(q, k, v, grad, bias_ptr, m, n, valid, saved, queries, keys, scale, ARITHMETIC: tl.constexpr):
    """Probabilities, and the gradients of the scaled and biased scores."""
    largest, inverse, along = saved
    scores = log2_scores(q, k, bias_ptr, m, n, valid, queries, keys, scale, ARITHMETIC)
    p = tl.exp2(scores - largest[:, None]) * inverse[:, None]
    p_grad = dot(grad, tl.trans(v), tl.zeros((m.shape[0], n.shape[0]), tl.float32), ARITHMETIC)
    return p, p * (p_grad - along[:, None])


@triton.jit
def load_saved(saved_ptr, group, head, heads, m, queries):
    """What `attention_saved_kernel` found for these queries; probabilities past the last one are zeros."""
    saved_ptr += 3 * ((group.to(tl.int64) * heads + head) * queries + m)
    largest = tl.load(saved_ptr, mask=m < queries, other=0.0)
    inverse = tl.load(saved_ptr + 1, mask=m < queries, other=0.0)
    return largest, inverse, tl.load(saved_ptr + 2, mask=m < queries, other=0.0)


@triton.jit(do_not_specialize=["queries", "keys", "heads", "height", "width"])
def attention_saved_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    bias_ptr,
    saved_ptr,
    strides,
    queries,
    keys,
    heads,
    height,
    width,
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
    """For BLOCK_M queries of a head: the largest score, one over the sum of the exponentials of all less that one, and
    the result times its gradient.
    """
    q_stride, k_stride, v_stride, grad_stride = strides
    tiles = tl.cdiv(queries, BLOCK_M)
    m = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(0) // tiles % heads
    group = tl.program_id(0) // tiles // heads
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_V)
    rows, inside = locate(m, group, queries, height, width, WINDOW)
    q = load_rows(q_ptr + head * WIDTH, rows, inside, q_stride, d, WIDTH)
    if bias_ptr is not None:
        bias_ptr += head.to(tl.int64) * queries * keys
    accumulator = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, keys, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        key_rows, there = locate(n, group, keys, height, width, WINDOW)
        k = load_rows(k_ptr + head * WIDTH, key_rows, there, k_stride, d, WIDTH)
        valid = there if MASK else n < keys
        scores = log2_scores(q, k, bias_ptr, m, n, valid, queries, keys, scale, ARITHMETIC)
        larger = tl.maximum(largest, tl.max(scores, 1))
        shift = finite_maximum(larger)
        rescale = tl.exp2(largest - shift)
        p = tl.exp2(scores - shift[:, None])
        total = total * rescale + tl.sum(p, 1)
        v = load_rows(v_ptr + head * VALUE_WIDTH, key_rows, there, v_stride, e, VALUE_WIDTH)
        accumulator = dot(p, v, accumulator * rescale[:, None], ARITHMETIC)
        largest = larger
    grad = load_rows(grad_ptr + head * VALUE_WIDTH, rows, inside, grad_stride, e, VALUE_WIDTH).to(tl.float32)
    along = tl.sum(accumulator * grad, 1) / total
    saved_ptr += 3 * ((group.to(tl.int64) * heads + head) * queries + m)
    tl.store(saved_ptr, finite_maximum(largest), mask=m < queries)
    tl.store(saved_ptr + 1, 1.0 / total, mask=m < queries)
    tl.store(saved_ptr + 2, along, mask=m < queries)


@triton.jit(do_not_specialize=["queries", "keys", "heads", "height", "width"])
def query_gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    bias_ptr,
    saved_ptr,
    out_ptr,
    strides,
    out_stride,
    queries,
    keys,
    heads,
    height,
    width,
    scale,
    out_scale,
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
    """BLOCK_M queries of one head against all keys."""
    q_stride, k_stride, v_stride, grad_stride = strides
    tiles = tl.cdiv(queries, BLOCK_M)
    m = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(0) // tiles % heads
    group = tl.program_id(0) // tiles // heads
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_V)
    rows, inside = locate(m, group, queries, height, width, WINDOW)
    q = load_rows(q_ptr + head * WIDTH, rows, inside, q_stride, d, WIDTH)
    grad = load_rows(grad_ptr + head * VALUE_WIDTH, rows, inside, grad_stride, e, VALUE_WIDTH)
    saved = load_saved(saved_ptr, group, head, heads, m, queries)
    if bias_ptr is not None:
        bias_ptr += head.to(tl.int64) * queries * keys
    accumulator = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, keys, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        key_rows, there = locate(n, group, keys, height, width, WINDOW)
        k = load_rows(k_ptr + head * WIDTH, key_rows, there, k_stride, d, WIDTH)
        v = load_rows(v_ptr + head * VALUE_WIDTH, key_rows, there, v_stride, e, VALUE_WIDTH)
        valid = there if MASK else n < keys
        _, s_grad = score_gradient(q, k, v, grad, bias_ptr, m, n, valid, saved, queries, keys, scale, ARITHMETIC)
        accumulator = dot(s_grad, k, accumulator, ARITHMETIC)
    mask = inside[:, None] & (d < WIDTH)[None, :]
    tl.store(out_ptr + head * WIDTH + rows[:, None] * out_stride + d[None, :], accumulator * out_scale, mask=mask)


@triton.jit(
    do_not_specialize=["part_stride", "queries", "part_queries", "num_parts", "keys", "heads", "height", "width"]
)
def key_gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    bias_ptr,
    saved_ptr,
    key_out_ptr,
    value_out_ptr,
    strides,
    out_strides,
    part_stride,
    queries,
    part_queries,
    num_parts,
    keys,
    heads,
    height,
    width,
    scale,
    out_scale,
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
    """What `part_queries` queries add to the gradients of BLOCK_N keys and values of one head."""
    q_stride, k_stride, v_stride, grad_stride = strides
    key_stride, value_stride = out_strides
    tiles = tl.cdiv(keys, BLOCK_N)
    n = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(0) // tiles % num_parts
    head = tl.program_id(0) // tiles // num_parts % heads
    group = tl.program_id(0) // tiles // num_parts // heads
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_V)
    key_rows, there = locate(n, group, keys, height, width, WINDOW)
    k = load_rows(k_ptr + head * WIDTH, key_rows, there, k_stride, d, WIDTH)
    v = load_rows(v_ptr + head * VALUE_WIDTH, key_rows, there, v_stride, e, VALUE_WIDTH)
    valid = there if MASK else n < keys
    if bias_ptr is not None:
        bias_ptr += head.to(tl.int64) * queries * keys
    key_sums = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    value_sums = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for start in range(part * part_queries, tl.minimum((part + 1) * part_queries, queries), BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        rows, inside = locate(m, group, queries, height, width, WINDOW)
        q = load_rows(q_ptr + head * WIDTH, rows, inside, q_stride, d, WIDTH)
        grad = load_rows(grad_ptr + head * VALUE_WIDTH, rows, inside, grad_stride, e, VALUE_WIDTH)
        saved = load_saved(saved_ptr, group, head, heads, m, queries)
        p, s_grad = score_gradient(q, k, v, grad, bias_ptr, m, n, valid, saved, queries, keys, scale, ARITHMETIC)
        value_sums = dot(tl.trans(p), grad, value_sums, ARITHMETIC)
        key_sums = dot(tl.trans(s_grad), q, key_sums, ARITHMETIC)
    key_out_ptr += part.to(tl.int64) * part_stride + head * WIDTH
    value_out_ptr += part.to(tl.int64) * part_stride + head * VALUE_WIDTH
    key_mask = there[:, None] & (d < WIDTH)[None, :]
    tl.store(key_out_ptr + key_rows[:, None] * key_stride + d[None, :], key_sums * out_scale, mask=key_mask)
    value_mask = there[:, None] & (e < VALUE_WIDTH)[None, :]
    tl.store(value_out_ptr + key_rows[:, None] * value_stride + e[None, :], value_sums, mask=value_mask)


@triton.jit(do_not_specialize=["queries", "keys", "heads", "groups", "part_groups", "height", "width"])
def bias_gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    bias_ptr,
    saved_ptr,
    parts_ptr,
    strides,
    queries,
    keys,
    heads,
    groups,
    part_groups,
    height,
    width,
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
    """What `part_groups` groups add to the gradients of one head's biases of BLOCK_M queries and BLOCK_N keys."""
    q_stride, k_stride, v_stride, grad_stride = strides
    key_tiles = tl.cdiv(keys, BLOCK_N)
    tiles = tl.cdiv(queries, BLOCK_M) * key_tiles
    tile = tl.program_id(0) % tiles
    m = tile // key_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile % key_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    head = tl.program_id(0) // tiles % heads
    part = tl.program_id(0) // tiles // heads
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_V)
    first = head.to(tl.int64) * queries * keys
    bias_ptr += first
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for index in range(part * part_groups, tl.minimum((part + 1) * part_groups, groups)):
        group = tl.cast(index, tl.int32)
        rows, inside = locate(m, group, queries, height, width, WINDOW)
        key_rows, there = locate(n, group, keys, height, width, WINDOW)
        q = load_rows(q_ptr + head * WIDTH, rows, inside, q_stride, d, WIDTH)
        grad = load_rows(grad_ptr + head * VALUE_WIDTH, rows, inside, grad_stride, e, VALUE_WIDTH)
        k = load_rows(k_ptr + head * WIDTH, key_rows, there, k_stride, d, WIDTH)
        v = load_rows(v_ptr + head * VALUE_WIDTH, key_rows, there, v_stride, e, VALUE_WIDTH)
        saved = load_saved(saved_ptr, group, head, heads, m, queries)
        valid = there if MASK else n < keys
        _, s_grad = score_gradient(q, k, v, grad, bias_ptr, m, n, valid, saved, queries, keys, scale, ARITHMETIC)
        sums += s_grad
    parts_ptr += part.to(tl.int64) * heads * queries * keys + first
    mask = (m < queries)[:, None] & (n < keys)[None, :]
    tl.store(parts_ptr + m.to(tl.int64)[:, None] * keys + n[None, :], sums, mask=mask)


class AttentionGradients:
    """The gradients of one attention, launch by launch, each of its tensors' when asked for."""

    def __init__(self, attention: Attention) -> None:
        self.attention = a = attention
        self.arithmetic = triton_support.arithmetic(a.dtype, a.q.device)
        width, value_width = a.widths
        crowded = a.bias is not None and a.dtype is torch.float32
        widest = max(width, value_width) * (2 if crowded else 1)
        self.table_widths = widest, width, value_width
        config, self.config, self.bias_config = map(self._config, (_SAVED, _GRADIENT, _BIAS))
        self.sizes = (a.queries, a.keys, a.heads, a.height, a.width)
        self.strides = tuple(t.stride(1) for t in (a.q, a.k, a.v, a.grad))
        self.saved = a.q.new_empty((a.groups, a.heads, a.queries, 3), dtype=torch.float32)
        self._launch(
            attention_saved_kernel,
            triton.cdiv(a.queries, config.block_m) * a.heads * a.groups,
            self.saved,
            self.strides,
            *self.sizes,
            self.log2_scale,
            config=config,
            table=_SAVED,
        )

    def _config(self, table: str) -> Config:
        """Tiles no larger than a window, whose size is the module's own; few rows of a sample leave theirs unfilled."""
        config = triton_support.config(table, self.arithmetic, *self.table_widths)
        if self.attention.window == 0:
            return config
        most = max(_SMALLEST_DOT, triton.next_power_of_2(self.attention.queries))
        return config._replace(block_m=min(config.block_m, most), block_n=min(config.block_n, most))

    @property
    def log2_scale(self) -> float:
        return self.attention.scale * math.log2(math.e)

    def _launch(
        self, kernel: object, programs: int, *args: object, config: Config | None = None, table: str = _GRADIENT
    ) -> None:
        a = self.attention
        config = config or self.config
        width, value_width = a.widths
        triton_support.launch(
            kernel,
            programs,
            a.q.device,
            config,
            *(a.q, a.k, a.v, a.grad, a.bias),
            *args,
            WINDOW=a.window,
            MASK=a.masked,
            WIDTH=width,
            VALUE_WIDTH=value_width,
            BLOCK_D=max(_SMALLEST_DOT, triton.next_power_of_2(width)),
            BLOCK_V=max(_SMALLEST_DOT, triton.next_power_of_2(value_width)),
            ARITHMETIC=self.arithmetic.constexpr(),
            **triton_support.all_registers(config, table, self.arithmetic, *self.table_widths),
        )

    def of_queries(self, out: Tensor) -> None:
        """Write into rows like those of q."""
        a = self.attention
        self._launch(
            query_gradient_kernel,
            triton.cdiv(a.queries, self.config.block_m) * a.heads * a.groups,
            self.saved,
            out,
            self.strides,
            out.stride(1),
            *self.sizes,
            self.log2_scale,
            a.scale,
        )

    def of_keys(self, keys: Tensor, values: Tensor, part_queries: int | None = None) -> None:
        """Write into rows like those of k and v; with `part_queries` into `[parts, ...]`, one for so many queries."""
        a = self.attention
        parts = 1 if part_queries is None else len(keys)
        self._launch(
            key_gradient_kernel,
            triton.cdiv(a.keys, self.config.block_n) * parts * a.heads * a.groups,
            self.saved,
            keys,
            values,
            self.strides,
            (keys.stride(-2), values.stride(-2)),
            keys.stride(0) if part_queries is not None else 0,
            a.queries,
            a.queries if part_queries is None else part_queries,
            parts,
            *self.sizes[1:],
            self.log2_scale,
            a.scale,
        )

    def parts_of_queries(self) -> tuple[int, int]:
        """In how many parts the queries are best shared out for the gradients of keys, and the queries of a part."""
        a = self.attention
        tiles = triton.cdiv(a.keys, self.config.block_n) * a.heads * a.groups
        return split_rows(a.queries, self.config.block_m, tiles, _FEWEST_BLOCKS)

    def of_bias(self) -> Tensor:
        a = self.attention
        assert a.bias is not None
        config = self.bias_config
        tiles = triton.cdiv(a.queries, config.block_m) * triton.cdiv(a.keys, config.block_n) * a.heads
        num_parts, part_groups = split_rows(a.groups, 1, tiles)
        parts = a.q.new_empty((num_parts, a.bias.numel()), dtype=torch.float32)
        self._launch(
            bias_gradient_kernel,
            tiles * num_parts,
            self.saved,
            parts,
            self.strides,
            *self.sizes[:3],
            a.groups,
            part_groups,
            *self.sizes[3:],
            self.log2_scale,
            config=config,
            table=_BIAS,
        )
        return sum_parts(parts, a.bias)[0]


def _gradients(empty: Empty, table: bool = False) -> AttentionGradients:
    """Of 49 keys and values side by side, with or without a bias."""
    k, v = empty(8, 49, 128).chunk(2, dim=-1)
    bias = empty(1, 784, 49) if table else None
    return AttentionGradients(Attention(empty(8, 784, 64), k, v, empty(8, 784, 64), bias, 1, 0.125, empty.dtype))


SPECS = (
    Spec(attention_saved_kernel, _gradients, products=True),
    Spec(query_gradient_kernel, lambda empty: _gradients(empty).of_queries(empty(8, 784, 64)), products=True),
    Spec(
        key_gradient_kernel,
        lambda empty: _gradients(empty).of_keys(empty.wide(4, 8, 49, 64), empty.wide(4, 8, 49, 64), 196),
        products=True,
    ),
    Spec(bias_gradient_kernel, lambda empty: _gradients(empty, table=True).of_bias(), products=True),
)
