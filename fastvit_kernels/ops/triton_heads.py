"""What stands in front of an attention and behind it, on tiles in registers: device functions of both attentions."""

from __future__ import annotations

import triton
import triton.language as tl

from fastvit_kernels.ops.primitives import normalize, row_statistics
from fastvit_kernels.ops.triton_moments import store_tile_moments


@triton.jit
def norm_of_rows(x_ptr, norm, sample, rows, row_mask, channels, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Mean and reciprocal standard deviation of BLOCK_M rows of the sample that `x_ptr` points to.

    `norm` is weight, bias, statistics and epsilon: a GroupNorm where there are statistics, otherwise a LayerNorm, whose
    statistics are taken here; none, hence 0 and 1, without an epsilon.
    """
    weight_ptr, bias_ptr, statistics_ptr, eps = norm
    mean = tl.zeros((BLOCK_M,), tl.float32)
    rstd = tl.full((BLOCK_M,), 1.0, tl.float32)
    if statistics_ptr is not None:
        mean += tl.load(statistics_ptr + 2 * sample)
        rstd *= tl.rsqrt(tl.load(statistics_ptr + 2 * sample + 1) + eps)
    elif eps is not None:
        mean, rstd = row_statistics(x_ptr, rows, row_mask, channels, eps, BLOCK_M, BLOCK_K)
    return mean, rstd


@triton.jit
def normalized(row_ptrs, row_mask, norm, mean, rstd, columns, column_mask, BLOCK: tl.constexpr):
    """BLOCK columns of rows behind their norm; zeros where one of the masks has none."""
    weight_ptr, bias_ptr, statistics_ptr, eps = norm
    mask = row_mask[:, None] & column_mask[None, :]
    x = tl.load(row_ptrs[:, None] + columns[None, :], mask=mask, other=0.0)
    if eps is not None:
        x = tl.where(mask, normalize(x, mean, rstd, weight_ptr, bias_ptr, columns, column_mask, BLOCK), 0.0)
    return x


@triton.jit
def store_result(y, out_ptr, residual_ptr, moments_ptr, part, offsets, mask):
    """Store `residual + y`, and the moments of what was stored as those of a part of the sample."""
    if residual_ptr is not None:
        y += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    y = y.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offsets, y, mask=mask)
    if moments_ptr is not None:
        store_tile_moments(moments_ptr, part, y.to(tl.float32), mask)
