"""The bridge to the C++ kernels of depthwise_mlp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvit_kernels.ops.depthwise_mlp.reference import BATCH_NORMS, Static
from fastvit_kernels.ops.native import cpu_reasons, cuda_reasons, shared_memory_reasons
from fastvit_kernels.ops.operator import GradientKernels, Outputs, Tensors, TwoStepBackend

_LARGEST_KERNEL = 7


class Cpu(GradientKernels, TwoStepBackend):
    """C++ for the CPU: bands of the map walk the hidden channels in chunks, which stay in the cache."""

    name = "cpu"
    backward = "depthwise_mlp_backward", "native"

    def supports(self, tensors: Tensors, static: Static) -> list[str]:
        reasons = cpu_reasons(tensors, static.dtype)
        if tensors[14] is not None and static.inner_residual == "after_activation" and static.bn_after_activation:
            reasons.append("bn2 stands between the activation and the inner residual")
        return reasons

    def reads_outputs(self, static: Static) -> bool:
        return static.summary == "statistics"

    def adds_own(self, tensors: Tensors, static: Static) -> bool:
        return True

    def run(self, tensors: Tensors, packed: Tensor | None, static: Static) -> Outputs:
        return tuple(torch.ops.fastvit.depthwise_mlp.default(tensors, packed, *static))

    def run_keeping(self, tensors: Tensors, static: Static) -> tuple[Outputs, Outputs]:
        if static.out_norm_eps is None:
            return self.run(tensors, None, static), ()
        out, summary, branch = torch.ops.fastvit.depthwise_mlp_keeping.default(tensors, *static)
        return (out, summary), (branch,)

    def finish(self, tensors: Tensors, begun: Outputs, static: Static) -> Outputs:
        return tuple(torch.ops.fastvit.depthwise_mlp_finish.default(tensors, begun[1], *static))

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
        if static.training and tensors[20] is not None:
            if static.out_norm_eps is not None:
                reasons.append("bn3 takes batch statistics in front of another norm")
            if static.summary == "statistics":
                reasons.append("bn3 takes batch statistics in front of the result's")
        return reasons


class Cuda:
    """C++ for GPUs: patches of the map walk the hidden channels in chunks, which stay in shared memory."""

    name = "cuda"

    def supports(self, tensors: Tensors, static: Static) -> list[str]:
        found = cuda_reasons(tensors, tensors[24], static.dtype)
        x, dw_weight = tensors[0], tensors[10]
        assert x is not None and dw_weight is not None
        if static.training:
            found.append("batch statistics: the CUDA kernels take running ones")
        if dw_weight.shape[-1] > _LARGEST_KERNEL:
            return [*found, f"a filter of {dw_weight.shape[-1]}: the CUDA kernels take up to {_LARGEST_KERNEL}"]
        return found + shared_memory_reasons(shared_memory(tensors, static), x.device)

    def run(self, tensors: Tensors, packed: Tensor | None, static: Static) -> Outputs:
        return tuple(torch.ops.fastvit.depthwise_mlp.default(tensors, None, *static))


def shared_memory(tensors: Tensors, static: Static) -> int:
    """Bytes of shared memory that the smallest block of the CUDA kernels needs, which makes one pixel of the result.

    What `layout_of` in csrc/cuda/depthwise_mlp.cu says of it; blocks are as large as there is room.
    """
    x, dw_weight = tensors[0], tensors[10]
    assert x is not None and dw_weight is not None
    size, kernel = static.dtype.itemsize, dw_weight.shape[-1]
    step = 32 // size
    row = -(-x.shape[-1] // step) * step * size + 16
    rows = -(-min(static.height, kernel) * min(static.width, kernel) // 16) * 16
    channels = (5 + kernel**2) * 64 * 4
    # Results leave through the patch of hidden channels, which is smaller here.
    return 128 + rows * (4 + row) + channels + 128 * (64 * size + 16) + 3 * 64 * (128 + 16)
