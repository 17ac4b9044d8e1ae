"""The linear layer over rows in Triton: a norm before it, an activation and a residual behind it, all optional."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit_kernels.ops import triton_support
from fastvit_kernels.ops.primitives import (
    activate,
    batch_normalize,
    dot,
    normalize,
    row_statistics,
    rows_and_columns,
    vector,
)
from fastvit_kernels.ops.triton_specs import Empty, Spec

# Weight, bias, mean, variance and epsilon; the mean is None where there is no batch norm.
BatchNormTensors = tuple["Tensor | float | None", ...]
NO_BATCH_NORM: BatchNormTensors = (None, None, None, None, None)


@triton.jit
def linear_tile(
    tile,
    x_ptr,
    norm,
    weight_ptr,
    bias_ptr,
    bn,
    residual_ptr,
    before_ptr,
    out_ptr,
    num_rows,
    in_channels,
    out_channels,
    out_stride,
    rows_of_sample,
    PREFIX: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BN_AFTER_ACTIVATION: tl.constexpr,
    EVEN_K: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of BLOCK_M rows and BLOCK_N output channels.

    The statistics of a LayerNorm are taken here, by a pass over the rows that the product then finds in the cache,
    rather than by a launch of their own. Those of a GroupNorm come in `norm`. `PREFIX` rows in front of every sample's
    `rows_of_sample` are passed over. Past its channels a row of the result is filled with zeros up to `out_stride`.
    `before_ptr` gets what batch norm and activation take.
    """
    norm_weight_ptr, norm_bias_ptr, statistics_ptr, norm_eps = norm
    # Programs that share rows of x are neighbours: x is large, while all of the weight stays in the L2 cache.
    rows, columns = rows_and_columns(tile, out_stride, BLOCK_M, BLOCK_N)
    row_mask = rows < num_rows
    column_mask = columns < out_channels
    sources = rows
    if PREFIX > 0:
        sources += (rows // rows_of_sample + 1) * PREFIX
    if statistics_ptr is not None:
        samples = rows // rows_of_sample
        mean = tl.load(statistics_ptr + 2 * samples, mask=row_mask, other=0.0)
        rstd = tl.rsqrt(tl.load(statistics_ptr + 2 * samples + 1, mask=row_mask, other=0.0) + norm_eps)
    elif norm_eps is not None:
        mean, rstd = row_statistics(x_ptr, sources, row_mask, in_channels, norm_eps, BLOCK_M, BLOCK_K)
    x_rows = x_ptr + sources.to(tl.int64)[:, None] * in_channels
    weight_columns = weight_ptr + columns.to(tl.int64)[None, :] * in_channels
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, in_channels, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        k_mask = k < in_channels
        if EVEN_K:
            x = tl.load(x_rows + k[None, :], mask=row_mask[:, None], other=0.0)
            weight = tl.load(weight_columns + k[:, None], mask=column_mask[None, :], other=0.0)
        else:
            x = tl.load(x_rows + k[None, :], mask=row_mask[:, None] & k_mask[None, :], other=0.0)
            weight = tl.load(weight_columns + k[:, None], mask=k_mask[:, None] & column_mask[None, :], other=0.0)
        if norm_eps is not None:
            x = normalize(x, mean, rstd, norm_weight_ptr, norm_bias_ptr, k, k_mask, BLOCK_K)
        accumulator = dot(x, weight, accumulator, ARITHMETIC)
    y = accumulator + vector(bias_ptr, columns, column_mask, 0.0, BLOCK_N)[None, :]
    offsets = rows.to(tl.int64)[:, None] * out_stride + columns[None, :]
    mask = row_mask[:, None] & (columns < out_stride)[None, :]
    if before_ptr is not None:
        tl.store(before_ptr + offsets, y, mask=mask)
    if not BN_AFTER_ACTIVATION:
        y = batch_normalize(y, bn, columns, column_mask, BLOCK_N)
    y = activate(y, ACTIVATION)
    if BN_AFTER_ACTIVATION:
        y = batch_normalize(y, bn, columns, column_mask, BLOCK_N)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, y, mask=mask)


@triton.jit(do_not_specialize=["num_rows", "rows_of_sample"])
def linear_kernel(
    x_ptr,
    norm,
    weight_ptr,
    bias_ptr,
    bn,
    residual_ptr,
    before_ptr,
    out_ptr,
    num_rows,
    in_channels,
    out_channels,
    rows_of_sample,
    ACTIVATION: tl.constexpr,
    BN_AFTER_ACTIVATION: tl.constexpr,
    EVEN_K: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`linear_tile` of every tile."""
    linear_tile(
        *(tl.program_id(0), x_ptr, norm, weight_ptr, bias_ptr, bn, residual_ptr, before_ptr, out_ptr),
        *(num_rows, in_channels, out_channels, out_channels, rows_of_sample),
        *(0, ACTIVATION, BN_AFTER_ACTIVATION, EVEN_K, ARITHMETIC, BLOCK_M, BLOCK_N, BLOCK_K),
    )


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float | None = None,
    norm_statistics: Tensor | None = None,
    activation: str | None = None,
    bn: BatchNormTensors = NO_BATCH_NORM,
    bn_after_activation: bool = False,
    before: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`residual + activation(F.linear(norm(x), weight, bias))` of dense tensors, with products in `dtype`.

    The norm is a GroupNorm where `norm_statistics` holds mean and variance `[B, 2]` of the samples that x consists of;
    otherwise a LayerNorm; none when `norm_eps` is None. The result has `dtype`, promoted with the residual's. `bn`
    (weight, bias, mean, variance, eps) stands in front of the activation or behind it; `before` gets what they take.
    """
    out_channels, in_channels = weight.shape
    out_dtype = dtype if residual is None else torch.promote_types(residual.dtype, dtype)
    out = x.new_empty((*x.shape[:-1], out_channels), dtype=out_dtype)
    if out.numel() == 0:
        return out
    num_rows = out.numel() // out_channels
    arithmetic = triton_support.arithmetic(dtype, x.device)
    # With two results a larger tile takes more registers than there are.
    config = triton_support.config("linear" if before is None else "expansion", arithmetic, out_channels, in_channels)
    triton_support.launch(
        linear_kernel,
        config.tiles(num_rows, out_channels),
        x.device,
        config,
        x,
        (norm_weight, norm_bias, norm_statistics, norm_eps),
        weight,
        bias,
        bn,
        residual,
        before,
        out,
        num_rows,
        in_channels,
        out_channels,
        num_rows if norm_statistics is None else num_rows // len(norm_statistics),
        ACTIVATION=activation,
        BN_AFTER_ACTIVATION=bn_after_activation,
        EVEN_K=in_channels % config.block_k == 0,
        ARITHMETIC=arithmetic.constexpr(),
    )
    return out


def _with_everything(empty: Empty) -> Tensor:
    """An expansion of CMT's."""
    return linear(
        *(empty(8, 784, 64), empty(256, 64), empty(256), empty.dtype),
        norm_weight=empty(64),
        norm_bias=empty(64),
        norm_eps=1e-6,
        activation="gelu",
        bn=(*empty.batch_norm(256), 1e-5),
        residual=empty(8, 784, 256),
    )


SPECS = (Spec(linear_kernel, _with_everything, products=True),)
