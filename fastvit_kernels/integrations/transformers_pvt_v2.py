"""transformers' PvtV2: its layers on fused operators.

They keep transformers' own epsilon, which is the same for all norms.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers.models.pvt_v2 import modeling_pvt_v2 as host

from fastvit_kernels.integrations.adapter import repeated
from fastvit_kernels.integrations.halves import Half, adapter_of_halves, add_branch, note_call
from fastvit_kernels.integrations.pyramid import (
    SITES,
    Attention,
    attend,
    attend_to_blank,
    feed_blank_forward,
    feed_forward,
)
from fastvit_kernels.integrations.structure import code_obstacles, in_evaluation
from fastvit_kernels.integrations.transformers_parts import WEIGHTS_WANTED, activation
from fastvit_kernels.nn import fused
from fastvit_kernels.nn.fused_depthwise import DepthwiseMLPParts, depthwise_mlp_obstacles
from fastvit_kernels.nn.fused_spatial_reduction import SpatialReductionParts, spatial_reduction_obstacles

_MLP = {("mlp",): host.PvtV2ConvFeedForwardNetwork, ("mlp", "dwconv"): host.PvtV2DepthWiseConv}


class FusedPvtV2BlockLayer(host.PvtV2BlockLayer):
    """`PvtV2BlockLayer` on `patch_embedding`, `global_attention` and `depthwise_mlp`.

    A half that the operators cannot express as things are now (a dropout at work, a hook that was added) runs the
    host's modules instead; so does the attention in a call that asks for its weights.
    """

    def forward(
        self, hidden_states: Tensor, height: int, width: int, output_attentions: bool = False
    ) -> tuple[Tensor, ...]:
        """`[B, H*W, C]` to a tuple of `[B, H*W, C]` and, if asked for, the attention's weights."""
        note_call(self, *([WEIGHTS_WANTED] if output_attentions else []))
        if not output_attentions:
            return (repeated(self, _compute, hidden_states, height, width),)
        x = hidden_states.contiguous()
        attended, weights = self.attention(self.layer_norm_1(x), height, width, output_attentions)
        return _mlp_half(self, self.drop_path(attended) + x, (height, width)), weights


def _compute(layer: host.PvtV2BlockLayer, x: Tensor, height: int, width: int) -> Tensor:
    return _mlp_half(layer, _attention_half(layer, x.contiguous(), (height, width)), (height, width))


def _attention_half(layer: host.PvtV2BlockLayer, x: Tensor, grid: tuple[int, int]) -> Tensor:
    if _attention_obstacles(layer):
        return layer.drop_path(layer.attention(layer.layer_norm_1(x), *grid)[0]) + x
    attention, drops = _attention(layer), (layer.attention.proj_drop, layer.drop_path)
    return add_branch(x, lambda residual: attend(layer, x, grid, attention, residual), drops)


def _mlp_half(layer: host.PvtV2BlockLayer, x: Tensor, grid: tuple[int, int]) -> Tensor:
    if _mlp_obstacles(layer):
        return x + layer.drop_path(layer.mlp(layer.layer_norm_2(x), *grid))
    parts = _mlp(layer)
    return add_branch(x, lambda residual: feed_forward(layer, x, grid, parts, residual), (layer.drop_path,))


def _attention(layer: host.PvtV2BlockLayer, lasting: bool = False) -> Attention:
    attention = layer.attention
    parts = SpatialReductionParts(
        attention.query,
        (attention.key, attention.value),
        attention.proj,
        in_evaluation(attention.attn_drop, lasting),
        norm=layer.layer_norm_1,
    )
    if attention.linear_attention:
        parts = parts._replace(pool=attention.pool, act=attention.act)
    if attention.linear_attention or attention.spatial_reduction_ratio > 1:
        parts = parts._replace(sr=attention.spatial_reduction, sr_norm=attention.layer_norm)
    return Attention(parts, attention.num_attention_heads, attention.attention_head_size**-0.5)


def _mlp(layer: host.PvtV2BlockLayer, lasting: bool = False) -> DepthwiseMLPParts:
    """One dropout serves twice, here and behind."""
    mlp = layer.mlp
    return DepthwiseMLPParts(
        mlp.dense1,
        mlp.dwconv.dwconv,
        activation(mlp.intermediate_act_fn),
        mlp.dense2,
        hidden_act=None if type(mlp.relu) is nn.Identity else activation(mlp.relu),
        norm=layer.layer_norm_2,
        dropouts=(in_evaluation(mlp.dropout, lasting),),
    )


def _attention_obstacles(layer: host.PvtV2BlockLayer, lasting: bool = False) -> list[str]:
    reasons = code_obstacles(layer, {("attention",): host.PvtV2SelfAttention})
    return reasons or spatial_reduction_obstacles(_attention(layer, lasting).parts)


def _mlp_obstacles(layer: host.PvtV2BlockLayer, lasting: bool = False) -> list[str]:
    if reasons := code_obstacles(layer, _MLP):
        return reasons
    hooked = ["mlp.relu has hooks"] if fused.has_hooks(layer.mlp.relu) else []
    return hooked + depthwise_mlp_obstacles(_mlp(layer, lasting))


ADAPTER = adapter_of_halves(
    host.PvtV2BlockLayer,
    FusedPvtV2BlockLayer,
    SITES,
    {
        "attention": Half(_attention_obstacles, lambda layer: attend_to_blank(layer, _attention(layer))),
        "mlp": Half(_mlp_obstacles, lambda layer: feed_blank_forward(layer, _mlp(layer))),
    },
)
