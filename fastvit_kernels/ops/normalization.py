"""The LayerNorm in front of an operator, as every reference applies it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float | None, dtype: torch.dtype) -> Tensor:
    """LayerNorm over the last axis in at least fp32, then a cast to `dtype`; only the cast when `eps` is None."""
    if eps is not None:
        wide = torch.promote_types(x.dtype, torch.float32)
        weight = None if weight is None else weight.to(wide)
        bias = None if bias is None else bias.to(wide)
        x = F.layer_norm(x.to(wide), (x.shape[-1],), weight, bias, eps)
    return x.to(dtype)
