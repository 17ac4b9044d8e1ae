"""CvT's convolutional projection in plain PyTorch: the definition of the operator."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit_kernels.ops.batch_norm import batch_moments, batch_normalize
from fastvit_kernels.ops.convolution import convolution
from fastvit_kernels.ops.normalization import normalize
from fastvit_kernels.ops.operator import Outputs, Tensors

BRANCHES = ("q", "k", "v")
PER_BRANCH = 7


class Branch(NamedTuple):
    """The tensors of one branch, in the order the operator passes them."""

    conv_weight: Tensor
    bn_weight: Tensor | None
    bn_bias: Tensor | None
    bn_mean: Tensor | None
    bn_var: Tensor | None
    weight: Tensor
    bias: Tensor | None


class Static(NamedTuple):
    """The operator's static arguments; lists hold one entry per branch (q, k, v)."""

    norm_eps: float | None
    bn_eps: list[float]
    bn_training: bool
    height: int
    width: int
    num_prefix_tokens: int
    stride: list[int]
    padding: list[int]
    dtype: torch.dtype


STATIC_SCHEMA = (
    "float? norm_eps, float[] bn_eps, bool bn_training, SymInt height, SymInt width, int num_prefix_tokens, "
    "int[] stride, int[] padding, ScalarType dtype"
)


def branch(tensors: Tensors, index: int) -> Branch:
    """Branch 0 (q), 1 (k) or 2 (v) of the operator's tensor list `[x, norm_weight, norm_bias, *q, *k, *v]`."""
    first = 3 + PER_BRANCH * index
    return Branch(*tensors[first : first + PER_BRANCH])  # type: ignore[arg-type]


def output_grid(static: Static, index: int, kernel: int) -> tuple[int, int]:
    """Height and width of a branch's output map."""
    stride, padding = static.stride[index], static.padding[index]
    return (
        (static.height + 2 * padding - kernel) // stride + 1,
        (static.width + 2 * padding - kernel) // stride + 1,
    )


def depthwise(tokens: Tensor, weight: Tensor, static: Static, index: int) -> Tensor:
    """The depthwise convolution of a `[B, H*W, C]` map, as NCHW."""
    batch, _, channels = tokens.shape
    maps = tokens.transpose(1, 2).reshape(batch, channels, static.height, static.width)
    return convolution(maps, weight, None, static.stride[index], static.padding[index], groups=channels)


def _batch_norm(maps: Tensor, b: Branch, training: bool, eps: float) -> Tensor:
    if b.bn_mean is None and not training:
        return maps
    mean, var = batch_moments(maps) if training else (b.bn_mean, b.bn_var)
    assert mean is not None and var is not None
    return batch_normalize(maps, b.bn_weight, b.bn_bias, mean, var, eps)


def reference(tensors: Tensors, static: Static) -> Outputs:
    """`(q, k, v)`; with `bn_training` the batch statistics are recomputed here and `bn_mean`, `bn_var` are not read."""
    x, norm_weight, norm_bias = tensors[:3]
    assert x is not None
    normed = normalize(x, norm_weight, norm_bias, static.norm_eps, static.dtype)
    prefix, tokens = normed.split([static.num_prefix_tokens, normed.shape[1] - static.num_prefix_tokens], dim=1)
    outputs = []
    for index in range(len(BRANCHES)):
        b = branch(tensors, index)
        maps = depthwise(tokens, b.conv_weight, static, index)
        maps = _batch_norm(maps, b, static.bn_training, static.bn_eps[index])
        rows = torch.cat([prefix, maps.flatten(2).transpose(1, 2)], dim=1)
        bias = None if b.bias is None else b.bias.to(static.dtype)
        outputs.append(F.linear(rows, b.weight.to(static.dtype), bias))
    return tuple(outputs)


def batch_statistics(tensors: Tensors, static: Static) -> Tensor:
    """Mean and biased variance `[3, 2, C]` (fp32, or fp64 for fp64 input) of the three depthwise outputs."""
    x, norm_weight, norm_bias = tensors[:3]
    assert x is not None
    normed = normalize(x, norm_weight, norm_bias, static.norm_eps, static.dtype)
    tokens = normed[:, static.num_prefix_tokens :]
    rows = []
    for index in range(len(BRANCHES)):
        maps = depthwise(tokens, branch(tensors, index).conv_weight, static, index)
        rows.append(torch.stack(batch_moments(maps)))
    return torch.stack(rows)
