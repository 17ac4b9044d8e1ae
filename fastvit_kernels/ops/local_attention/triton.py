"""The bridge to the Triton kernels of local_attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvit_kernels.ops.local_attention.reference import Static
from fastvit_kernels.ops.operator import GradientKernels, Outputs, Tensors
from fastvit_kernels.ops.triton_support import norm_gradient_reasons, reasons

_WIDEST_HEAD = 256


class Triton(GradientKernels):
    """Windows read where they lie in the map; where one is one tile, norm and projection are in the same launch."""

    name = "triton"
    backward = "local_attention_backward", "triton"

    def supports(self, tensors: Tensors, static: Static) -> list[str]:
        found = reasons(tensors, static.dtype)
        x, v, qkv_weight = tensors[0], tensors[2], tensors[6]
        assert x is not None
        if v is not None:
            channels = max(x.shape[-1], v.shape[-1])
        else:
            channels = (x.shape[-1] if qkv_weight is None else qkv_weight.shape[0]) // 3
        widest = channels // static.num_heads
        if widest > _WIDEST_HEAD:
            found.append(f"heads of {widest} channels: the Triton kernels take up to {_WIDEST_HEAD}")
        return found

    def run(self, tensors: Tensors, packed: Tensor | None, static: Static) -> Outputs:
        return tuple(torch.ops.fastvit.local_attention.triton(tensors, *static))

    def supports_backward(
        self, grads: Sequence[Tensor], tensors: Tensors, needs: Sequence[bool], static: Static
    ) -> list[str]:
        x = tensors[0]
        assert x is not None
        return norm_gradient_reasons(x.shape[-1]) if static.norm == "layer" else []


def launch(tensors: Tensors, static: Static) -> Outputs:
    """The operator's outputs, from dense or strided tensors on one device."""
    # Triton may be missing or slow to import: only a launch needs it.
    from fastvit_kernels.ops.local_attention import triton_kernels

    return triton_kernels.run(tensors, static)


def launch_backward(grads: Sequence[Tensor], tensors: Tensors, needs: Sequence[bool], static: Static) -> list[Tensor]:
    """The gradients of the needed tensors, in order."""
    from fastvit_kernels.ops.local_attention import triton_backward

    return triton_backward.run(grads, tensors, needs, static)
