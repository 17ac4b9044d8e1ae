"""The bridge to the Triton kernels of global_attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvit_kernels.ops.global_attention.reference import Static
from fastvit_kernels.ops.operator import GradientKernels, Outputs, Tensors
from fastvit_kernels.ops.triton_support import norm_gradient_reasons, reasons

_WIDEST_HEAD = 256


class Triton(GradientKernels):
    """Norm, projection of the queries, online softmax and, where it fits, the output projection in one launch."""

    name = "triton"
    backward = "global_attention_backward", "triton"

    def supports(self, tensors: Tensors, static: Static) -> list[str]:
        found = reasons(tensors, static.dtype)
        k, v = tensors[1], tensors[2]
        assert k is not None
        widest = max(k.shape[-1] // (1 if v is not None else 2), 0 if v is None else v.shape[-1]) // static.num_heads
        if widest > _WIDEST_HEAD:
            found.append(f"heads of {widest} channels: the Triton kernels take up to {_WIDEST_HEAD}")
        return found

    def run(self, tensors: Tensors, packed: Tensor | None, static: Static) -> Outputs:
        return tuple(torch.ops.fastvit.global_attention.triton(tensors, *static))

    def supports_backward(
        self, grads: Sequence[Tensor], tensors: Tensors, needs: Sequence[bool], static: Static
    ) -> list[str]:
        q, query_norm = tensors[0], static.norm == "layer"
        assert q is not None
        return norm_gradient_reasons(q.shape[-1]) if query_norm else []


def launch(tensors: Tensors, static: Static) -> Outputs:
    """The operator's outputs, from dense or strided tensors on one device."""
    # Triton may be missing or slow to import: only a launch needs it.
    from fastvit_kernels.ops.global_attention import triton_kernels

    return triton_kernels.run(tensors, static)


def launch_backward(grads: Sequence[Tensor], tensors: Tensors, needs: Sequence[bool], static: Static) -> list[Tensor]:
    """The gradients of the needed tensors, in order."""
    from fastvit_kernels.ops.global_attention import triton_backward

    return triton_backward.run(grads, tensors, needs, static)
