"""The MLP with a depthwise convolution in its middle, in plain PyTorch: the definition of the operator."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit_kernels.ops.activations import activate
from fastvit_kernels.ops.batch_norm import batch_moments, batch_normalize
from fastvit_kernels.ops.convolution import convolution
from fastvit_kernels.ops.normalization import group_normalize, group_statistics, normalize_by
from fastvit_kernels.ops.operator import Outputs, Tensors
from fastvit_kernels.ops.precision import wide

INNER_RESIDUALS = ("none", "before_activation", "after_activation")
# Where each batch norm's weight, bias, mean and variance begin in the tensor list.
BATCH_NORMS = (6, 12, 18)

Statistics = list["tuple[Tensor, Tensor] | None"]


class Static(NamedTuple):
    """The operator's static arguments."""

    norm: str
    norm_eps: float
    hidden_activation: str
    activation: str
    inner_residual: str
    bn_after_activation: bool
    bn_eps: list[float]
    training: bool
    out_norm_eps: float | None
    height: int
    width: int
    num_prefix_tokens: int
    summary: str
    dtype: torch.dtype


STATIC_SCHEMA = (
    "str norm, float norm_eps, str hidden_activation, str activation, str inner_residual, bool bn_after_activation, "
    "float[] bn_eps, bool training, float? out_norm_eps, SymInt height, SymInt width, int num_prefix_tokens, "
    "str summary, ScalarType dtype"
)


def reference(tensors: Tensors, static: Static) -> Outputs:
    """The result and its summary; with `training` batch statistics are recomputed here, those in the list not read.

    Of `[x, norm_weight, norm_bias, norm_statistics, fc1_weight, fc1_bias, *bn1, dw_weight, dw_bias, *bn2, fc2_weight,
    fc2_bias, *bn3, out_norm_weight, out_norm_bias, residual]`, each batch norm as weight, bias, mean, variance.
    """
    return _run(tensors, static, None)


def batch_statistics(tensors: Tensors, static: Static) -> Statistics:
    """Mean and biased variance of what each batch norm meets in this batch; None where there is no batch norm.

    A batch norm is there when its place for the mean holds a tensor.
    """
    found: Statistics = []
    _run(tensors, static, found)
    return found


def _run(tensors: Tensors, static: Static, record: Statistics | None) -> Outputs:
    x, norm_weight, norm_bias, norm_statistics, fc1_weight, fc1_bias = tensors[:6]
    dw_weight, dw_bias, fc2_weight, fc2_bias = (tensors[index] for index in (10, 11, 16, 17))
    out_norm_weight, out_norm_bias, residual = tensors[22:]
    assert x is not None and fc1_weight is not None and dw_weight is not None and fc2_weight is not None
    prefix, dtype = static.num_prefix_tokens, static.dtype

    def batch_norm(maps: Tensor, index: int) -> Tensor:
        weight, bias, mean, var = tensors[BATCH_NORMS[index] : BATCH_NORMS[index] + 4]
        if mean is None or var is None:
            if record is not None:
                record.append(None)
            return maps
        if static.training:
            mean, var = batch_moments(maps)
            if record is not None:
                record.append((mean, var))
        return batch_normalize(maps, weight, bias, mean, var, static.bn_eps[index])

    normed = normalize_by(
        static.norm, x, norm_statistics, norm_weight, norm_bias, static.norm_eps, dtype, num_prefix_tokens=prefix
    )
    hidden = _map(_linear(normed[:, prefix:], fc1_weight, fc1_bias, dtype), static)
    if not static.bn_after_activation:
        hidden = batch_norm(hidden, 0)
    hidden = activate(hidden, static.hidden_activation)
    if static.bn_after_activation:
        hidden = batch_norm(hidden, 0)
    y = convolution(hidden, dw_weight, dw_bias, 1, dw_weight.shape[-1] // 2, groups=hidden.shape[1])
    if static.inner_residual == "before_activation":
        y = y + hidden
    if not static.bn_after_activation:
        y = batch_norm(y, 1)
    y = activate(y, static.activation)
    if static.bn_after_activation:
        y = batch_norm(y, 1)
    if static.inner_residual == "after_activation":
        y = y + hidden
    out = _linear(y.flatten(2).transpose(1, 2), fc2_weight, fc2_bias, dtype)
    out = batch_norm(_map(out, static), 2).flatten(2).transpose(1, 2)
    if static.out_norm_eps is not None:
        out = group_normalize(out, group_statistics(out), out_norm_weight, out_norm_bias, static.out_norm_eps, dtype)
    summary = x.new_empty(0, dtype=wide(dtype))
    if static.summary == "mean":
        summary = out.to(wide(dtype)).mean(1)
    if prefix:
        out = F.pad(out, (0, 0, prefix, 0))
    out = out if residual is None else residual + out
    if static.summary == "statistics":
        summary = group_statistics(out, prefix)
    return out.contiguous(), summary


def _map(rows: Tensor, static: Static) -> Tensor:
    return rows.transpose(1, 2).reshape(rows.shape[0], rows.shape[2], static.height, static.width)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
