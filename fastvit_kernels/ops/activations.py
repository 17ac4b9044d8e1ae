"""Activations by name, as every backend knows them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# Those of `pointwise_mlp`; `depthwise_mlp` has all.
ACTIVATIONS = ("gelu", "quick_gelu")
ALL_ACTIVATIONS = (*ACTIVATIONS, "silu", "relu")

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "relu": F.relu,
    "none": lambda x: x,
}


def activate(x: Tensor, name: str) -> Tensor:
    """`gelu` is the exact (erf) one; `quick_gelu` is `x * sigmoid(1.702 x)`; `none` returns x."""
    return _FUNCTIONS[name](x)
