"""timm's PVTv2: its blocks on fused operators."""

from __future__ import annotations

from timm.models import pvt_v2 as host
from torch import Tensor, nn

from fastvit_kernels.integrations.adapter import repeated
from fastvit_kernels.integrations.halves import Half, adapter_of_halves, add_branch
from fastvit_kernels.integrations.pyramid import (
    SITES,
    Attention,
    attend,
    attend_to_blank,
    feed_blank_forward,
    feed_forward,
)
from fastvit_kernels.integrations.structure import code_obstacles, in_evaluation
from fastvit_kernels.integrations.timm_parts import activation, attention_scale, layer_norm_obstacles
from fastvit_kernels.nn import fused
from fastvit_kernels.nn.fused_depthwise import DepthwiseMLPParts, depthwise_mlp_obstacles
from fastvit_kernels.nn.fused_spatial_reduction import SpatialReductionParts, spatial_reduction_obstacles


class FusedPvtV2Block(host.Block):
    """`Block` on `patch_embedding`, `global_attention` and `depthwise_mlp`.

    A half that the operators cannot express as things are now (a dropout at work, a hook that was added) runs the
    host's modules instead.
    """

    def forward(self, x: Tensor, feat_size: list[int]) -> Tensor:
        """`[B, H*W, C]` to `[B, H*W, C]`, `feat_size` being H and W."""
        height, width = feat_size
        return repeated(self, _compute, x, height, width)


def _compute(block: host.Block, x: Tensor, height: int, width: int) -> Tensor:
    return _mlp_half(block, _attention_half(block, x.contiguous(), (height, width)), (height, width))


def _attention_half(block: host.Block, x: Tensor, grid: tuple[int, int]) -> Tensor:
    if _attention_obstacles(block):
        return x + block.drop_path1(block.attn(block.norm1(x), grid))
    attention, drops = _attention(block), (block.attn.proj_drop, block.drop_path1)
    return add_branch(x, lambda residual: attend(block, x, grid, attention, residual), drops)


def _mlp_half(block: host.Block, x: Tensor, grid: tuple[int, int]) -> Tensor:
    if _mlp_obstacles(block):
        return x + block.drop_path2(block.mlp(block.norm2(x), grid))
    parts = _mlp(block)
    return add_branch(x, lambda residual: feed_forward(block, x, grid, parts, residual), (block.drop_path2,))


def _attention(block: host.Block, lasting: bool = False) -> Attention:
    attn = block.attn
    parts = SpatialReductionParts(
        attn.q,
        (attn.kv,),
        attn.proj,
        in_evaluation(attn.attn_drop, lasting),
        sr=attn.sr,
        sr_norm=attn.norm,
        pool=attn.pool,
        act=attn.act,
        norm=block.norm1,
    )
    return Attention(parts, attn.num_heads, attention_scale(attn, attn.head_dim))


def _mlp(block: host.Block, lasting: bool = False) -> DepthwiseMLPParts:
    """One dropout serves twice, here and behind."""
    mlp = block.mlp
    return DepthwiseMLPParts(
        mlp.fc1,
        mlp.dwconv,
        activation(mlp.act),
        mlp.fc2,
        hidden_act=None if type(mlp.relu) is nn.Identity else activation(mlp.relu),
        norm=block.norm2,
        dropouts=(in_evaluation(mlp.drop, lasting),),
    )


def _attention_obstacles(block: host.Block, lasting: bool = False) -> list[str]:
    if reasons := code_obstacles(block, {("attn",): host.Attention}):
        return reasons
    # The norm may be timm's own, which is looked at here.
    reasons = spatial_reduction_obstacles(_attention(block, lasting).parts._replace(norm=None))
    return reasons + fused.about("the layer norm", layer_norm_obstacles(block.norm1))


def _mlp_obstacles(block: host.Block, lasting: bool = False) -> list[str]:
    if reasons := code_obstacles(block, {("mlp",): host.MlpWithDepthwiseConv}):
        return reasons
    reasons = depthwise_mlp_obstacles(_mlp(block, lasting)._replace(norm=None))
    if fused.has_hooks(block.mlp.relu):
        reasons.append("mlp.relu has hooks")
    return reasons + fused.about("the layer norm", layer_norm_obstacles(block.norm2))


ADAPTER = adapter_of_halves(
    host.Block,
    FusedPvtV2Block,
    SITES,
    {
        "attention": Half(_attention_obstacles, lambda block: attend_to_blank(block, _attention(block))),
        "mlp": Half(_mlp_obstacles, lambda block: feed_blank_forward(block, _mlp(block))),
    },
)
