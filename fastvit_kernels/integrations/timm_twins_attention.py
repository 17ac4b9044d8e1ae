"""timm's Twins: what its attentions are on fused operators, in blocks and by themselves.

The windows of Twins are padded with zeros in front of the query, key and value projection, and the added pixels take
part as keys.
"""

from __future__ import annotations

from typing import Any

from timm.models import twins as host
from torch import Tensor, nn

from fastvit_kernels import ops
from fastvit_kernels.integrations.adapter import Adapter, State, repeated, state_of
from fastvit_kernels.integrations.halves import Half, adapter_of_halves, blank
from fastvit_kernels.integrations.structure import in_evaluation
from fastvit_kernels.integrations.timm_parts import attention_scale
from fastvit_kernels.nn import fused
from fastvit_kernels.nn.fused_spatial_reduction import (
    SpatialReductionParts,
    spatial_reduction_attention,
    spatial_reduction_obstacles,
)


def attend(
    attn: Any,
    state: State,
    x: Tensor,
    grid: tuple[int, int],
    norm: nn.LayerNorm | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`residual + attn(norm(x))` without the dropout behind it, of an attention without obstacles."""
    if isinstance(attn, host.GlobalSubSampleAttn):
        return spatial_reduction_attention(
            x,
            grid,
            _reduced(attn)._replace(norm=norm),
            num_heads=attn.num_heads,
            scale=attention_scale(attn, attn.dim // attn.num_heads),
            residual=residual,
            packed=state.packed,
            backend=state.backend,
        )
    qkv, proj = attn.qkv._parameters, attn.proj._parameters
    out = ops.local_attention(
        x,
        grid=grid,
        window_size=attn.ws,
        num_heads=attn.num_heads,
        scale=attention_scale(attn, attn.dim // attn.num_heads),
        norm=None if norm is None else "layer",
        qkv_weight=qkv["weight"],
        qkv_bias=qkv["bias"],
        proj_weight=proj["weight"],
        proj_bias=proj["bias"],
        residual=residual,
        pad="zero",
        packed=None if state.packed is None else state.packed["local_attention"],
        backend=state.backend,
        **fused.layer_norm_arguments(norm),
    )
    assert isinstance(out, Tensor)
    return out


def attend_to_blank(attn: Any, state: State, norm: nn.LayerNorm | None = None) -> Tensor:
    """On a map as small as it takes."""
    reduced = isinstance(attn, host.GlobalSubSampleAttn)
    side, linear = (attn.sr_ratio, attn.q) if reduced else (attn.ws, attn.qkv)
    return attend(attn, state, blank(linear, side), (side, side), norm)


def attention_obstacles(attn: Any, lasting: bool = False) -> list[str]:
    """Why the attention cannot be fused; see `Half`."""
    if isinstance(attn, host.GlobalSubSampleAttn):
        return spatial_reduction_obstacles(_reduced(attn, lasting))
    reasons = fused.about("the qkv linear", fused.linear_obstacles(attn.qkv))
    return reasons + fused.global_attention_obstacles(attn.proj, in_evaluation(attn.attn_drop, lasting))


def adapter_of_attention(
    host_class: type[nn.Module], fused_class: type[nn.Module], operators: tuple[str, ...]
) -> Adapter:
    """The adapter of an attention by itself."""
    return adapter_of_halves(
        host_class,
        fused_class,
        operators,
        {"attention": Half(attention_obstacles, lambda attn: attend_to_blank(attn, state_of(attn)))},
        part=True,
    )


def forward(attn: Any, x: Tensor, size: tuple[int, int]) -> Tensor:
    """Of an accelerated attention by itself."""
    height, width = size
    return repeated(attn, _compute, x, height, width)


def _compute(attn: Any, x: Tensor, height: int, width: int) -> Tensor:
    if attention_obstacles(attn):
        base = host.GlobalSubSampleAttn if isinstance(attn, host.GlobalSubSampleAttn) else host.LocallyGroupedAttn
        return base.forward(attn, x, (height, width))
    out: Tensor = attn.proj_drop(attend(attn, state_of(attn), x, (height, width)))
    return out


def _reduced(attn: host.GlobalSubSampleAttn, lasting: bool = False) -> SpatialReductionParts:
    """Without a norm in front, which may be timm's."""
    dropout = in_evaluation(attn.attn_drop, lasting)
    return SpatialReductionParts(attn.q, (attn.kv,), attn.proj, dropout, attn.sr, attn.norm)
