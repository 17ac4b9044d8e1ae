"""What timm's models share: their LayerNorm, their activations, their MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.layers import LayerNorm, Mlp
from timm.layers.activations import GELU
from torch import Tensor, nn

from fastvit_kernels.integrations.structure import code_obstacles, in_evaluation, own_parameters_obstacles
from fastvit_kernels.nn import fused
from fastvit_kernels.ops.packing import PackedWeights

_GELU = nn.GELU()


def layer_norm_obstacles(norm: Any) -> list[str]:
    """Why a LayerNorm over the channels would not compute what calling timm's or PyTorch's LayerNorm computes."""
    if type(norm) is not LayerNorm:
        return fused.layer_norm_obstacles(norm)
    reasons = own_parameters_obstacles(norm)
    if not reasons and len(norm.normalized_shape) != 1:
        reasons.append(f"is over {tuple(norm.normalized_shape)}, expected the channels only")
    return reasons


def activation(module: nn.Module) -> nn.Module:
    """The activation; timm's GELU as PyTorch's, which is the same, so that the operators know it."""
    return _GELU if type(module) is GELU and not fused.has_hooks(module) else module


def attention_scale(attn: Any, head_dim: int) -> float:
    """The factor on the scores: PyTorch's fused attention, where timm uses it, has its own."""
    scale: float = head_dim**-0.5 if attn.fused_attn else attn.scale
    return scale


def mlp_obstacles(block: Any, lasting: bool = False) -> list[str]:
    """Why a block's `mlp` behind its `norm2` cannot be fused; see `Half`."""
    reasons = code_obstacles(block, {("mlp",): Mlp, ("mlp", "norm"): nn.Identity})
    if reasons:
        return reasons
    mlp = block.mlp
    reasons = fused.pointwise_mlp_obstacles(mlp.fc1, activation(mlp.act), mlp.fc2, in_evaluation(mlp.drop1, lasting))
    return reasons + fused.about("the layer norm", layer_norm_obstacles(block.norm2))


def feed_forward(
    block: Any,
    x: Tensor,
    residual: Tensor | None,
    packed: Mapping[str, PackedWeights] | None,
    backend: str | None,
) -> Tensor:
    """`residual + mlp(norm2(x))` without the dropout behind it, of a block without obstacles."""
    mlp = block.mlp
    return fused.pointwise_mlp(
        x, mlp.fc1, activation(mlp.act), mlp.fc2, norm=block.norm2, residual=residual, packed=packed, backend=backend
    )
