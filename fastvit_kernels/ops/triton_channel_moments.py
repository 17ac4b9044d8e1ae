"""Mean and biased variance of every channel over all rows in Triton: what batch norms take in training."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit_kernels.ops import triton_support
from fastvit_kernels.ops.primitives import activate
from fastvit_kernels.ops.triton_specs import Spec
from fastvit_kernels.ops.triton_sums import split_rows


@triton.jit
def merge_tile(mean, squares, x, inside, seen, count):
    """Mean and sum of squared deviations of each column, of `seen` rows so far and the `count` rows `inside` a tile.

    They are merged as in `row_statistics`.
    """
    x = tl.where(inside[:, None], x, 0.0)
    size = count.to(tl.float32)
    tile_mean = tl.sum(x, 0) / size
    deviation = tl.where(inside[:, None], x - tile_mean[None, :], 0.0)
    shift = tile_mean - mean
    share = size / (seen.to(tl.float32) + size)
    mean += shift * share
    squares += tl.sum(deviation * deviation, 0) + shift * shift * (seen.to(tl.float32) * share)
    return mean, squares


@triton.jit(do_not_specialize=["num_rows", "part_rows"])
def row_moments_kernel(
    x_ptr,
    parts_ptr,
    num_rows,
    part_rows,
    channels,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The moments of `part_rows` rows, behind an activation, for BLOCK_N channels."""
    tiles = tl.cdiv(channels, BLOCK_N)
    columns = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = columns < channels
    part = tl.program_id(0) // tiles
    first = part * part_rows
    end = tl.minimum(first + part_rows, num_rows)
    mean = tl.zeros((BLOCK_N,), tl.float32)
    squares = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(first, end, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        inside = rows < end
        offsets = rows.to(tl.int64)[:, None] * channels + columns[None, :]
        x = tl.load(x_ptr + offsets, mask=inside[:, None] & column_mask[None, :], other=0.0).to(tl.float32)
        x = activate(x, ACTIVATION)
        mean, squares = merge_tile(mean, squares, x, inside, start - first, tl.minimum(end - start, BLOCK_M))
    parts_ptr += part.to(tl.int64) * 2 * channels + columns
    tl.store(parts_ptr, mean, mask=column_mask)
    tl.store(parts_ptr + channels, squares, mask=column_mask)


@triton.jit(do_not_specialize=["num_parts", "num_rows", "part_rows"])
def merge_parts_kernel(
    parts_ptr,
    moments_ptr,
    num_parts,
    num_rows,
    part_rows,
    channels,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Mean and biased variance of BLOCK_N channels from the moments of all parts, always added in the same order."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = columns < channels
    mean = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, num_parts, BLOCK_M):
        part = start + tl.arange(0, BLOCK_M)
        mask = (part < num_parts)[:, None] & column_mask[None, :]
        means = tl.load(parts_ptr + part.to(tl.int64)[:, None] * 2 * channels + columns[None, :], mask=mask, other=0.0)
        count = tl.minimum(num_rows - part * part_rows, part_rows).to(tl.float32)
        mean += tl.sum(means * (count / num_rows)[:, None], 0)
    variance = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, num_parts, BLOCK_M):
        part = start + tl.arange(0, BLOCK_M)
        mask = (part < num_parts)[:, None] & column_mask[None, :]
        moments = parts_ptr + part.to(tl.int64)[:, None] * 2 * channels + columns[None, :]
        shift = tl.where(mask, tl.load(moments, mask=mask, other=0.0) - mean[None, :], 0.0)
        squares = tl.load(moments + channels, mask=mask, other=0.0)
        count = tl.minimum(num_rows - part * part_rows, part_rows).to(tl.float32)
        variance += tl.sum(squares + count[:, None] * shift * shift, 0)
    tl.store(moments_ptr + columns, mean, mask=column_mask)
    tl.store(moments_ptr + channels + columns, variance / num_rows, mask=column_mask)


def merge_parts(parts: Tensor, num_rows: int, part_rows: int) -> Tensor:
    """Mean and biased variance `[2, C]` from means and sums of squared deviations `[P, 2, C]`.

    Every part but the last is of `part_rows` rows.
    """
    channels = parts.shape[2]
    moments = parts.new_empty((2, channels))
    config = triton_support.config("sum", triton_support.arithmetic(torch.float32, parts.device), channels)
    triton_support.launch(
        merge_parts_kernel,
        triton.cdiv(channels, config.block_n),
        parts.device,
        config,
        parts,
        moments,
        len(parts),
        num_rows,
        part_rows,
        channels,
    )
    return moments


def row_moments(x: Tensor, activation: str) -> Tensor:
    """Mean and biased variance `[2, C]` in fp32 of what the activation makes of dense `[..., C]`, at least one row."""
    channels = x.shape[-1]
    num_rows = x.numel() // channels
    config = triton_support.config("sums", triton_support.arithmetic(torch.float32, x.device), channels)
    tiles = triton.cdiv(channels, config.block_n)
    num_parts, part_rows = split_rows(num_rows, config.block_m, tiles)
    parts = x.new_empty((num_parts, 2, channels), dtype=torch.float32)
    triton_support.launch(
        row_moments_kernel,
        num_parts * tiles,
        x.device,
        config,
        x,
        parts,
        num_rows,
        part_rows,
        channels,
        ACTIVATION=activation,
    )
    return merge_parts(parts, num_rows, part_rows)


SPECS = (
    Spec(row_moments_kernel, lambda empty: row_moments(empty(8, 784, 256), "gelu")),
    Spec(merge_parts_kernel, lambda empty: merge_parts(empty.wide(49, 2, 256), 8 * 784, 128)),
)
