"""Gradients of norms in Triton."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit_kernels.ops import triton_support
from fastvit_kernels.ops.primitives import rows_and_columns, vector
from fastvit_kernels.ops.triton_moments import group_statistics
from fastvit_kernels.ops.triton_specs import Empty, Spec
from fastvit_kernels.ops.triton_sums import split_rows, sum_parts


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
    num_parts, part_rows = split_rows(num_rows, config.block_m, 1)
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
            part_rows,
            channels,
            eps,
        )
    if parts is None:
        return out, None, None
    like = parts.new_empty(channels)
    weight_sums, bias_sums = sum_parts(parts, like if weight is None else weight, like if bias is None else bias)
    return out, weight_sums if needs[1] else None, bias_sums if needs[2] else None


@triton.jit(do_not_specialize=["num_rows", "part_rows", "num_parts"])
def group_norm_sums_kernel(
    grad_ptr,
    x_ptr,
    statistics_ptr,
    parts_ptr,
    num_rows,
    part_rows,
    num_parts,
    channels,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """What `part_rows` of a sample's rows add to the gradients of the norm's weight and bias, for BLOCK_N channels."""
    tiles = tl.cdiv(channels, BLOCK_N)
    columns = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = columns < channels
    part = tl.program_id(0) // tiles
    sample = (part // num_parts).to(tl.int64)
    mean = tl.load(statistics_ptr + 2 * sample)
    rstd = tl.rsqrt(tl.load(statistics_ptr + 2 * sample + 1) + eps)
    first = part % num_parts * part_rows
    end = tl.minimum(first + part_rows, num_rows)
    weight_sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    bias_sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, end, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        offsets = (sample * num_rows + rows)[:, None] * channels + columns[None, :]
        mask = (rows < end)[:, None] & column_mask[None, :]
        grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        weight_sums += grad * ((x - mean) * rstd)
        bias_sums += grad
    parts_ptr += part.to(tl.int64) * 2 * channels + columns
    tl.store(parts_ptr, tl.sum(weight_sums, 0), mask=column_mask)
    tl.store(parts_ptr + channels, tl.sum(bias_sums, 0), mask=column_mask)


@triton.jit(do_not_specialize=["num_rows", "rows_of_sample"])
def group_norm_gradient_kernel(
    grad_ptr,
    x_ptr,
    weight_ptr,
    statistics_ptr,
    means_ptr,
    out_ptr,
    num_rows,
    rows_of_sample,
    channels,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The gradient of x, BLOCK_M rows and BLOCK_N channels.

    Where the statistics are x's own, `means_ptr` holds for every sample the means of the normalised values' gradients
    times those values, and of the gradients alone.
    """
    rows, columns = rows_and_columns(tl.program_id(0), channels, BLOCK_M, BLOCK_N)
    row_mask = rows < num_rows
    offsets = rows.to(tl.int64)[:, None] * channels + columns[None, :]
    mask = row_mask[:, None] & (columns < channels)[None, :]
    samples = rows // rows_of_sample
    rstd = tl.rsqrt(tl.load(statistics_ptr + 2 * samples + 1, mask=row_mask, other=1.0) + eps)
    grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    grad *= vector(weight_ptr, columns, columns < channels, 1.0, BLOCK_N)[None, :]
    if means_ptr is not None:
        mean = tl.load(statistics_ptr + 2 * samples, mask=row_mask, other=0.0)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        along = tl.load(means_ptr + 2 * samples, mask=row_mask, other=0.0)
        grad -= (x - mean[:, None]) * (rstd * along)[:, None]
        grad -= tl.load(means_ptr + 2 * samples + 1, mask=row_mask, other=0.0)[:, None]
    tl.store(out_ptr + offsets, grad * rstd[:, None], mask=mask)


