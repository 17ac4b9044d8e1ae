"""A batch norm and an activation behind each other, in either order, and their gradients in Triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit_kernels.ops import triton_support
from fastvit_kernels.ops.primitives import activate, activation_gradient, batch_normalize, rows_and_columns, vector
from fastvit_kernels.ops.triton_linear import NO_BATCH_NORM, BatchNormTensors
from fastvit_kernels.ops.triton_specs import Empty, Spec
from fastvit_kernels.ops.triton_sums import split_rows, sum_parts


class Step(NamedTuple):
    """A batch norm and an activation.

    Attributes:
        activation: its name, or `"none"`.
        bn: the batch norm's tensors.
        bn_after_activation: which comes first.
        training: the batch norm's mean and variance are those of its own input: gradients go through them, too.
    """

    activation: str
    bn: BatchNormTensors = NO_BATCH_NORM
    bn_after_activation: bool = False
    training: bool = False

    @property
    def is_nothing(self) -> bool:
        return self.activation == "none" and self.bn[2] is None


@triton.jit
def apply_step(x, bn, columns, mask, ACTIVATION: tl.constexpr, BN_AFTER_ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """A tile `[rows, columns]` through batch norm and activation."""
    if not BN_AFTER_ACTIVATION:
        x = batch_normalize(x, bn, columns, mask, BLOCK)
    x = activate(x, ACTIVATION)
    if BN_AFTER_ACTIVATION:
        x = batch_normalize(x, bn, columns, mask, BLOCK)
    return x


@triton.jit(do_not_specialize=["num_rows"])
def step_kernel(
    x_ptr,
    bn,
    added_ptr,
    out_ptr,
    num_rows,
    channels,
    ACTIVATION: tl.constexpr,
    BN_AFTER_ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`apply_step` of BLOCK_M rows and BLOCK_N channels, and what is added to it."""
    rows, columns = rows_and_columns(tl.program_id(0), channels, BLOCK_M, BLOCK_N)
    offsets = rows.to(tl.int64)[:, None] * channels + columns[None, :]
    mask = (rows < num_rows)[:, None] & (columns < channels)[None, :]
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    x = apply_step(x, bn, columns, columns < channels, ACTIVATION, BN_AFTER_ACTIVATION, BLOCK_N)
    if added_ptr is not None:
        x += tl.load(added_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, x, mask=mask)


@triton.jit
def normed_gradient(
    grad, x, bn, columns, mask, ACTIVATION: tl.constexpr, BN_AFTER_ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):
    """The gradient of the batch norm's result, and its input with the mean taken off and the variance made 1."""
    weight_ptr, bias_ptr, mean_ptr, variance_ptr, eps = bn
    mean = vector(mean_ptr, columns, mask, 0.0, BLOCK)
    rstd = tl.rsqrt(vector(variance_ptr, columns, mask, 1.0, BLOCK) + eps)
    if BN_AFTER_ACTIVATION:
        normed = (activate(x, ACTIVATION) - mean[None, :]) * rstd[None, :]
    else:
        normed = (x - mean[None, :]) * rstd[None, :]
        y = normed * vector(weight_ptr, columns, mask, 1.0, BLOCK)[None, :]
        y += vector(bias_ptr, columns, mask, 0.0, BLOCK)[None, :]
        grad = grad * activation_gradient(y, ACTIVATION)
    return grad, normed, rstd


