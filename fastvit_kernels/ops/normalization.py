"""The LayerNorm in front of an operator, as every reference applies it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit_kernels.ops.precision import wide


def normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float | None, dtype: torch.dtype) -> Tensor:
    """LayerNorm over the last axis in at least fp32, then a cast to `dtype`; only the cast when `eps` is None."""
    if eps is not None:
        dtype_of_sums = wide(x.dtype)
        weight = None if weight is None else weight.to(dtype_of_sums)
        bias = None if bias is None else bias.to(dtype_of_sums)
        x = F.layer_norm(x.to(dtype_of_sums), (x.shape[-1],), weight, bias, eps)
    return x.to(dtype)
