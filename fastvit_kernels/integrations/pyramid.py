"""What the blocks of pyramid vision transformers share: attention to reduced keys, an MLP with a convolution."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from fastvit_kernels.integrations.adapter import state_of
from fastvit_kernels.integrations.halves import blank
from fastvit_kernels.nn.fused_depthwise import DepthwiseMLPParts, depthwise_mlp
from fastvit_kernels.nn.fused_spatial_reduction import OPERATORS, SpatialReductionParts, spatial_reduction_attention

SITES = (*OPERATORS, "depthwise_mlp")


class Attention(NamedTuple):
    """An attention's submodules and numbers."""

    parts: SpatialReductionParts
    num_heads: int
    scale: float


def attend(block: nn.Module, x: Tensor, grid: tuple[int, int], attention: Attention, residual: Tensor | None) -> Tensor:
    """`residual + attention(norm(x))` of an accelerated block, without the dropout behind it."""
    state = state_of(block)
    return spatial_reduction_attention(
        x,
        grid,
        attention.parts,
        num_heads=attention.num_heads,
        scale=attention.scale,
        residual=residual,
        packed=state.packed,
        backend=state.backend,
    )


def attend_to_blank(block: nn.Module, attention: Attention) -> Tensor:
    """`attend` on the smallest map that can be reduced."""
    sr = attention.parts.sr
    side = 1 if sr is None else sr.kernel_size[0]
    return attend(block, blank(attention.parts.q, side), (side, side), attention, residual=None)


def feed_forward(
    block: nn.Module, x: Tensor, grid: tuple[int, int], parts: DepthwiseMLPParts, residual: Tensor | None
) -> Tensor:
    """`residual + mlp(norm(x))` of an accelerated block, without the dropout behind it."""
    state = state_of(block)
    packed = None if state.packed is None else state.packed["depthwise_mlp"]
    out: Tensor = depthwise_mlp(x, grid, parts, residual=residual, packed=packed, backend=state.backend)
    return out


def feed_blank_forward(block: nn.Module, parts: DepthwiseMLPParts) -> Tensor:
    """`feed_forward` on a map of one pixel."""
    assert isinstance(parts.fc1, nn.Linear)
    return feed_forward(block, blank(parts.fc1), (1, 1), parts, residual=None)
