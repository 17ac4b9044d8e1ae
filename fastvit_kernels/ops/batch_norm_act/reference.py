"""Batch normalisation and an activation in plain PyTorch: the definition of the operator."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastvit_kernels.ops.activations import activate
from fastvit_kernels.ops.batch_norm import batch_moments, batch_normalize
from fastvit_kernels.ops.operator import Outputs, Tensors


class Static(NamedTuple):
    """The operator's static arguments."""

    activation: str
    bn_after_activation: bool
    bn_eps: float
    training: bool
    dtype: torch.dtype


STATIC_SCHEMA = "str activation, bool bn_after_activation, float bn_eps, bool training, ScalarType dtype"


def reference(tensors: Tensors, static: Static) -> Outputs:
    """Of `[x, bn_weight, bn_bias, bn_mean, bn_var]`.

    With `training` batch statistics are recomputed here.
    """
    weight, bias, mean, var = tensors[1:]
    maps = _met(tensors, static)
    if static.training:
        mean, var = batch_moments(maps)
    assert mean is not None and var is not None
    maps = batch_normalize(maps, weight, bias, mean, var, static.bn_eps)
    if not static.bn_after_activation:
        maps = activate(maps, static.activation)
    return (maps.flatten(2).transpose(1, 2).contiguous(),)


def batch_statistics(tensors: Tensors, static: Static) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of what the norm meets."""
    return batch_moments(_met(tensors, static))


def _met(tensors: Tensors, static: Static) -> Tensor:
    x = tensors[0]
    assert x is not None
    maps = x.to(static.dtype).transpose(1, 2).unsqueeze(3)
    return activate(maps, static.activation) if static.bn_after_activation else maps
