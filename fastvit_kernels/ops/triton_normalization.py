"""Normalised rows in Triton, written to memory: for kernels that would otherwise normalise a row many times."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastvit_kernels.ops import triton_support
from fastvit_kernels.ops.primitives import normalize, row_statistics
from fastvit_kernels.ops.triton_specs import Spec


@triton.jit
def row_normalize(x, norm, columns, mask, channels, BLOCK: tl.constexpr):
    """LayerNorm of a tile that holds whole rows, in its first `channels` columns."""
    weight_ptr, bias_ptr, eps = norm
    x = tl.where(mask[None, :], x, 0.0)
    mean = tl.sum(x, 1) / channels
    deviation = tl.where(mask[None, :], x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(deviation * deviation, 1) / channels + eps)
    return normalize(x, mean, rstd, weight_ptr, bias_ptr, columns, mask, BLOCK)


@triton.jit
def normalize_tile(
    tile,
    x_ptr,
    norm,
    residual_ptr,
    out_ptr,
    num_rows,
    channels,
    rows_of_sample,
    PREFIX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_M rows, normalised as in `linear_tile`; samples of result and residual have PREFIX rows in front."""
    weight_ptr, bias_ptr, statistics_ptr, eps = norm
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < num_rows
    samples = rows // rows_of_sample
    if statistics_ptr is not None:
        mean = tl.load(statistics_ptr + 2 * samples, mask=row_mask, other=0.0)
        rstd = tl.rsqrt(tl.load(statistics_ptr + 2 * samples + 1, mask=row_mask, other=0.0) + eps)
    else:
        mean, rstd = row_statistics(x_ptr, rows, row_mask, channels, eps, BLOCK_M, BLOCK_K)
    x_rows = rows.to(tl.int64)[:, None] * channels
    out_rows = (rows + (samples + 1) * PREFIX).to(tl.int64)[:, None] * channels
    for start in range(0, channels, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        mask = row_mask[:, None] & (columns < channels)[None, :]
        x = tl.load(x_ptr + x_rows + columns[None, :], mask=mask, other=0.0)
        x = normalize(x, mean, rstd, weight_ptr, bias_ptr, columns, columns < channels, BLOCK_K)
        if residual_ptr is not None:
            x += tl.load(residual_ptr + out_rows + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + out_rows + columns[None, :], x, mask=mask)


@triton.jit(do_not_specialize=["num_rows", "rows_of_sample"])
def normalize_kernel(
    x_ptr,
    norm,
    residual_ptr,
    out_ptr,
    num_rows,
    channels,
    rows_of_sample,
    PREFIX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`normalize_tile` of every tile."""
    normalize_tile(
        *(tl.program_id(0), x_ptr, norm, residual_ptr, out_ptr, num_rows, channels, rows_of_sample),
        *(PREFIX, BLOCK_M, BLOCK_K),
    )


def normalize_rows(
    x: Tensor,
    out: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    statistics: Tensor | None = None,
    residual: Tensor | None = None,
    num_prefix_tokens: int = 0,
) -> None:
    """Write `residual + norm(x)` of dense tensors into `out`, all but the prefix rows of out and residual.

    The norm is a GroupNorm where `statistics` holds mean and variance `[B, 2]` of the samples that x consists of;
    otherwise a LayerNorm, whose rows must not be in samples with prefix rows.
    """
    channels = x.shape[-1]
    num_rows = x.numel() // channels
    if num_rows == 0:
        return
    config = triton_support.config("normalize", triton_support.arithmetic(out.dtype, x.device), channels)
    triton_support.launch(
        normalize_kernel,
        triton.cdiv(num_rows, config.block_m),
        x.device,
        config,
        x,
        (weight, bias, statistics, eps),
        residual,
        out,
        num_rows,
        channels,
        num_rows if statistics is None else num_rows // len(statistics),
        PREFIX=num_prefix_tokens,
    )


SPECS = (
    Spec(
        normalize_kernel,
        lambda empty: normalize_rows(*(empty(8, 784, 64), empty(8, 784, 64), empty(64), empty(64)), 1e-6),
    ),
)