def group_norm_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor | None,
    eps: float,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of a GroupNorm's x `[B, N, C]`, weight, bias and statistics, each None where it is not needed.

    The statistics are those of x itself, and get no gradient, when they are None. `grad` and x are dense.
    """
    batch, rows, channels = x.shape
    own = group_statistics(x) if statistics is None else statistics
    sums = x.new_zeros((batch, 2, channels), dtype=torch.float32)
    if x.numel() > 0:
        sums = _group_norm_sums(grad, x, own, eps)
    # Of each sample: the gradients of the normalised values, summed over all of them.
    totals = (sums if weight is None else sums * weight.float()).sum(2)
    found: list[Tensor | None] = [None] * 4
    if needs[0]:
        found[0] = out = torch.empty_like(x)
        config = triton_support.config("elementwise", triton_support.arithmetic(torch.float32, x.device), channels)
        if x.numel() > 0:
            triton_support.launch(
                group_norm_gradient_kernel,
                config.tiles(batch * rows, channels),
                x.device,
                config,
                grad,
                x,
                weight,
                own,
                totals / (rows * channels) if statistics is None else None,
                out,
                batch * rows,
                rows,
                channels,
                eps,
            )
    over_samples = sums.sum(0)
    for index, parameter in enumerate((weight, bias)):
        if parameter is not None and needs[1 + index]:
            found[1 + index] = over_samples[index].to(parameter.dtype, copy=True)
    if statistics is not None and needs[3]:
        rstd = torch.rsqrt(statistics[:, 1] + eps)
        found[3] = torch.stack([-rstd * totals[:, 1], -0.5 * rstd * rstd * totals[:, 0]], 1)
    return found


def _group_norm_sums(grad: Tensor, x: Tensor, statistics: Tensor, eps: float) -> Tensor:
    """For each sample `[B, 2, C]`: sums over the rows of the gradients times the normalised values, and of those."""
    batch, rows, channels = x.shape
    config = triton_support.config("sums", triton_support.arithmetic(torch.float32, x.device), channels)
    tiles = triton.cdiv(channels, config.block_n)
    num_parts, part_rows = split_rows(rows, config.block_m, tiles * batch)
    parts = x.new_empty((batch, num_parts, 2, channels), dtype=torch.float32)
    triton_support.launch(
        group_norm_sums_kernel,
        batch * num_parts * tiles,
        x.device,
        config,
        grad,
        x,
        statistics,
        parts,
        rows,
        part_rows,
        num_parts,
        channels,
        eps,
    )
    return parts.sum(1)


@triton.jit(do_not_specialize=["num_rows", "rows_of_sample"])
def statistics_gradient_kernel(
    grad_ptr,
    x_ptr,
    affine_ptr,
    out_ptr,
    num_rows,
    rows_of_sample,
    channels,
    PREFIX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`grad + slope * x + shift` with the slope and shift of every sample; prefix rows are `grad`'s."""
    rows, columns = rows_and_columns(tl.program_id(0), channels, BLOCK_M, BLOCK_N)
    row_mask = rows < num_rows
    offsets = rows.to(tl.int64)[:, None] * channels + columns[None, :]
    mask = row_mask[:, None] & (columns < channels)[None, :]
    samples = rows // rows_of_sample
    affected = row_mask & (rows % rows_of_sample >= PREFIX)
    slope = tl.load(affine_ptr + 2 * samples, mask=affected, other=0.0)
    shift = tl.load(affine_ptr + 2 * samples + 1, mask=affected, other=0.0)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, grad + slope[:, None] * x + shift[:, None], mask=mask)


def add_statistics_gradient(grad: Tensor, x: Tensor, statistics_grad: Tensor, num_prefix_tokens: int = 0) -> Tensor:
    """`grad` plus what `group_statistics(x, num_prefix_tokens)` with this gradient gives x, all of them dense."""
    batch, tokens, channels = x.shape
    out = torch.empty_like(grad)
    if out.numel() == 0:
        return out
    size = (tokens - num_prefix_tokens) * channels
    slope = statistics_grad[:, 1] * (2.0 / size)
    shift = statistics_grad[:, 0] / size - slope * group_statistics(x, num_prefix_tokens)[:, 0]
    config = triton_support.config("elementwise", triton_support.arithmetic(torch.float32, x.device), channels)
    triton_support.launch(
        statistics_gradient_kernel,
        config.tiles(batch * tokens, channels),
        x.device,
        config,
        grad,
        x,
        torch.stack([slope, shift], 1),
        out,
        batch * tokens,
        tokens,
        channels,
        PREFIX=num_prefix_tokens,
    )
    return out


def norm_gradient(
    kind: str,
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor | None,
    eps: float,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of x, weight, bias and statistics of one of `normalization.NORMS`, as above."""
    if kind == "group":
        return group_norm_gradient(grad, x, weight, bias, statistics, eps, needs)
    if kind == "layer":
        return [*layer_norm_gradient(grad, x, weight, bias, eps, needs[:3]), None]
    return [grad.to(x.dtype), None, None, None]


def _of_group_norm(empty: Empty) -> list[Tensor | None]:
    rows = empty(8, 784, 64), empty(8, 784, 64), empty(64), empty(64)
    return group_norm_gradient(*rows, None, 1e-6, (True, True, True, False))


SPECS = (
    Spec(
        layer_norm_gradient_kernel,
        lambda empty: layer_norm_gradient(
            *(empty(8, 784, 64), empty(8, 784, 64), empty(64), empty(64)), 1e-6, (True, True, True)
        ),
    ),
    Spec(group_norm_sums_kernel, _of_group_norm),
    Spec(group_norm_gradient_kernel, _of_group_norm),
    Spec(
        statistics_gradient_kernel,
        lambda empty: add_statistics_gradient(empty(8, 784, 64), empty(8, 784, 64), empty.wide(8, 2)),
    ),
)
