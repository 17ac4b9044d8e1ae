"""timm's Swin: its blocks without shift on fused operators.

A window of a shifted block holds pixels from up to four corners of the map that must not see each other, which the
fused operator has no mask for. The windows of Swin are padded with zeros behind the norm, and the added pixels take
part as keys.
"""

from __future__ import annotations

from timm.models import swin_transformer as host
from torch import Tensor, nn

from fastvit_kernels import ops
from fastvit_kernels.integrations.adapter import repeated, state_of
from fastvit_kernels.integrations.derived import derive
from fastvit_kernels.integrations.halves import Half, adapter_of_halves, add_branch, blank
from fastvit_kernels.integrations.structure import code_obstacles, in_evaluation
from fastvit_kernels.integrations.timm_parts import attention_scale, feed_forward, layer_norm_obstacles, mlp_obstacles
from fastvit_kernels.nn import fused

_CODE = {("attn",): host.WindowAttention, ("attn", "softmax"): nn.Softmax}


class FusedSwinTransformerBlock(host.SwinTransformerBlock):
    """`SwinTransformerBlock` on `local_attention` and `pointwise_mlp`.

    A half that the operators cannot express as things are now (a dropout at work, a hook that was added, a shift that
    came with another input size) runs the host's modules instead.
    """

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        # The biases come as an input: whether they are still the same cannot be recorded.
        return repeated(self, _compute, x, _attn_bias(self))


def _compute(block: host.SwinTransformerBlock, x: Tensor, attn_bias: Tensor | None) -> Tensor:
    grid = (x.shape[1], x.shape[2])
    rows = _attention_half(block, x.flatten(1, 2).contiguous(), grid, attn_bias)
    return _mlp_half(block, rows).unflatten(1, grid)


def _attn_bias(block: host.SwinTransformerBlock) -> Tensor | None:
    """What is added to the scores of each window, `[num_heads, g*g, g*g]`."""
    attn, state = block.attn, state_of(block)
    if type(attn) is not host.WindowAttention:
        return None
    sources = (attn.relative_position_bias_table, attn.relative_position_index)
    return derive(state.derived, state.packed, sources, lambda: (attn._get_rel_pos_bias()[0],))[0]


def _attention_half(
    block: host.SwinTransformerBlock, x: Tensor, grid: tuple[int, int], attn_bias: Tensor | None
) -> Tensor:
    if _attention_obstacles(block):
        return x + block.drop_path1(block._attn(block.norm1(x.unflatten(1, grid)))).flatten(1, 2)
    return add_branch(x, lambda residual: _attend(block, x, grid, attn_bias, residual), (block.drop_path1,))


def _mlp_half(block: host.SwinTransformerBlock, x: Tensor) -> Tensor:
    if mlp_obstacles(block):
        return x + block.drop_path2(block.mlp(block.norm2(x)))
    return add_branch(x, lambda residual: _feed_forward(block, x, residual), (block.mlp.drop2, block.drop_path2))


def _attend(
    block: host.SwinTransformerBlock,
    x: Tensor,
    grid: tuple[int, int],
    attn_bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    attn, state = block.attn, state_of(block)
    qkv, proj = attn.qkv._parameters, attn.proj._parameters
    out = ops.local_attention(
        x,
        grid=grid,
        window_size=block.window_size[0],
        num_heads=attn.num_heads,
        scale=attention_scale(attn, attn.qkv.out_features // (3 * attn.num_heads)),
        norm="layer",
        qkv_weight=qkv["weight"],
        qkv_bias=qkv["bias"],
        attn_bias=attn_bias,
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


def _feed_forward(block: host.SwinTransformerBlock, x: Tensor, residual: Tensor | None) -> Tensor:
    state = state_of(block)
    return feed_forward(block, x, residual, state.packed, state.backend)


def _attention_obstacles(block: host.SwinTransformerBlock, lasting: bool = False) -> list[str]:
    if reasons := code_obstacles(block, _CODE):
        return reasons
    attn = block.attn
    if any(block.shift_size) or block.attn_mask is not None:
        reasons.append(f"its windows are shifted by {tuple(block.shift_size)}, the fused operator has no shift")
    height, width = block.window_size
    if height != width:
        reasons.append(f"its windows are {height} x {width}, the fused operator needs square ones")
    reasons += fused.about("the qkv linear", fused.linear_obstacles(attn.qkv))
    reasons += fused.global_attention_obstacles(attn.proj, in_evaluation(attn.attn_drop, lasting))
    if not fused.drops_nothing(in_evaluation(attn.proj_drop, lasting)):
        # timm draws it window by window.
        reasons.append("the dropout behind the projection is active or has hooks")
    return reasons + fused.about("the layer norm", layer_norm_obstacles(block.norm1))


def _attend_to_blank(block: host.SwinTransformerBlock) -> Tensor:
    side = block.window_size[0]
    return _attend(block, blank(block.attn.qkv, side), (side, side), _attn_bias(block), residual=None)


ADAPTER = adapter_of_halves(
    host.SwinTransformerBlock,
    FusedSwinTransformerBlock,
    ("local_attention", "pointwise_mlp"),
    {
        "attention": Half(_attention_obstacles, _attend_to_blank),
        "mlp": Half(mlp_obstacles, lambda block: _feed_forward(block, blank(block.mlp.fc1), None)),
    },
)