@triton.jit
def step_gradient(
    grad,
    x,
    bn,
    means_ptr,
    channels,
    columns,
    mask,
    ACTIVATION: tl.constexpr,
    BN_AFTER_ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of `apply_step`'s input x from that of its result.

    In training `means_ptr` holds, for each channel, the mean over all rows of `normed_gradient`'s gradient times its
    normalised input, and behind all of those the mean of that gradient.
    """
    weight_ptr, bias_ptr, mean_ptr, variance_ptr, eps = bn
    if mean_ptr is None:
        grad = grad * activation_gradient(x, ACTIVATION)
    else:
        grad, normed, rstd = normed_gradient(grad, x, bn, columns, mask, ACTIVATION, BN_AFTER_ACTIVATION, BLOCK)
        if means_ptr is not None:
            grad -= normed * vector(means_ptr, columns, mask, 0.0, BLOCK)[None, :]
            grad -= vector(means_ptr + channels, columns, mask, 0.0, BLOCK)[None, :]
        grad = grad * (rstd * vector(weight_ptr, columns, mask, 1.0, BLOCK))[None, :]
        if BN_AFTER_ACTIVATION:
            grad = grad * activation_gradient(x, ACTIVATION)
    return grad


@triton.jit(do_not_specialize=["num_rows"])
def step_gradient_kernel(
    grad_ptr,
    x_ptr,
    bn,
    means_ptr,
    out_ptr,
    num_rows,
    channels,
    ACTIVATION: tl.constexpr,
    BN_AFTER_ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`step_gradient` of BLOCK_M rows and BLOCK_N channels."""
    rows, columns = rows_and_columns(tl.program_id(0), channels, BLOCK_M, BLOCK_N)
    offsets = rows.to(tl.int64)[:, None] * channels + columns[None, :]
    mask = (rows < num_rows)[:, None] & (columns < channels)[None, :]
    grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    grad = step_gradient(
        *(grad, x, bn, means_ptr, channels, columns, columns < channels),
        *(ACTIVATION, BN_AFTER_ACTIVATION, BLOCK_N),
    )
    tl.store(out_ptr + offsets, grad, mask=mask)


@triton.jit(do_not_specialize=["num_rows", "part_rows"])
def step_sums_kernel(
    grad_ptr,
    x_ptr,
    bn,
    parts_ptr,
    num_rows,
    part_rows,
    channels,
    ACTIVATION: tl.constexpr,
    BN_AFTER_ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """What `part_rows` rows add to the gradients of the batch norm's weight and bias, for BLOCK_N channels."""
    tiles = tl.cdiv(channels, BLOCK_N)
    columns = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = columns < channels
    part = tl.program_id(0) // tiles
    first = part * part_rows
    end = tl.minimum(first + part_rows, num_rows)
    weight_sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    bias_sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, end, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        offsets = rows.to(tl.int64)[:, None] * channels + columns[None, :]
        mask = (rows < end)[:, None] & column_mask[None, :]
        grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        grad, normed, _ = normed_gradient(grad, x, bn, columns, column_mask, ACTIVATION, BN_AFTER_ACTIVATION, BLOCK_N)
        weight_sums += grad * normed
        bias_sums += grad
    parts_ptr += part.to(tl.int64) * 2 * channels + columns
    tl.store(parts_ptr, tl.sum(weight_sums, 0), mask=column_mask)
    tl.store(parts_ptr + channels, tl.sum(bias_sums, 0), mask=column_mask)


def apply(x: Tensor, step: Step, added: Tensor | None = None) -> Tensor:
    """What `step` makes of dense rows, plus `added`, in x's dtype."""
    out = torch.empty_like(x)
    channels = x.shape[-1]
    num_rows = x.numel() // channels
    config = triton_support.config("elementwise", triton_support.arithmetic(torch.float32, x.device), channels)
    if num_rows > 0:
        triton_support.launch(
            step_kernel,
            config.tiles(num_rows, channels),
            x.device,
            config,
            x,
            step.bn,
            added,
            out,
            num_rows,
            channels,
            ACTIVATION=step.activation,
            BN_AFTER_ACTIVATION=step.bn_after_activation,
        )
    return out


def batch_norm_sums(grad: Tensor, x: Tensor, step: Step) -> Tensor:
    """The gradients of the batch norm's weight and bias `[2, C]` in fp32, from the gradient of the step's result."""
    channels = x.shape[-1]
    num_rows = x.numel() // channels
    config = triton_support.config("sums", triton_support.arithmetic(torch.float32, x.device), channels)
    tiles = triton.cdiv(channels, config.block_n)
    num_parts, part_rows = split_rows(num_rows, config.block_m, tiles)
    parts = x.new_empty((num_parts, 2 * channels), dtype=torch.float32)
    if num_parts > 0:
        triton_support.launch(
            step_sums_kernel,
            num_parts * tiles,
            x.device,
            config,
            grad,
            x,
            step.bn,
            parts,
            num_rows,
            part_rows,
            channels,
            ACTIVATION=step.activation,
            BN_AFTER_ACTIVATION=step.bn_after_activation,
        )
    return sum_parts(parts, parts.new_empty(2, channels))[0]


def batch_norm_means(step: Step, sums: Tensor | None, num_rows: int) -> Tensor | None:
    """What `step_gradient` takes in training."""
    return sums / num_rows if step.training and sums is not None else None


def gradient_behind(grad: Tensor, x: Tensor, step: Step, sums: Tensor | None) -> Tensor:
    """The gradient of the step's input x, from that of its result and, in training, `batch_norm_sums` of both."""
    channels = x.shape[-1]
    num_rows = x.numel() // channels
    out = torch.empty_like(x)
    config = triton_support.config("elementwise", triton_support.arithmetic(torch.float32, x.device), channels)
    if num_rows > 0:
        triton_support.launch(
            step_gradient_kernel,
            config.tiles(num_rows, channels),
            x.device,
            config,
            grad,
            x,
            step.bn,
            batch_norm_means(step, sums, num_rows),
            out,
            num_rows,
            channels,
            ACTIVATION=step.activation,
            BN_AFTER_ACTIVATION=step.bn_after_activation,
        )
    return out


def batch_norm_gradients(step: Step, sums: Tensor) -> list[Tensor | None]:
    """The gradients of the batch norm's weight, bias, mean and variance; None for those it does not have."""
    weight, bias, mean, variance, eps = step.bn
    assert isinstance(mean, Tensor) and isinstance(variance, Tensor) and isinstance(eps, float)
    found: list[Tensor | None] = [None, None, torch.zeros_like(mean), torch.zeros_like(variance)]
    scale = torch.rsqrt(variance.float() + eps)
    factor = scale
    if isinstance(weight, Tensor):
        found[0] = sums[0].to(weight.dtype, copy=True)
        factor = scale * weight.float()
    if isinstance(bias, Tensor):
        found[1] = sums[1].to(bias.dtype, copy=True)
    if not step.training:
        found[2] = (-factor * sums[1]).to(mean.dtype)
        found[3] = (-0.5 * factor * scale * sums[0]).to(variance.dtype)
    return found


def through_step(grad: Tensor, x: Tensor, step: Step, needs: Sequence[bool]) -> tuple[Tensor, list[Tensor | None]]:
    """The gradient of the step's input x, and those of its batch norm's four tensors where one of them is needed."""
    found: list[Tensor | None] = [None] * 4
    if step.is_nothing:
        return grad, found
    sums = None
    if step.bn[2] is not None and (step.training or any(needs)):
        sums = batch_norm_sums(grad, x, step)
        found = batch_norm_gradients(step, sums)
    return gradient_behind(grad, x, step, sums), found


def _step(empty: Empty) -> Step:
    return Step("gelu", (*empty.batch_norm(256), 1e-5), training=True)


SPECS = (
    Spec(step_kernel, lambda empty: apply(empty(8, 784, 256), _step(empty), empty(8, 784, 256))),
    Spec(step_sums_kernel, lambda empty: batch_norm_sums(empty(8, 784, 256), empty(8, 784, 256), _step(empty))),
    Spec(
        step_gradient_kernel,
        lambda empty: gradient_behind(empty(8, 784, 256), empty(8, 784, 256), _step(empty), empty.wide(2, 256)),
    ),
)
