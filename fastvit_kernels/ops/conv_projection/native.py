"""The bridge to the C++ kernels of conv_projection."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvit_kernels.ops.conv_projection.reference import BRANCHES, Static, branch
from fastvit_kernels.ops.native import cpu_reasons, cuda_reasons, shared_memory_reasons
from fastvit_kernels.ops.operator import GradientKernels, Outputs, Tensors

# What the C++ kernels take; they hold a row of the padded map.
_MOST_PADDING = 64


class Cpu(GradientKernels):
    """C++ for the CPU: LayerNorm, the three depthwise convolutions, BN and the three linears in one pass over x."""

    name = "cpu"
    backward = "conv_projection_backward", "native"

    def supports(self, tensors: Tensors, static: Static) -> list[str]:
        reasons = cpu_reasons(tensors, static.dtype)
        if max(static.padding) > _MOST_PADDING:
            reasons.append(f"padding {max(static.padding)}: the CPU kernels take at most {_MOST_PADDING}")
        return reasons

    def run(self, tensors: Tensors, packed: Tensor | None, static: Static) -> Outputs:
        return tuple(torch.ops.fastvit.conv_projection.default(tensors, packed, *static))


# Of the CUDA kernels: the filter's side, and its stride.
_LARGEST_FILTER = 7
_LARGEST_STRIDE = 16


class Cuda:
    """C++ for GPUs: patches of the map are read and normalised once, filtered for q, k and v, and meet the weights."""

    name = "cuda"

    def supports(self, tensors: Tensors, static: Static) -> list[str]:
        found = cuda_reasons(tensors, None, static.dtype)
        branches = [branch(tensors, index) for index in range(len(BRANCHES))]
        if static.bn_training:
            found.append("batch statistics: the CUDA kernels take running ones")
        kernel = max(b.conv_weight.shape[-1] for b in branches)
        for what, value, most in (
            ("the filter's side", kernel, _LARGEST_FILTER),
            ("stride", max(static.stride), _LARGEST_STRIDE),
            ("padding", max(static.padding), _MOST_PADDING),
        ):
            if value > most:
                found.append(f"{what} {value}: the CUDA kernels take at most {most}")
        x = tensors[0]
        assert x is not None
        return found + shared_memory_reasons(shared_memory(x.shape[-1], kernel, static.dtype.itemsize), x.device)

    def run(self, tensors: Tensors, packed: Tensor | None, static: Static) -> Outputs:
        return tuple(torch.ops.fastvit.conv_projection.default(tensors, None, *static))


def shared_memory(channels: int, kernel: int, size: int) -> int:
    """Bytes of shared memory that the smallest block of the CUDA kernels needs, which makes one result of a branch.

    What `layout_of` in csrc/cuda/conv_projection.cu says of it, for filters of this side and values of this size;
    blocks are as large as pays.
    """
    step = 32 // size
    row = -(-channels // step) * step * size + 16
    taps = kernel**2
    places = -(-max(taps, 16) // 4) * 4
    # Results leave through the patch's tile, 32 rows at a time.
    tiles = max(taps, 32) * (64 * size + 16) + 16 * row
    return places * (4 + 8) + (1 + taps) * 64 * 4 + tiles + 3 * 64 * (128 + 16)
