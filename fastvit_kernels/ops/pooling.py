"""Average pooling by squares that do not overlap."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def pooled_side(side: int, kernel_size: int, ceil_mode: bool) -> int:
    """How many squares a side of the map is cut into."""
    return -(-side // kernel_size) if ceil_mode else side // kernel_size


def average_pool(x: Tensor, kernel_size: int, ceil_mode: bool) -> Tensor:
    """`F.avg_pool2d(x, kernel_size, ceil_mode=ceil_mode)` of `[B, C, H, W]`.

    With `ceil_mode` the squares at the right and at the bottom average the pixels that are there. PyTorch's own
    argument is left alone: torch.compile makes a wrong gradient of it (seen in torch 2.13).
    """
    right, bottom = -x.shape[3] % kernel_size, -x.shape[2] % kernel_size
    if not ceil_mode or (right == 0 and bottom == 0):
        return F.avg_pool2d(x, kernel_size)
    padding = (0, right, 0, bottom)
    shares = F.avg_pool2d(F.pad(x.new_ones((1, 1, *x.shape[2:])), padding), kernel_size)
    return F.avg_pool2d(F.pad(x, padding), kernel_size) / shares
