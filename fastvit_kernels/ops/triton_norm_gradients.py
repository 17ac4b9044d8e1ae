"""Gradients of norms in Triton."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit_kernels.ops import triton_support
from fastvit_kernels.ops.primitives import vector
from fastvit_kernels.ops.triton_sums import sum_parts

_PROGRAMS = 512


@triton.jit(do_not_specialize=["num_rows", "part_rows"])
def layer_norm_gradient_kernel(
    grad_ptr,
    x_ptr,
    weight_ptr,
    out_ptr,
    parts_ptr,
    num_rows,
    part_rows,
    channels,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The gradients of `part_rows` rows of x, and what they add to those of the norm's weight and bias."""
    part = tl.program_id(0)
    first = part * part_rows
    end = tl.minimum(first + part_rows, num_rows)
    columns = tl.arange(0, BLOCK_N)
    column_mask = columns < channels
    weight = vector(weight_ptr, columns, column_mask, 1.0, BLOCK_N)[None, :]
    weight_sums = tl.zeros((BLOCK_N,), tl.float32)
    bias_sums = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(first, end, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        mask = (rows < end)[:, None] & column_mask[None, :]
        offsets = rows.to(tl.int64)[:, None] * channels + columns[None, :]
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        mean = tl.sum(x, 1) / channels
        deviation = tl.where(mask, x - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(deviation * deviation, 1) / channels + eps)
        normed = deviation * rstd[:, None]
        weight_sums += tl.sum(grad * normed, 0)
        bias_sums += tl.sum(grad, 0)
        if out_ptr is not None:
            grad *= weight
            along = tl.sum(grad * normed, 1) / channels
            grad = (grad - (tl.sum(grad, 1) / channels)[:, None] - normed * along[:, None]) * rstd[:, None]
            tl.store(out_ptr + offsets, grad, mask=mask)
    if parts_ptr is not None:
        parts_ptr += part.to(tl.int64) * 2 * channels
        tl.store(parts_ptr + columns, weight_sums, mask=column_mask)
        tl.store(parts_ptr + channels + columns, bias_sums, mask=column_mask)


def layer_norm_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of a LayerNorm's x, weight and bias, each None where it is not needed.

    Args:
        grad: of the norm's result, dense `[..., C]`.
        x: what was normalised, dense.
        weight, bias: the norm's, or None.
        eps: the norm's.
        needs: which of the three gradients are.
    """
    channels = x.shape[-1]
    num_rows = grad.numel() // channels
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if needs[0] else None
    affine = any(needs[1:])
    config = triton_support.config("norm_gradient", triton_support.arithmetic(torch.float32, x.device), channels)
    config = config._replace(block_n=triton.next_power_of_2(channels))
    blocks = triton.cdiv(num_rows, config.block_m)
    part_blocks = max(1, triton.cdiv(blocks, _PROGRAMS))
    num_parts = triton.cdiv(blocks, part_blocks)
    parts = x.new_empty((num_parts, 2 * channels), dtype=torch.float32) if affine else None
    if num_parts > 0:
        triton_support.launch(
            layer_norm_gradient_kernel,
            num_parts,
            x.device,
            config,
            grad,
            x,
            weight,
            out,
            parts,
            num_rows,
            part_blocks * config.block_m,
            channels,
            eps,
        )
    if parts is None:
        return out, None, None
    like = parts.new_empty(channels)
    weight_sums, bias_sums = sum_parts(parts, like if weight is None else weight, like if bias is None else bias)
    return out, weight_sums if needs[1] else None, bias_sums if needs[2] else None
