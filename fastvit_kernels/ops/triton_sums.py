"""Sums of partial sums in Triton, always added in the same order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit_kernels.ops import triton_support
from fastvit_kernels.ops.triton_specs import Spec

# Programs that fill a GPU of these generations a few times over; a sum over many rows is shared out among so many.
_PROGRAMS = 512


def split_rows(num_rows: int, block: int, tiles: int, fewest_blocks: int = 1) -> tuple[int, int]:
    """In how many parts rows are summed by each of `tiles`, and the rows of a part: a multiple of `block`.

    The shape alone decides, so that the order of additions never changes.
    """
    blocks = triton.cdiv(num_rows, block)
    part_blocks = max(triton.cdiv(blocks, triton.cdiv(_PROGRAMS, tiles)), fewest_blocks)
    return triton.cdiv(blocks, part_blocks), part_blocks * block


@triton.jit
def sum_block(parts_ptr, out_ptr, block, num_parts, stride, size, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """BLOCK_N sums of `num_parts` numbers, BLOCK_M at a time."""
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, num_parts, BLOCK_M):
        part = start + tl.arange(0, BLOCK_M)
        mask = (part < num_parts)[:, None] & (columns < size)[None, :]
        total += tl.sum(tl.load(parts_ptr + part.to(tl.int64)[:, None] * stride + columns[None, :], mask, other=0.0), 0)
    tl.store(out_ptr + columns, total, mask=columns < size)


@triton.jit(do_not_specialize=["num_parts", "stride", "first_size", "second_size"])
def sum_parts_kernel(
    parts_ptr,
    first_ptr,
    second_ptr,
    num_parts,
    stride,
    first_size,
    second_size,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A part of `stride` numbers begins with those of the first result and ends with those of the second."""
    block = tl.program_id(0)
    first_blocks = tl.cdiv(first_size, BLOCK_N)
    if block < first_blocks:
        sum_block(parts_ptr, first_ptr, block, num_parts, stride, first_size, BLOCK_M, BLOCK_N)
    elif second_ptr is not None:
        block -= first_blocks
        second_parts = parts_ptr + (stride - second_size)
        sum_block(second_parts, second_ptr, block, num_parts, stride, second_size, BLOCK_M, BLOCK_N)


def sum_parts(parts: Tensor, first: Tensor, second: Tensor | None = None) -> list[Tensor]:
    """Sums of fp32 `parts` `[P, n]` over their first axis: what they begin with, a tensor like `first`, and what they
    end with, one like `second`.
    """
    found = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (first, second) if t is not None]
    sizes = [t.numel() for t in found]
    assert sum(sizes) <= parts.shape[1]
    arithmetic = triton_support.arithmetic(torch.float32, parts.device)
    config = triton_support.config("sum", arithmetic, parts.shape[1])
    triton_support.launch(
        sum_parts_kernel,
        sum(triton.cdiv(size, config.block_n) for size in sizes),
        parts.device,
        config,
        parts,
        found[0],
        found[1] if len(found) > 1 else None,
        len(parts),
        parts.shape[1],
        sizes[0],
        sizes[-1],
    )
    return found


SPECS = (Spec(sum_parts_kernel, lambda empty: sum_parts(empty.wide(64, 65 * 64), empty(64, 64), empty(64))),)
