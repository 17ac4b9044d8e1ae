"""Gradients of the linear layer over rows in Triton: of its input, its weight and its bias."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit_kernels.ops import triton_support
from fastvit_kernels.ops.primitives import dot, rows_and_columns
from fastvit_kernels.ops.triton_specs import Spec
from fastvit_kernels.ops.triton_sums import split_rows, sum_parts

# A part writes as much as it reads in about so many blocks of rows.
_FEWEST_BLOCKS = 4


@triton.jit(do_not_specialize=["num_rows"])
def input_gradient_kernel(
    grad_ptr,
    weight_ptr,
    out_ptr,
    num_rows,
    out_channels,
    in_channels,
    EVEN_K: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_M rows and BLOCK_N input channels."""
    rows, columns = rows_and_columns(tl.program_id(0), in_channels, BLOCK_M, BLOCK_N)
    row_mask = rows < num_rows
    accumulator = input_gradient_tile(
        *(grad_ptr, weight_ptr, rows, row_mask, columns, out_channels, in_channels),
        *(EVEN_K, ARITHMETIC, BLOCK_M, BLOCK_N, BLOCK_K),
    )
    offsets = rows.to(tl.int64)[:, None] * in_channels + columns[None, :]
    tl.store(out_ptr + offsets, accumulator, mask=row_mask[:, None] & (columns < in_channels)[None, :])


@triton.jit
def input_gradient_tile(
    grad_ptr,
    weight_ptr,
    rows,
    row_mask,
    columns,
    out_channels,
    in_channels,
    EVEN_K: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of `grad @ weight` in fp32."""
    column_mask = columns < in_channels
    grad_rows = grad_ptr + rows.to(tl.int64)[:, None] * out_channels
    weight_columns = weight_ptr + columns[None, :]
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, out_channels, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        k_mask = k < out_channels
        weight_rows = k.to(tl.int64)[:, None] * in_channels
        if EVEN_K:
            grad = tl.load(grad_rows + k[None, :], mask=row_mask[:, None], other=0.0)
            weight = tl.load(weight_columns + weight_rows, mask=column_mask[None, :], other=0.0)
        else:
            grad = tl.load(grad_rows + k[None, :], mask=row_mask[:, None] & k_mask[None, :], other=0.0)
            weight = tl.load(weight_columns + weight_rows, mask=k_mask[:, None] & column_mask[None, :], other=0.0)
        accumulator = dot(grad, weight, accumulator, ARITHMETIC)
    return accumulator


@triton.jit(do_not_specialize=["num_rows", "part_rows"])
def weight_gradient_kernel(
    grad_ptr,
    x_ptr,
    parts_ptr,
    num_rows,
    part_rows,
    out_channels,
    in_channels,
    weight_size,
    HAS_BIAS: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """What `part_rows` rows add to BLOCK_M rows and BLOCK_N columns of the weight's gradient.

    A part holds the gradient of the weight and, behind it, that of the bias: the sum of `grad`'s rows, which the first
    tile of every row of tiles takes along.
    """
    column_tiles = tl.cdiv(in_channels, BLOCK_N)
    tiles = tl.cdiv(out_channels, BLOCK_M) * column_tiles
    # Programs that share rows are neighbours.
    tile = tl.program_id(0) % tiles
    part = tl.program_id(0) // tiles
    m = tile // column_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    m_mask = m < out_channels
    n_mask = n < in_channels
    first = part * part_rows
    end = tl.minimum(first + part_rows, num_rows)
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sums = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(first, end, BLOCK_K):
        rows = start + tl.arange(0, BLOCK_K)
        inside = rows < end
        grad_ptrs = grad_ptr + rows.to(tl.int64)[None, :] * out_channels + m[:, None]
        grad = tl.load(grad_ptrs, mask=inside[None, :] & m_mask[:, None], other=0.0)
        x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * in_channels + n[None, :]
        x = tl.load(x_ptrs, mask=inside[:, None] & n_mask[None, :], other=0.0)
        accumulator = dot(grad, x, accumulator, ARITHMETIC)
        if HAS_BIAS and tile % column_tiles == 0:
            sums += tl.sum(grad.to(tl.float32), 1)
    parts_ptr += part.to(tl.int64) * (weight_size + (out_channels if HAS_BIAS else 0))
    offsets = m.to(tl.int64)[:, None] * in_channels + n[None, :]
    tl.store(parts_ptr + offsets, accumulator, mask=m_mask[:, None] & n_mask[None, :])
    if HAS_BIAS and tile % column_tiles == 0:
        tl.store(parts_ptr + weight_size + m, sums, mask=m_mask)


def input_gradient(grad: Tensor, weight: Tensor, dtype: torch.dtype, out_dtype: torch.dtype) -> Tensor:
    """`grad @ weight` of dense tensors, with products in `dtype`."""
    out_channels, in_channels = weight.shape
    out = grad.new_empty((*grad.shape[:-1], in_channels), dtype=out_dtype)
    if out.numel() == 0:
        return out
    num_rows = out.numel() // in_channels
    arithmetic = triton_support.arithmetic(dtype, grad.device)
    place = "input_gradient", arithmetic, in_channels, out_channels
    config = triton_support.config(*place)
    triton_support.launch(
        input_gradient_kernel,
        config.tiles(num_rows, in_channels),
        grad.device,
        config,
        grad,
        weight,
        out,
        num_rows,
        out_channels,
        in_channels,
        EVEN_K=out_channels % config.block_k == 0,
        ARITHMETIC=arithmetic.constexpr(),
        **triton_support.all_registers(config, *place),
    )
    return out


def weight_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients `grad.T @ x` of a weight and `grad.sum(0)` of a bias, each None where it is not needed.

    Args:
        grad: of the linear's result, dense `[..., C_out]`.
        x: what the weight was applied to, dense `[..., C]`.
        weight, bias: the linear's.
        dtype: of the products.
        needs: which of the two gradients are.
    """
    out_channels, in_channels = weight.shape
    if bias is None or not needs[1]:
        bias = None
    if not needs[0]:
        rows = grad.reshape(-1, out_channels)
        return None, None if bias is None else rows.sum(0, dtype=torch.float32).to(bias.dtype)
    num_rows = grad.numel() // out_channels
    arithmetic = triton_support.arithmetic(dtype, grad.device)
    config = triton_support.config("weight_gradient", arithmetic, in_channels, out_channels)
    tiles = config.tiles(out_channels, in_channels)
    num_parts, part_rows = split_rows(num_rows, config.block_k, tiles, _FEWEST_BLOCKS)
    size = weight.numel() + (0 if bias is None else out_channels)
    parts = grad.new_empty((num_parts, size), dtype=torch.float32)
    if num_parts > 0:
        triton_support.launch(
            weight_gradient_kernel,
            tiles * num_parts,
            grad.device,
            config,
            grad,
            x,
            parts,
            num_rows,
            part_rows,
            out_channels,
            in_channels,
            weight.numel(),
            HAS_BIAS=bias is not None,
            ARITHMETIC=arithmetic.constexpr(),
        )
    found = sum_parts(parts, weight, bias)
    return found[0], found[1] if bias is not None else None


SPECS = (
    Spec(
        input_gradient_kernel,
        lambda empty: input_gradient(empty(8, 784, 256), empty(256, 64), empty.dtype, empty.dtype),
        products=True,
    ),
    Spec(
        weight_gradient_kernel,
        lambda empty: weight_gradient(
            *(empty(8, 784, 256), empty(8, 784, 64), empty(256, 64), empty(256), empty.dtype), (True, True)
        ),
        products=True,
    ),
)
