"""Triton kernels of merge_head_tokens and of its gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit_kernels.ops import library, triton_support
from fastvit_kernels.ops.merge_head_tokens.reference import Static
from fastvit_kernels.ops.operator import Outputs, Tensors
from fastvit_kernels.ops.triton_specs import Spec


@triton.jit
def place_tile(row_blocks, column_blocks, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's sample, the first of its rows, and its columns."""
    columns = tl.program_id(0) % column_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    rest = tl.program_id(0) // column_blocks
    return (rest // row_blocks).to(tl.int64), rest % row_blocks * BLOCK_M, columns


@triton.jit(do_not_specialize=["tokens", "heads"])
def merge_tokens_kernel(
    x_ptr,
    residual_ptr,
    out_ptr,
    tokens,
    heads,
    channels,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_M of a sample's tokens; the first of them takes the mean of the head tokens behind all."""
    sample, first, columns = place_tile(tl.cdiv(tokens, BLOCK_M), tl.cdiv(channels, BLOCK_N), BLOCK_M, BLOCK_N)
    rows = first + tl.arange(0, BLOCK_M)
    column_mask = columns < channels
    mask = (rows < tokens)[:, None] & column_mask[None, :]
    x_ptr += sample * (tokens + heads) * channels
    offsets = rows.to(tl.int64)[:, None] * channels + columns[None, :]
    y = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if first == 0:
        sums = tl.zeros((BLOCK_N,), tl.float32)
        for head in range(heads):
            source = x_ptr + (tokens + head).to(tl.int64) * channels + columns
            sums += tl.load(source, mask=column_mask, other=0.0).to(tl.float32)
        y += tl.where((rows == 0)[:, None], (sums / heads)[None, :], 0.0)
    offsets += sample * tokens * channels
    if residual_ptr is not None:
        y += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, y, mask=mask)


@triton.jit(do_not_specialize=["tokens", "heads"])
def merge_tokens_gradient_kernel(
    grad_ptr,
    out_ptr,
    tokens,
    heads,
    channels,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The gradient of x: that of the result, and of the class token's for each head token its part."""
    all_tokens = tokens + heads
    sample, first, columns = place_tile(tl.cdiv(all_tokens, BLOCK_M), tl.cdiv(channels, BLOCK_N), BLOCK_M, BLOCK_N)
    rows = first + tl.arange(0, BLOCK_M)
    mask = (rows < all_tokens)[:, None] & (columns < channels)[None, :]
    sources = sample * tokens + tl.where(rows < tokens, rows, 0)
    grad = tl.load(grad_ptr + sources[:, None] * channels + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    grad = tl.where((rows < tokens)[:, None], grad, grad / heads)
    targets = (sample * all_tokens + rows)[:, None] * channels + columns[None, :]
    tl.store(out_ptr + targets, grad, mask=mask)


def run(tensors: Tensors, static: Static) -> Outputs:
    """One launch."""
    x, residual = library.dense(tensors)
    assert x is not None
    batch, all_tokens, channels = x.shape
    tokens = all_tokens - static.num_heads
    dtype = static.dtype if residual is None else torch.promote_types(residual.dtype, static.dtype)
    out = x.new_empty((batch, tokens, channels), dtype=dtype)
    _launch(merge_tokens_kernel, out, x, residual, out, tokens, static.num_heads, channels)
    return (out,)


def run_backward(grads: Sequence[Tensor], tensors: Tensors, needs: Sequence[bool], static: Static) -> list[Tensor]:
    """One launch for x; the residual's gradient is that of the result."""
    x, residual = tensors
    assert x is not None
    grad = grads[0].contiguous()
    found = []
    if needs[0]:
        x_grad = torch.empty_like(x, memory_format=torch.contiguous_format)
        _launch(merge_tokens_gradient_kernel, x_grad, grad, x_grad, grad.shape[1], static.num_heads, grad.shape[2])
        found.append(x_grad)
    if needs[1]:
        assert residual is not None
        found.append(grad.to(residual.dtype, copy=True))
    return found


def _launch(kernel: object, written: Tensor, *args: Tensor | int | None) -> None:
    """One program for each tile of the rows that are written."""
    batch, rows, channels = written.shape
    config = triton_support.config("elementwise", triton_support.arithmetic(torch.float32, written.device), channels)
    programs = batch * config.tiles(rows, channels)
    if programs > 0:
        triton_support.launch(kernel, programs, written.device, config, *args)


SPECS = (
    Spec(
        merge_tokens_kernel,
        lambda empty: run([empty(8, 205, 384), empty(8, 197, 384)], Static(8, empty.dtype)),
    ),
    Spec(
        merge_tokens_gradient_kernel,
        lambda empty: run_backward(
            [empty(8, 197, 384)], [empty(8, 205, 384), None], (True, False), Static(8, empty.dtype)
        ),
    ),
)
