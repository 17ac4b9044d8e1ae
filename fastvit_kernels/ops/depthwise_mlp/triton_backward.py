"""Gradients of depthwise_mlp in Triton: the hidden maps are computed again and go through memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit_kernels.ops import library
from fastvit_kernels.ops.depthwise_mlp.reference import BATCH_NORMS, Static
from fastvit_kernels.ops.operator import Tensors
from fastvit_kernels.ops.triton_depthwise import (
    Geometry,
    depthwise,
    depthwise_filter_gradient,
    depthwise_input_gradient,
    filter_rows,
)
from fastvit_kernels.ops.triton_gradients import input_gradient, weight_gradient
from fastvit_kernels.ops.triton_linear import linear
from fastvit_kernels.ops.triton_moments import group_statistics
from fastvit_kernels.ops.triton_norm_gradients import add_statistics_gradient, group_norm_gradient, layer_norm_gradient
from fastvit_kernels.ops.triton_normalization import normalize_rows
from fastvit_kernels.ops.triton_steps import Step, batch_norm_gradients, batch_norm_sums, gradient_behind


class Maps(NamedTuple):
    """What the forward makes of the rows without prefix tokens, in the compute dtype, step by step.

    Attributes:
        rows: x without prefix rows, in its own dtype.
        normed: `rows` behind the norm.
        before_hidden, hidden: in front of the first batch norm and activation, and behind them.
        before_mixed, mixed: in front of those behind the convolution, and behind them.
        projected, branch: in front of the last batch norm, and behind it; empty where nobody reads them.
    """

    rows: Tensor
    normed: Tensor
    before_hidden: Tensor
    hidden: Tensor
    before_mixed: Tensor
    mixed: Tensor
    projected: Tensor
    branch: Tensor


class Call(NamedTuple):
    """One call of the operator's backward: its arguments and, by position, the gradients found so far."""

    tensors: Tensors
    needs: Sequence[bool]
    static: Static
    found: list[Tensor | None]

    def tensor(self, index: int) -> Tensor:
        found = self.tensors[index]
        assert found is not None
        return found

    def step(self, index: int, activation: str) -> Step:
        """Batch norm number `index` with an activation."""
        static, first = self.static, BATCH_NORMS[index]
        bn = (*self.tensors[first : first + 4], static.bn_eps[index])
        has_bn = bn[2] is not None
        return Step(activation, bn, static.bn_after_activation, static.training and has_bn)

    def sums(self, index: int, grad: Tensor, x: Tensor, step: Step) -> Tensor | None:
        """Leave the gradients of batch norm number `index`, where it has any, and return what they are made of."""
        first = BATCH_NORMS[index]
        if step.bn[2] is None or not (step.training or any(self.needs[first : first + 4])):
            return None
        sums = batch_norm_sums(grad, x, step)
        self.found[first : first + 4] = batch_norm_gradients(step, sums)
        return sums

    @property
    def geometry(self) -> Geometry:
        static, kernel = self.static, self.tensor(10).shape[-1]
        return Geometry(static.height, static.width, static.height, static.width, kernel, 1, kernel // 2, 0)


def run(grads: Sequence[Tensor], tensors: Tensors, needs: Sequence[bool], static: Static) -> list[Tensor]:
    """The forward's maps again, then backwards through them, as far as gradients are needed."""
    call = Call(library.dense(tensors), needs, static, [None] * len(tensors))
    residual, prefix = call.tensors[24], static.num_prefix_tokens
    grad = grads[0].contiguous()
    deep = any(needs[:24])
    if deep or static.summary == "statistics":
        maps = _forward(call)
    if static.summary == "statistics":
        grad = add_statistics_gradient(grad, _result(call, maps, grad), grads[1], prefix)
    if needs[24] and residual is not None:
        call.found[24] = grad.to(residual.dtype, copy=True)
    if deep:
        grad = grad[:, prefix:].contiguous()
        if static.summary == "mean":
            grad = (grad + (grads[1] / grad.shape[1])[:, None]).to(static.dtype)
        grad = _through_projection(call, maps, grad)
        if any(needs[:16]):
            grad = _through_convolution(call, maps, grad)
        if any(needs[:10]):
            _through_expansion(call, maps, grad)
    return [g for g, needed in zip(call.found, needs, strict=True) if needed and g is not None]


def _forward(call: Call) -> Maps:
    tensors, static = call.tensors, call.static
    x, norm_weight, norm_bias, statistics, _, fc1_bias = tensors[:6]
    assert x is not None
    dtype, out_channels = static.dtype, call.tensor(16).shape[0]
    rows = x[:, static.num_prefix_tokens :].contiguous()
    normed = rows
    if static.norm != "none":
        normed = torch.empty_like(rows, dtype=dtype)
        if static.norm == "group" and statistics is None:
            statistics = group_statistics(rows)
        normalize_rows(rows, normed, norm_weight, norm_bias, static.norm_eps, statistics=statistics)
    expand, mix, project = (
        call.step(i, a) for i, a in enumerate((static.hidden_activation, static.activation, "none"))
    )
    before_hidden = hidden = rows.new_empty((*rows.shape[:2], call.tensor(4).shape[0]), dtype=dtype)
    if expand.is_nothing:
        hidden = before_hidden = linear(normed, call.tensor(4), fc1_bias, dtype)
    else:
        hidden = linear(
            normed,
            call.tensor(4),
            fc1_bias,
            dtype,
            activation=expand.activation,
            bn=expand.bn,
            bn_after_activation=expand.bn_after_activation,
            before=before_hidden,
        )
    before_mixed, mixed = torch.empty_like(hidden), torch.empty_like(hidden)
    filter = filter_rows(call.tensor(10))
    depthwise(hidden, filter, tensors[11], call.geometry, mix, before_mixed, mixed, static.inner_residual)
    projected = branch = rows.new_empty((*rows.shape[:2], out_channels), dtype=dtype)
    if project.bn[2] is not None or static.out_norm_eps is not None or static.summary == "statistics":
        branch = linear(mixed, call.tensor(16), tensors[17], dtype, bn=project.bn, before=projected)
    return Maps(rows, normed, before_hidden, hidden, before_mixed, mixed, projected, branch)


def _result(call: Call, maps: Maps, like: Tensor) -> Tensor:
    """The operator's result, but for its prefix rows."""
    static, prefix = call.static, call.static.num_prefix_tokens
    (weight, bias), residual = call.tensors[22:24], call.tensors[24]
    branch = maps.branch
    if static.out_norm_eps is not None:
        branch = torch.empty_like(branch)
        normalize_rows(maps.branch, branch, weight, bias, static.out_norm_eps, statistics=group_statistics(maps.branch))
    if prefix:
        branch = F.pad(branch, (0, 0, prefix, 0))
    return (branch if residual is None else residual + branch).to(like.dtype)


def _through_projection(call: Call, maps: Maps, grad: Tensor) -> Tensor:
    """From the gradient of the branch to that of `mixed`."""
    static, needs, tensors = call.static, call.needs, call.tensors
    if static.out_norm_eps is not None:
        weight, bias = tensors[22:24]
        wanted = (True, *needs[22:24], False)
        through = group_norm_gradient(grad, maps.branch, weight, bias, None, static.out_norm_eps, wanted)
        call.found[22:24] = through[1:3]
        assert through[0] is not None
        grad = through[0]
    step = call.step(2, "none")
    if step.bn[2] is not None:
        sums = call.sums(2, grad, maps.projected, step)
        grad = gradient_behind(grad, maps.projected, step, sums)
    fc2_weight = call.tensor(16)
    call.found[16:18] = weight_gradient(grad, maps.mixed, fc2_weight, tensors[17], static.dtype, needs[16:18])
    return input_gradient(grad, fc2_weight, static.dtype, static.dtype)


def _through_convolution(call: Call, maps: Maps, grad: Tensor) -> Tensor:
    """From the gradient of `mixed` to that of `before_hidden`."""
    static, needs = call.static, call.needs
    step = call.step(1, static.activation)
    behind = grad
    grad = gradient_behind(grad, maps.before_mixed, step, call.sums(1, grad, maps.before_mixed, step))
    weight, bias = call.tensor(10), call.tensors[11]
    if needs[10] or needs[11]:
        call.found[10:12] = depthwise_filter_gradient(maps.hidden, grad, weight, bias, call.geometry)
    added = {"none": None, "before_activation": grad, "after_activation": behind}[static.inner_residual]
    out, filter = torch.empty_like(maps.hidden), filter_rows(weight)
    step = call.step(0, static.hidden_activation)
    if step.is_nothing:
        depthwise_input_gradient(grad, filter, call.geometry, out, added=added)
    elif step.bn[2] is None or not (step.training or any(needs[6:10])):
        depthwise_input_gradient(grad, filter, call.geometry, out, added=added, x=maps.before_hidden, step=step)
    else:
        depthwise_input_gradient(grad, filter, call.geometry, out, added=added)
        out = gradient_behind(out, maps.before_hidden, step, call.sums(0, out, maps.before_hidden, step))
    return out


def _through_expansion(call: Call, maps: Maps, grad: Tensor) -> None:
    """From the gradient of `before_hidden` to that of x."""
    static, needs, tensors = call.static, call.needs, call.tensors
    x, norm_weight, norm_bias, statistics = tensors[:4]
    assert x is not None
    weight, prefix, dtype = call.tensor(4), static.num_prefix_tokens, static.dtype
    call.found[4:6] = weight_gradient(grad, maps.normed, weight, tensors[5], dtype, needs[4:6])
    if not any(needs[:4]):
        return
    grad = input_gradient(grad, weight, dtype, x.dtype if static.norm == "none" else dtype)
    found: Sequence[Tensor | None] = [grad]
    if static.norm == "layer":
        found = layer_norm_gradient(grad, maps.rows, norm_weight, norm_bias, static.norm_eps, needs[:3])
    elif static.norm == "group":
        affine = norm_weight, norm_bias, statistics
        found = group_norm_gradient(grad, maps.rows, *affine, static.norm_eps, needs[:4])
    call.found[: len(found)] = found
    if prefix and found[0] is not None:
        call.found[0] = F.pad(found[0], (0, 0, prefix, 0))
