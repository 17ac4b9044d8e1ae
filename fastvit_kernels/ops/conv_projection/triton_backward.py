"""Gradients of conv_projection in Triton: what the convolutions give is computed again and goes through memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvit_kernels.ops import library
from fastvit_kernels.ops.conv_projection.reference import BRANCHES, PER_BRANCH, Static, branch
from fastvit_kernels.ops.conv_projection.triton_kernels import geometry
from fastvit_kernels.ops.operator import Tensors
from fastvit_kernels.ops.triton_depthwise import (
    depthwise,
    depthwise_filter_gradient,
    depthwise_input_gradient,
    filter_rows,
)
from fastvit_kernels.ops.triton_gradients import input_gradient, weight_gradient
from fastvit_kernels.ops.triton_norm_gradients import layer_norm_gradient
from fastvit_kernels.ops.triton_normalization import normalize_rows
from fastvit_kernels.ops.triton_steps import Step, through_step


def run(grads: Sequence[Tensor], tensors: Tensors, needs: Sequence[bool], static: Static) -> list[Tensor]:
    """Each branch from its rows back to the normalised tokens, where their gradients add up; then the norm's own."""
    tensors = library.dense(tensors)
    x, norm_weight, norm_bias = tensors[:3]
    assert x is not None
    found: list[Tensor | None] = [None] * len(tensors)
    normed = x
    if static.norm_eps is not None:
        normed = torch.empty_like(x, dtype=static.dtype)
        normalize_rows(x, normed, norm_weight, norm_bias, static.norm_eps)
    total = torch.empty_like(normed) if any(needs[:3]) else None
    for index in range(len(BRANCHES)):
        own = slice(3 + PER_BRANCH * index, 3 + PER_BRANCH * (index + 1))
        found[own] = _through_branch(grads[index].contiguous(), normed, tensors, needs[own], static, index, total)
    if total is not None and static.norm_eps is None:
        found[0] = total
    elif total is not None and static.norm_eps is not None:
        found[:3] = layer_norm_gradient(total, x, norm_weight, norm_bias, static.norm_eps, needs[:3])
    return [g for g, needed in zip(found, needs, strict=True) if needed and g is not None]


def _through_branch(
    grad: Tensor,
    normed: Tensor,
    tensors: Tensors,
    needs: Sequence[bool],
    static: Static,
    index: int,
    total: Tensor | None,
) -> list[Tensor | None]:
    """The gradients of a branch's own tensors; those of the normalised tokens are added to `total`.

    The first branch begins `total`.
    """
    b = branch(tensors, index)
    found: list[Tensor | None] = [None] * PER_BRANCH
    prefix, dtype = static.num_prefix_tokens, static.dtype
    sizes, filter = geometry(tensors, static, index), filter_rows(b.conv_weight)
    step = Step("none", (*b[1:5], static.bn_eps[index]), training=static.bn_training)
    behind_linear = total is not None or any(needs[:5])
    with_convolved = behind_linear and not step.is_nothing
    # Where nobody reads them any tensor does.
    rows = convolved = grad
    if needs[5]:
        rows = normed.new_empty((*grad.shape[:2], normed.shape[2]), dtype=dtype)
        if prefix:
            rows[:, :prefix].copy_(normed[:, :prefix])
    if with_convolved:
        convolved = normed.new_empty((len(grad), grad.shape[1] - prefix, normed.shape[2]), dtype=dtype)
    if needs[5] or with_convolved:
        targets = convolved if with_convolved else None, rows if needs[5] else None
        depthwise(normed, filter, None, sizes, step, *targets)
    found[5:7] = weight_gradient(grad, rows, b.weight, b.bias, dtype, needs[5:7])
    if not behind_linear:
        return found
    rows_grad = input_gradient(grad, b.weight, dtype, dtype)
    pixels, found[1:5] = through_step(rows_grad[:, prefix:].contiguous(), convolved, step, needs[1:5])
    if needs[0]:
        found[0], _ = depthwise_filter_gradient(normed, pixels, b.conv_weight, None, sizes)
    if total is not None:
        depthwise_input_gradient(pixels, filter, sizes, total, added=total if index > 0 else None)
        if prefix and index > 0:
            total[:, :prefix] += rows_grad[:, :prefix]
        elif prefix:
            total[:, :prefix] = rows_grad[:, :prefix]
    return found
