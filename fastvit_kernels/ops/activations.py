"""Activations by name, as every backend knows them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("gelu", "quick_gelu")


def activate(x: Tensor, name: str) -> Tensor:
    """`gelu` is the exact (erf) one; `quick_gelu` is `x * sigmoid(1.702 x)`."""
    if name == "gelu":
        return F.gelu(x)
    return x * torch.sigmoid(1.702 * x)
