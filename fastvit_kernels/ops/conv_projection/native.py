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


# Of the CUDA kernels: a branch's channels, which stay in registers, its filter's side, and its stride.
_MOST_CHANNELS = 384
_LARGEST_FILTER = 7
_LARGEST_STRIDE = 16


class Cuda:
    """C++ for GPUs: patches of the normalised map are filtered in shared memory and meet the weights there."""

    name = "cuda"

    def supports(self, tensors: Tensors, static: Static) -> list[str]:
        found = cuda_reasons(tensors, None, static.dtype)
        branches = [branch(tensors, index) for index in range(len(BRANCHES))]
        if static.bn_training:
            found.append("batch statistics: the CUDA kernels take running ones")
        kernel = max(b.conv_weight.shape[-1] for b in branches)
        for what, value, most in (
            ("channels of a result", max(b.weight.shape[0] for b in branches), _MOST_CHANNELS),
            ("the filter's side", kernel, _LARGEST_FILTER),
            ("stride", max(static.stride), _LARGEST_STRIDE),
            ("padding", max(static.padding), _MOST_PADDING),
        ):
            if value > most:
                found.append(f"{what} {value}: the CUDA kernels take at most {most}")
        x = tensors[0]
        assert x is not None
        return found + shared_memory_reasons(shared_memory(kernel, static.dtype.itemsize), x.device)

    def run(self, tensors: Tensors, packed: Tensor | None, static: Static) -> Outputs:
        return tuple(torch.ops.fastvit.conv_projection.default(tensors, None, *static))


def shared_memory(kernel: int, size: int) -> int:
    """Bytes of shared memory that the smallest block of the CUDA kernels needs, which makes one result of a branch.

    What `layout_of` in csrc/cuda/conv_projection.cu says of it, for filters of this side and values of this size;
    blocks are as large as there is room.
    """
    # On their way out results take more room than a patch of so few pixels.
    return 64 * (4 + 8) + (2 + kernel**2) * 64 * 4 + 64 * (128 * size + 16 + 64 * size + 16) + 2 * 2 * 64 * (128 + 16)
