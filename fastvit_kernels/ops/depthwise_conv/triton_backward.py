"""Gradients of depthwise_conv in Triton: what its norms take is computed again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvit_kernels.ops import library
from fastvit_kernels.ops.depthwise_conv.reference import Static
from fastvit_kernels.ops.depthwise_conv.triton_kernels import geometry, normalized
from fastvit_kernels.ops.operator import Tensors
from fastvit_kernels.ops.triton_depthwise import (
    depthwise,
    depthwise_filter_gradient,
    depthwise_input_gradient,
    filter_rows,
)
from fastvit_kernels.ops.triton_norm_gradients import layer_norm_gradient
from fastvit_kernels.ops.triton_steps import Step, through_step


def run(grads: Sequence[Tensor], tensors: Tensors, needs: Sequence[bool], static: Static) -> list[Tensor]:
    """Backwards through batch norm, convolution and LayerNorm, as far as gradients are needed."""
    tensors = library.dense(tensors)
    x, weight, bias, norm_weight, norm_bias, *bn, residual = tensors
    assert x is not None and weight is not None
    grad = grads[0].contiguous()
    found: list[Tensor | None] = [None] * len(tensors)
    if needs[9] and residual is not None:
        found[9] = grad.to(residual.dtype, copy=True)
    if any(needs[:9]):
        normed = normalized(x, norm_weight, norm_bias, static)
        sizes, filter = geometry(weight, static), filter_rows(weight)
        step = Step("none", (*bn, static.bn_eps), training=static.training)
        if not step.is_nothing:
            convolved = torch.empty_like(grad, dtype=static.dtype)
            depthwise(normed, filter, bias, sizes, Step("none"), convolved, None)
            grad, found[5:9] = through_step(grad, convolved, step, needs[5:9])
        if needs[1] or needs[2]:
            found[1:3] = depthwise_filter_gradient(normed, grad, weight, bias, sizes)
        if needs[0] or needs[3] or needs[4]:
            x_grad = torch.empty_like(normed)
            depthwise_input_gradient(grad, filter, sizes, x_grad)
            found[0] = x_grad
            if static.norm_eps is not None:
                affine = norm_weight, norm_bias, static.norm_eps, (needs[0], *needs[3:5])
                found[0], *found[3:5] = layer_norm_gradient(x_grad, x, *affine)
    return [g for g, needed in zip(found, needs, strict=True) if needed and g is not None]
