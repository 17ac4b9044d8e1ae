"""local_attention around PyTorch's own attention of heads."""

from __future__ import annotations

from fastvit_kernels.ops.attention import SdpaBackend, sdpa_attend
from fastvit_kernels.ops.local_attention.reference import Static, around
from fastvit_kernels.ops.operator import Outputs, Tensors


class Sdpa(SdpaBackend):
    """The bridge to `fastvit::local_attention.sdpa`."""

    backward = "local_attention_backward", "sdpa"


def compose(tensors: Tensors, static: Static) -> Outputs:
    """The operator in PyTorch's operators, differentiable once."""
    return around(sdpa_attend, tensors, static)
