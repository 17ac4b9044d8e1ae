"""The bridge to the C++ kernels of depthwise_mlp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvit_kernels.ops.depthwise_mlp.reference import BATCH_NORMS, Static
from fastvit_kernels.ops.native import MOST_SHARED_MEMORY, cpu_reasons, cuda_reasons
from fastvit_kernels.ops.operator import GradientKernels, Outputs, Tensors

_LARGEST_KERNEL = 7


class Cpu(GradientKernels):
    """C++ for the CPU: bands of the map walk the hidden channels in chunks, which stay in the cache."""

    name = "cpu"
    backward = "depthwise_mlp_backward", "native"

    def supports(self, tensors: Tensors, static: Static) -> list[str]:
        reasons = cpu_reasons(tensors, static.dtype)
        if tensors[14] is not None and static.inner_residual == "after_activation" and static.bn_after_activation:
            reasons.append("bn2 stands between the activation and the inner residual")
        return reasons

    def run(self, tensors: Tensors, packed: Tensor | None, static: Static) -> Outputs:
        return tuple(torch.ops.fastvit.depthwise_mlp.default(tensors, packed, *static))

    def supports_backward(
        self, grads: Sequence[Tensor], tensors: Tensors, needs: Sequence[bool], static: Static
    ) -> list[str]:
        dw_weight = tensors[10]
        assert dw_weight is not None
        reasons = cpu_reasons([*tensors, *grads], static.dtype)
        if dw_weight.shape[-1] > _LARGEST_KERNEL:
            reasons.append(f"dw_weight: {dw_weight.shape[-1]} taps a side, more than {_LARGEST_KERNEL}")
        if any(needs[first + 2] or needs[first + 3] for first in BATCH_NORMS):
            reasons.append("a gradient of running statistics is wanted")
        if static.training and static.bn_after_activation:
            # Almost always more exact than the reference, but single sums cancel worse than the numerics rule allows.
            reasons.append("bn1 and bn2 take batch statistics behind their activations")
        if static.training and tensors[20] is not None:
            if static.out_norm_eps is not None:
                reasons.append("bn3 takes batch statistics in front of another norm")
            if static.summary == "statistics":
                reasons.append("bn3 takes batch statistics in front of the result's")
        return reasons


# Of the CUDA kernels: the result's channels, which stay in registers, and the filter's side.
_MOST_CHANNELS = 384
_LARGEST_FILTER = 7


class Cuda:
    """C++ for GPUs: patches of the map walk the hidden channels in chunks, which stay in shared memory."""

    name = "cuda"

    def supports(self, tensors: Tensors, static: Static) -> list[str]:
        found = cuda_reasons(tensors, tensors[24], static.dtype)
        dw_weight, fc2_weight = tensors[10], tensors[16]
        assert dw_weight is not None and fc2_weight is not None
        if static.training:
            found.append("batch statistics: the CUDA kernels take running ones")
        if static.out_norm_eps is not None:
            found.append("a norm of the result: the CUDA kernels have none")
        if static.num_prefix_tokens:
            found.append("prefix tokens: the CUDA kernels take maps only")
        if static.summary == "mean":
            found.append("the mean of the result: the CUDA kernels return statistics only")
        if fc2_weight.shape[0] > _MOST_CHANNELS:
            found.append(f"{fc2_weight.shape[0]} channels of the result: the CUDA kernels take up to {_MOST_CHANNELS}")
        if dw_weight.shape[-1] > _LARGEST_FILTER:
            found.append(f"a filter of {dw_weight.shape[-1]}: the CUDA kernels take up to {_LARGEST_FILTER}")
        elif (needed := shared_memory(tensors, static)) > MOST_SHARED_MEMORY:
            found.append(f"a block takes {needed} bytes of shared memory, {MOST_SHARED_MEMORY} are there")
        return found

    def run(self, tensors: Tensors, packed: Tensor | None, static: Static) -> Outputs:
        return tuple(torch.ops.fastvit.depthwise_mlp.default(tensors, None, *static))


def shared_memory(tensors: Tensors, static: Static) -> int:
    """Bytes of shared memory that a block of the CUDA kernels needs: `layout_of` in csrc/cuda/depthwise_mlp.cu."""
    x, dw_weight = tensors[0], tensors[10]
    assert x is not None and dw_weight is not None
    size = static.dtype.itemsize
    step = 32 // size
    row = -(-x.shape[-1] // step) * step * size + 16
    channels = (5 + dw_weight.shape[-1] ** 2) * 64 * 4
    return 128 + 128 * 4 + channels + 128 * row + (128 + 64) * (64 * size + 16) + 2 * 2 * 64 * (128 + 16)
