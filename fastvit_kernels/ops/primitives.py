"""Triton device functions that several operators share.

Importing this module imports Triton, so only the modules with kernels do, at their first launch. Values are fp32 from
the load to the store; only the operands of a matrix product are rounded to the compute dtype.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rows_and_columns(tile, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Those of a tile of a matrix `[..., width]`; tiles of the same rows are neighbours and find them in the cache."""
    tiles = tl.cdiv(width, BLOCK_N)
    return tile // tiles * BLOCK_M + tl.arange(0, BLOCK_M), tile % tiles * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """`ops.activations.activate`."""
    if ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif ACTIVATION == "quick_gelu":
        x = x * tl.sigmoid(1.702 * x)
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "relu":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return x


@triton.jit
def activation_gradient(x, ACTIVATION: tl.constexpr):
    """The derivative of `activate` at x."""
    if ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        x = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476)) + x * density
    elif ACTIVATION == "quick_gelu":
        gate = tl.sigmoid(1.702 * x)
        x = gate + 1.702 * x * gate * (1.0 - gate)
    elif ACTIVATION == "silu":
        gate = tl.sigmoid(x)
        x = gate + x * gate * (1.0 - gate)
    elif ACTIVATION == "relu":
        x = tl.where(x <= 0.0, 0.0, 1.0)
    else:
        x = tl.full(x.shape, 1.0, tl.float32)
    return x


@triton.jit
def dot(a, b, accumulator, ARITHMETIC: tl.constexpr):
    """`accumulator + a @ b`, summed in fp32; `ARITHMETIC` is (compute dtype, whether to upcast, precision of fp32).

    Triton's interpreter multiplies bf16 as the integers of its bit patterns: it gets the rounded operands in fp32.
    """
    a, b = a.to(ARITHMETIC[0]), b.to(ARITHMETIC[0])
    if ARITHMETIC[1]:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=ARITHMETIC[2])


@triton.jit
def in_log2(bias):
    """A bias of softmax in units of log2. The lowest finite number is a common mask and must not become infinite."""
    scaled = tl.minimum(tl.maximum(bias * 1.4426950408889634, -3e38), 3e38)
    return tl.where(tl.abs(bias) == float("inf"), bias, scaled)


@triton.jit
def finite_maximum(maximum):
    """0 for the maximum of scores that are all -inf so far: -inf - -inf would be NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def vector(pointer, columns, mask, DEFAULT: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK entries of a per-channel parameter; `DEFAULT` everywhere when the parameter is None."""
    if pointer is None:
        values = tl.full((BLOCK,), DEFAULT, tl.float32)
    else:
        values = tl.load(pointer + columns, mask=mask, other=0.0).to(tl.float32)
    return values


@triton.jit
def row_statistics(x_ptr, rows, row_mask, channels, eps, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """LayerNorm's mean and reciprocal standard deviation of BLOCK_M rows of a row-major matrix.

    Every block of channels has a mean and a sum of squared deviations of its own, merged by the formula of Chan, Golub
    and LeVeque: one pass over the rows, as accurate as two where the mean is large against the deviation.
    """
    mean = tl.zeros((BLOCK_M,), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    seen = 0.0
    row_ptr = x_ptr + rows.to(tl.int64)[:, None] * channels
    for start in range(0, channels, BLOCK_C):
        columns = start + tl.arange(0, BLOCK_C)
        inside = columns < channels
        x = tl.load(row_ptr + columns[None, :], mask=row_mask[:, None] & inside[None, :], other=0.0).to(tl.float32)
        size = tl.minimum(channels - start, BLOCK_C).to(tl.float32)
        block_mean = tl.sum(x, 1) / size
        deviation = tl.where(inside[None, :], x - block_mean[:, None], 0.0)
        shift = block_mean - mean
        share = size / (seen + size)
        mean += shift * share
        squares += tl.sum(deviation * deviation, 1) + shift * shift * (seen * share)
        seen += size
    return mean, tl.rsqrt(squares / channels + eps)


@triton.jit
def normalize(x, mean, rstd, weight_ptr, bias_ptr, columns, mask, BLOCK_C: tl.constexpr):
    """LayerNorm of a tile `[rows, columns]` with known statistics."""
    x = (x.to(tl.float32) - mean[:, None]) * rstd[:, None]
    x = x * vector(weight_ptr, columns, mask, 1.0, BLOCK_C)[None, :]
    return x + vector(bias_ptr, columns, mask, 0.0, BLOCK_C)[None, :]


@triton.jit
def scale_and_shift(bn, columns, mask, BLOCK: tl.constexpr):
    """What a batch normalisation `(weight, bias, mean, variance, eps)` comes to; 1 and 0 where its mean is None."""
    weight_ptr, bias_ptr, mean_ptr, variance_ptr, eps = bn
    scale = tl.full((BLOCK,), 1.0, tl.float32)
    shift = tl.zeros((BLOCK,), tl.float32)
    if mean_ptr is not None:
        scale = tl.rsqrt(tl.load(variance_ptr + columns, mask=mask, other=1.0).to(tl.float32) + eps)
        scale *= vector(weight_ptr, columns, mask, 1.0, BLOCK)
        shift = vector(bias_ptr, columns, mask, 0.0, BLOCK) - vector(mean_ptr, columns, mask, 0.0, BLOCK) * scale
    return scale, shift


@triton.jit
def batch_normalize(x, bn, columns, mask, BLOCK: tl.constexpr):
    """A tile `[rows, columns]` normalised by `bn`, as in `scale_and_shift`: the mean is taken off first."""
    weight_ptr, bias_ptr, mean_ptr, variance_ptr, eps = bn
    if mean_ptr is not None:
        scale = tl.rsqrt(tl.load(variance_ptr + columns, mask=mask, other=1.0).to(tl.float32) + eps)
        scale *= vector(weight_ptr, columns, mask, 1.0, BLOCK)
        x = (x - vector(mean_ptr, columns, mask, 0.0, BLOCK)[None, :]) * scale[None, :]
        x += vector(bias_ptr, columns, mask, 0.0, BLOCK)[None, :]
    return x


@triton.jit
def fold_filter(
    block, filter, bn, folded_ptr, channels, stride, TAPS: tl.constexpr, PLUS: tl.constexpr, BLOCK: tl.constexpr
):
    """Write `[TAPS + 1, stride]` in fp32: a depthwise filter times the scale of `bn`, and in the last row the shift.

    `filter` is the filter and its bias. Channels come last, so that a tap is read without gaps; in the filter itself
    its channels lie TAPS apart. Columns past the channels become zeros. `PLUS` is added to the tap in the middle: with
    1 the convolution adds its input to its result.
    """
    weight_ptr, bias_ptr = filter
    columns = block * BLOCK + tl.arange(0, BLOCK)
    mask = columns < channels
    scale, shift = scale_and_shift(bn, columns, mask, BLOCK)
    for tap in range(TAPS):
        weight = tl.load(weight_ptr + columns * TAPS + tap, mask=mask, other=0.0).to(tl.float32)
        weight += tl.where(tap == TAPS // 2, PLUS, 0.0)
        weight = tl.where(mask, weight * scale, 0.0)
        tl.store(folded_ptr + tap * stride + columns, weight, mask=columns < stride)
    shift += vector(bias_ptr, columns, mask, 0.0, BLOCK) * scale
    tl.store(folded_ptr + TAPS * stride + columns, tl.where(mask, shift, 0.0), mask=columns < stride)
