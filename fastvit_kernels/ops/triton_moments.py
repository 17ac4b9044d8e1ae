"""`normalization.group_statistics` in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit_kernels.ops import triton_support

_MOST_PARTS = 256


@triton.jit(do_not_specialize=["size", "blocks", "parts"])
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
    """Mean and sum of squared deviations of some blocks of one sample, merged one by one as in `row_statistics`.

    Of differences from the sample's first value: far from zero sums of the values themselves would lose digits.
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
        shift = block_mean - mean
        share = count / (seen + count)
        mean += shift * share
        squares += tl.sum(deviation * deviation, 0) + shift * shift * (seen * share)
        seen += count
    tl.store(moments_ptr + 2 * tl.program_id(0), mean)
    tl.store(moments_ptr + 2 * tl.program_id(0) + 1, squares)


@triton.jit(do_not_specialize=["size", "part_size", "parts"])
def merge_kernel(
    x_ptr,
    moments_ptr,
    statistics_ptr,
    sample_stride,
    size,
    part_size,
    parts,
    MOST_PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Mean and biased variance of one sample from those of its parts, always added in the same order."""
    sample = tl.program_id(0)
    part = tl.arange(0, MOST_PARTS)
    here = part < parts
    moments = moments_ptr + 2 * (sample * parts + part)
    means = tl.load(moments, mask=here, other=0.0)
    squares = tl.load(moments + 1, mask=here, other=0.0)
    counts = tl.where(here, tl.minimum(size - part * part_size, part_size), 0).to(tl.float32)
    mean = tl.sum(means * (counts / size), 0)
    shift = means - mean
    variance = tl.sum(squares + counts * shift * shift, 0) / size
    pivot = tl.load(x_ptr + sample.to(tl.int64) * sample_stride).to(tl.float32)
    tl.store(statistics_ptr + 2 * sample, pivot + mean)
    tl.store(statistics_ptr + 2 * sample + 1, variance)


def group_statistics(x: Tensor, num_prefix_tokens: int = 0) -> Tensor:
    """Mean and biased variance `[B, 2]` of each sample of dense `[B, P + N, C]` but its P prefix rows, in fp32."""
    statistics = x.new_empty((x.shape[0], 2), dtype=torch.float32)
    tokens = x[:, num_prefix_tokens:]
    batch, size = tokens.shape[0], tokens.shape[1] * tokens.shape[2]
    if batch == 0:
        return statistics
    arithmetic = triton_support.arithmetic(torch.float32, x.device)
    config = triton_support.config("moments", arithmetic, x.shape[2])
    blocks = triton.cdiv(triton.cdiv(size, config.block_n), _MOST_PARTS)
    part_size = blocks * config.block_n
    parts = triton.cdiv(size, part_size)
    moments = x.new_empty((batch, parts, 2), dtype=torch.float32)
    triton_support.launch(
        moments_kernel, batch * parts, x.device, config, tokens, moments, x.stride(0), size, blocks, parts
    )
    triton_support.launch(
        merge_kernel,
        batch,
        x.device,
        config,
        tokens,
        moments,
        statistics,
        x.stride(0),
        size,
        part_size,
        parts,
        MOST_PARTS=_MOST_PARTS,
    )
    return statistics
