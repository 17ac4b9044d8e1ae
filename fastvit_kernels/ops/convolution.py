"""The convolution of every reference."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastvit_kernels.ops.precision import wide


def convolution(
    maps: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, groups: int = 1
) -> Tensor:
    """`F.conv2d` in the maps' dtype.

    On maps so narrow that a tap of the filter meets nothing but padding, a CPU's 16-bit convolution leaves that tap's
    gradient unwritten: such maps take the fp32 one, and round its result.
    """
    dtype = maps.dtype
    narrow = maps.device.type == "cpu" and dtype.itemsize == 2 and min(maps.shape[2:]) < weight.shape[-1] + stride
    compute = wide(dtype) if narrow else dtype
    bias = None if bias is None else bias.to(dtype).to(compute)
    return F.conv2d(maps.to(compute), weight.to(dtype).to(compute), bias, stride, padding, groups=groups).to(dtype)
