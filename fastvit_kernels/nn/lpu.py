"""CMT's local perception unit."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LPU(nn.Conv2d):
    """A map plus its 3 x 3 depthwise convolution: CMT's local perception unit.

    Parameters are those of the convolution alone, `weight` `[dim, 1, 3, 3]` and `bias` `[dim]`: under the name `proj`
    this takes the weights of the official block.

    Equivalent plain PyTorch::

        out = x + F.conv2d(x, weight, bias, padding=1, groups=dim)

    Args:
        dim: channels.

    Source: Guo et al., "CMT: Convolutional Neural Networks Meet Vision Transformers", section 3.2.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, 3, padding=1, groups=dim)

    def forward(self, input: Tensor) -> Tensor:
        """`[B, dim, H, W]`, best in channels-last memory, to the same size."""
        return input + super().forward(input).contiguous(memory_format=torch.channels_last)
