"""timm's Twins: its blocks on fused operators.

The windows of Twins are padded with zeros in front of the query, key and value projection, and the added pixels take
part as keys.
"""

from __future__ import annotations

from timm.models import twins as host
from torch import Tensor

from fastvit_kernels import ops
from fastvit_kernels.integrations.adapter import repeated, state_of
from fastvit_kernels.integrations.halves import Half, adapter_of_halves, add_branch, blank
from fastvit_kernels.integrations.structure import code_obstacles, in_evaluation
from fastvit_kernels.integrations.timm_parts import attention_scale, feed_forward, layer_norm_obstacles, mlp_obstacles
from fastvit_kernels.nn import fused
from fastvit_kernels.nn.fused_spatial_reduction import (
    OPERATORS,
    SpatialReductionParts,
    spatial_reduction_attention,
    spatial_reduction_obstacles,
)


class FusedTwinsBlock(host.Block):
    """`Block` on `local_attention` or `patch_embedding` and `global_attention`, and on `pointwise_mlp`.

    A half that the operators cannot express as things are now (a dropout at work, a hook that was added) runs the
    host's modules instead.
    """

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """`[B, H*W, C]` to `[B, H*W, C]`, `size` being `(H, W)`."""
        height, width = size
        return repeated(self, _compute, x, height, width)


def _compute(block: host.Block, x: Tensor, height: int, width: int) -> Tensor:
    return _mlp_half(block, _attention_half(block, x.contiguous(), (height, width)))


def _attention_half(block: host.Block, x: Tensor, grid: tuple[int, int]) -> Tensor:
    if _attention_obstacles(block):
        return x + block.drop_path1(block.attn(block.norm1(x), grid))
    drops = (block.attn.proj_drop, block.drop_path1)
    return add_branch(x, lambda residual: _attend(block, x, grid, residual), drops)


def _mlp_half(block: host.Block, x: Tensor) -> Tensor:
    if mlp_obstacles(block):
        return x + block.drop_path2(block.mlp(block.norm2(x)))
    return add_branch(x, lambda residual: _feed_forward(block, x, residual), (block.mlp.drop2, block.drop_path2))


def _attend(block: host.Block, x: Tensor, grid: tuple[int, int], residual: Tensor | None) -> Tensor:
    attn, state = block.attn, state_of(block)
    if type(attn) is host.GlobalSubSampleAttn:
        return spatial_reduction_attention(
            x,
            grid,
            _reduced(attn)._replace(norm=block.norm1),
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
        norm="layer",
        qkv_weight=qkv["weight"],
        qkv_bias=qkv["bias"],
        proj_weight=proj["weight"],
        proj_bias=proj["bias"],
        residual=residual,
        pad="zero",
        packed=None if state.packed is None else state.packed["local_attention"],
        backend=state.backend,
        **fused.layer_norm_arguments(block.norm1),
    )
    assert isinstance(out, Tensor)
    return out


def _feed_forward(block: host.Block, x: Tensor, residual: Tensor | None) -> Tensor:
    state = state_of(block)
    return feed_forward(block, x, residual, state.packed, state.backend)


def _reduced(attn: host.GlobalSubSampleAttn, lasting: bool = False) -> SpatialReductionParts:
    """Without the norm in front, which may be timm's."""
    dropout = in_evaluation(attn.attn_drop, lasting)
    return SpatialReductionParts(attn.q, (attn.kv,), attn.proj, dropout, attn.sr, attn.norm)


def _attention_obstacles(block: host.Block, lasting: bool = False) -> list[str]:
    attn = block.attn
    reduced = type(attn) is host.GlobalSubSampleAttn
    expected = host.GlobalSubSampleAttn if reduced else host.LocallyGroupedAttn
    if reasons := code_obstacles(block, {("attn",): expected}):
        return reasons
    if reduced:
        reasons = spatial_reduction_obstacles(_reduced(attn, lasting))
    else:
        reasons = fused.about("the qkv linear", fused.linear_obstacles(attn.qkv))
        reasons += fused.global_attention_obstacles(attn.proj, in_evaluation(attn.attn_drop, lasting))
    return reasons + fused.about("the layer norm", layer_norm_obstacles(block.norm1))


def _attend_to_blank(block: host.Block) -> Tensor:
    attn = block.attn
    if type(attn) is host.GlobalSubSampleAttn:
        side, linear = attn.sr_ratio, attn.q
    else:
        side, linear = attn.ws, attn.qkv
    return _attend(block, blank(linear, side), (side, side), residual=None)


ADAPTER = adapter_of_halves(
    host.Block,
    FusedTwinsBlock,
    ("local_attention", *OPERATORS, "pointwise_mlp"),
    {
        "attention": Half(_attention_obstacles, _attend_to_blank),
        "mlp": Half(mlp_obstacles, lambda block: _feed_forward(block, blank(block.mlp.fc1), None)),
    },
)
