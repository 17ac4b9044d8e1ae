"""timm's Twins: its blocks on fused operators."""

from __future__ import annotations

from timm.models import twins as host
from torch import Tensor

from fastvit_kernels.integrations.adapter import repeated, state_of
from fastvit_kernels.integrations.halves import Half, adapter_of_halves, add_branch, blank
from fastvit_kernels.integrations.structure import code_obstacles
from fastvit_kernels.integrations.timm_parts import feed_forward, layer_norm_obstacles, mlp_obstacles
from fastvit_kernels.integrations.timm_twins_attention import attend, attend_to_blank, attention_obstacles
from fastvit_kernels.nn import fused
from fastvit_kernels.nn.fused_spatial_reduction import OPERATORS


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
    return attend(block.attn, state_of(block), x, grid, block.norm1, residual)


def _feed_forward(block: host.Block, x: Tensor, residual: Tensor | None) -> Tensor:
    state = state_of(block)
    return feed_forward(block, x, residual, state.packed, state.backend)


def _attention_obstacles(block: host.Block, lasting: bool = False) -> list[str]:
    reduced = type(block.attn) is host.GlobalSubSampleAttn
    expected = host.GlobalSubSampleAttn if reduced else host.LocallyGroupedAttn
    if reasons := code_obstacles(block, {("attn",): expected}):
        return reasons
    reasons = attention_obstacles(block.attn, lasting)
    return reasons + fused.about("the layer norm", layer_norm_obstacles(block.norm1))


ADAPTER = adapter_of_halves(
    host.Block,
    FusedTwinsBlock,
    ("local_attention", *OPERATORS, "pointwise_mlp"),
    {
        "attention": Half(
            _attention_obstacles, lambda block: attend_to_blank(block.attn, state_of(block), block.norm1)
        ),
        "mlp": Half(mlp_obstacles, lambda block: _feed_forward(block, blank(block.mlp.fc1), None)),
    },
)
