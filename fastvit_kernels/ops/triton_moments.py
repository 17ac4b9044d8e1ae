"""`normalization.group_statistics` in Triton: of a tensor in memory, or from parts that the kernel behind it left.

The moments of a part are four numbers in fp32: a pivot near its values, the mean's offset from the pivot, the sum of
squared deviations from the mean, and the count. Far from zero sums of the values themselves would lose digits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit_kernels.ops import triton_support
from fastvit_kernels.ops.triton_specs import Spec

MOMENTS = 4
_MOST_PARTS = 256


@triton.jit
def store_moments(moments_ptr, part, pivot, mean, squares, count):
    """Leave the moments of a part where `merge_kernel` finds them."""
    moments_ptr += part.to(tl.int64) * 4
    tl.store(moments_ptr, pivot)
    tl.store(moments_ptr + 1, mean)
    tl.store(moments_ptr + 2, squares)
    tl.store(moments_ptr + 3, count)


@triton.jit
def store_tile_moments(moments_ptr, part, x, mask):
    """Those of a tile `[rows, columns]` in registers; `mask` says which of it counts."""
    count = tl.sum(tl.sum(mask.to(tl.float32), 1), 0)
    # A tile of a window that the map cuts off may be empty.
    share = 1.0 / tl.maximum(count, 1.0)
    pivot = tl.sum(tl.sum(tl.where(mask, x, 0.0), 1), 0) * share
    deviation = tl.where(mask, x - pivot, 0.0)
    # What rounding left of the mean.
    mean = tl.sum(tl.sum(deviation, 1), 0) * share
    squares = tl.sum(tl.sum(deviation * deviation, 1), 0) - count * mean * mean
    store_moments(moments_ptr, part, pivot, mean, squares, count)


@triton.jit(do_not_specialize=["sample_stride", "size", "blocks", "parts"])
def moments_kernel(
    x_ptr,
    moments_ptr,
    sample_stride,
    size,
    blocks,
    parts,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The moments of some blocks of one sample, merged one by one as in `row_statistics`.

    The pivot is the sample's first value.
    """
    sample = (tl.program_id(0) // parts).to(tl.int64)
    pivot = tl.load(x_ptr + sample * sample_stride).to(tl.float32)
    part = tl.program_id(0) % parts
    first = part * blocks * BLOCK_N
    end = tl.minimum(first + blocks * BLOCK_N, size)
    mean = 0.0
    squares = 0.0
    seen = 0.0
    for start in range(first, end, BLOCK_N):
        index = start + tl.arange(0, BLOCK_N)
        inside = index < end
        x = tl.load(x_ptr + sample * sample_stride + index, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(inside, x - pivot, 0.0)
        count = tl.minimum(end - start, BLOCK_N).to(tl.float32)
        block_mean = tl.sum(x, 0) / count
        deviation = tl.where(inside, x - block_mean, 0.0)
        mean, squares, seen = merge(mean, squares, seen, block_mean, tl.sum(deviation * deviation, 0), count)
    store_moments(moments_ptr, tl.program_id(0), pivot, mean, squares, seen)


@triton.jit
def merge(mean, squares, seen, other_mean, other_squares, count):
    """Mean, sum of squared deviations and count of two sets together (Chan, Golub and LeVeque)."""
    shift = other_mean - mean
    share = count / (seen + count)
    return mean + shift * share, squares + other_squares + shift * shift * (seen * share), seen + count


@triton.jit(do_not_specialize=["parts"])
def merge_kernel(
    moments_ptr,
    statistics_ptr,
    parts,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Mean and biased variance of one sample from the moments of its parts, always added in the same order."""
    sample = tl.program_id(0)
    moments_ptr += sample.to(tl.int64) * parts * 4
    pivot = tl.load(moments_ptr)
    mean = 0.0
    squares = 0.0
    seen = 0.0
    for start in range(0, parts, BLOCK_N):
        part = start + tl.arange(0, BLOCK_N)
        here = part < parts
        moments = moments_ptr + part * 4
        counts = tl.load(moments + 3, mask=here, other=0.0)
        means = tl.load(moments, mask=here, other=0.0) - pivot + tl.load(moments + 1, mask=here, other=0.0)
        count = tl.sum(counts, 0)
        block_mean = tl.sum(means * (counts / tl.maximum(count, 1.0)), 0)
        shift = means - block_mean
        block_squares = tl.sum(tl.load(moments + 2, mask=here, other=0.0) + counts * shift * shift, 0)
        mean, squares, seen = merge(mean, squares, seen, block_mean, block_squares, count)
    tl.store(statistics_ptr + 2 * sample, pivot + mean)
    tl.store(statistics_ptr + 2 * sample + 1, squares / seen)


def empty_moments(x: Tensor, parts: int) -> Tensor:
    """Room for the moments `[B, parts, 4]` of the samples of x."""
    return x.new_empty((x.shape[0], parts, MOMENTS), dtype=torch.float32)


def merged_statistics(moments: Tensor) -> Tensor:
    """Mean and biased variance `[B, 2]` of each sample, from the moments `[B, parts, 4]` of its parts."""
    batch, parts, _ = moments.shape
    statistics = moments.new_empty((batch, 2))
    if batch > 0:
        arithmetic = triton_support.arithmetic(torch.float32, moments.device)
        config = triton_support.config("moments", arithmetic, 0)._replace(block_n=_MOST_PARTS)
        triton_support.launch(merge_kernel, batch, moments.device, config, moments, statistics, parts)
    return statistics


def group_statistics(x: Tensor, num_prefix_tokens: int = 0) -> Tensor:
    """Mean and biased variance `[B, 2]` of each sample of dense `[B, P + N, C]` but its P prefix rows, in fp32."""
    tokens = x[:, num_prefix_tokens:]
    batch, size = tokens.shape[0], tokens.shape[1] * tokens.shape[2]
    if batch == 0 or size == 0:
        return x.new_full((batch, 2), float("nan"), dtype=torch.float32)
    arithmetic = triton_support.arithmetic(torch.float32, x.device)
    config = triton_support.config("moments", arithmetic, x.shape[2])
    blocks = triton.cdiv(triton.cdiv(size, config.block_n), _MOST_PARTS)
    parts = triton.cdiv(size, blocks * config.block_n)
    moments = empty_moments(x, parts)
    triton_support.launch(
        moments_kernel, batch * parts, x.device, config, tokens, moments, x.stride(0), size, blocks, parts
    )
    return merged_statistics(moments)


SPECS = (
    Spec(moments_kernel, lambda empty: group_statistics(empty(8, 784, 64))),
    Spec(merge_kernel, lambda empty: merged_statistics(empty.wide(8, 25, MOMENTS))),
)
