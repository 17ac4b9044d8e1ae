"""Activation modules that torch does not have."""

from __future__ import annotations

from torch import Tensor, nn

from fastvit_kernels.nn import checks
from fastvit_kernels.ops.activations import activate


class QuickGELU(nn.Module):
    """`x * sigmoid(1.702 x)`, the activation of CvT and CLIP. Any shape, any floating dtype."""

    def forward(self, x: Tensor) -> Tensor:
        checks.check_any_tensor("x", x)
        return activate(x, "quick_gelu")
