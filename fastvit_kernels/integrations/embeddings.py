"""The convolution and LayerNorm in front of a stage, on the fused operator: what hosts' patch embeddings share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastvit_kernels.integrations.adapter import Adapter, state_of
from fastvit_kernels.nn import fused
from fastvit_kernels.ops.arguments import compute_dtype


def embed(module: nn.Module, x: Tensor, conv: nn.Conv2d, norm: nn.LayerNorm) -> Tensor | None:
    """`[B, C, H, W]` to a channels-last `[B, C_out, H', W']`; None where that is not what calling both computes."""
    if fused.patch_embedding_obstacles(conv, norm):
        return None
    state = state_of(module)
    out = fused.patch_embedding(x, conv, norm, packed=state.packed, backend=state.backend)
    # Only on a GPU does autocast run LayerNorm in fp32; elsewhere the host returns what its convolution does.
    return out if out.is_cuda else out.to(compute_dtype(x))


def adapter_of_embedding(host: type[nn.Module], fused_class: type[nn.Module], conv: str, norm: str) -> Adapter:
    """The adapter of a patch embedding whose children of these names are the convolution and the LayerNorm."""

    def unfused(module: nn.Module) -> list[str]:
        return fused.patch_embedding_obstacles(*_steps(module, conv, norm))

    def obstacles(module: nn.Module) -> list[str]:
        replaced = ["its forward was replaced on the instance"] if "forward" in module.__dict__ else []
        return unfused(module) + replaced

    def pack(module: nn.Module) -> None:
        """Run once on a map as small as the filter: packing needs a call, and any size will do."""
        steps = _steps(module, conv, norm)
        with torch.no_grad():
            embed(module, steps[0].weight.new_zeros((1, *steps[0].weight.shape[1:])), *steps)

    return Adapter(host, fused_class, ("patch_embedding",), obstacles, unfused, pack)


def _steps(module: nn.Module, conv: str, norm: str) -> tuple[nn.Conv2d, nn.LayerNorm]:
    # Whether they are what the annotation says is among the obstacles.
    return module._modules[conv], module._modules[norm]  # type: ignore[return-value]
