"""transformers' CvT: its layer on fused operators.

The layer keeps transformers' own mathematics where it differs from the official network: exact GELU, and a drop path
that is applied to the MLP's output plus residual.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.cvt import modeling_cvt as host

from fastvit_kernels.integrations.adapter import Adapter, repeated, state_of
from fastvit_kernels.integrations.structure import child, code_obstacles, in_evaluation
from fastvit_kernels.integrations.transformers_parts import activation
from fastvit_kernels.nn import fused

_BRANCHES = tuple((f"convolution_projection_{name}", f"projection_{name}") for name in ("query", "key", "value"))

# The modules whose code the fused operators stand in for, with the code they must have.
_SELF_ATTENTION = ("attention", "attention")
_ATTENTION: Mapping[tuple[str, ...], type[nn.Module]] = {
    ("attention",): host.CvtAttention,
    _SELF_ATTENTION: host.CvtSelfAttention,
    ("attention", "output"): host.CvtSelfOutput,
    **{
        (*_SELF_ATTENTION, projection, *child): cls
        for projection, _ in _BRANCHES
        for child, cls in (
            ((), host.CvtSelfAttentionProjection),
            (("convolution_projection",), host.CvtSelfAttentionConvProjection),
            (("linear_projection",), host.CvtSelfAttentionLinearProjection),
        )
    },
}
_MLP: Mapping[tuple[str, ...], type[nn.Module]] = {("intermediate",): host.CvtIntermediate, ("output",): host.CvtOutput}


class FusedCvtLayer(host.CvtLayer):
    """`CvtLayer` on `conv_projection`, `global_attention` and `pointwise_mlp`.

    A half that the operators cannot express as things are now (a dropout at work, a hook that was added) runs the
    host's modules instead.
    """

    def forward(self, hidden_state: Tensor, height: int, width: int) -> Tensor:
        """`[B, N, C]` to `[B, N, C]`, the N tokens a class token (if the layer has one) and `height * width` others."""
        return repeated(self, _compute, hidden_state, height, width)


def _compute(layer: host.CvtLayer, x: Tensor, height: int, width: int) -> Tensor:
    if _attention_obstacles(layer):
        x = layer.drop_path(layer.attention(layer.layernorm_before(x), height, width)) + x
    else:
        x = _attention_half(layer, x, (height, width))
    if _mlp_obstacles(layer):
        return layer.drop_path(layer.output(layer.intermediate(layer.layernorm_after(x)), x))
    return _mlp_half(layer, x)


def _attention_half(layer: host.CvtLayer, x: Tensor, grid: tuple[int, int]) -> Tensor:
    dropout = layer.attention.output.dropout
    if fused.drops_nothing(dropout) and fused.drops_nothing(layer.drop_path):
        return _attend(layer, x, grid, residual=x)
    return layer.drop_path(dropout(_attend(layer, x, grid, residual=None))) + x


def _mlp_half(layer: host.CvtLayer, x: Tensor) -> Tensor:
    dropout = layer.output.dropout
    if fused.drops_nothing(dropout):
        return layer.drop_path(_feed_forward(layer, x, residual=x))
    return layer.drop_path(dropout(_feed_forward(layer, x, residual=None)) + x)


def _attend(layer: host.CvtLayer, x: Tensor, grid: tuple[int, int], residual: Tensor | None) -> Tensor:
    attention = layer.attention.attention
    state = state_of(layer)
    return fused.conv_projection_attention(
        x,
        grid,
        _branches(attention),
        layer.attention.output.dense,
        num_heads=attention.num_heads,
        scale=attention.scale,
        num_prefix_tokens=int(attention.with_cls_token),
        norm=layer.layernorm_before,
        residual=residual,
        packed=state.packed,
        backend=state.backend,
    )


def _feed_forward(layer: host.CvtLayer, x: Tensor, residual: Tensor | None) -> Tensor:
    state = state_of(layer)
    return fused.pointwise_mlp(
        x,
        layer.intermediate.dense,
        activation(layer.intermediate.activation),
        layer.output.dense,
        norm=layer.layernorm_after,
        residual=residual,
        packed=state.packed,
        backend=state.backend,
    )


def _branches(attention: nn.Module) -> list[fused.Branch]:
    # From the dictionaries: attribute access to submodules is what costs most here, and this runs at every call.
    modules: dict[str, Any] = attention._modules
    branches = []
    for convolution, linear in _BRANCHES:
        inner = modules[convolution]._modules["convolution_projection"]._modules
        branches.append(fused.Branch(inner["convolution"], inner["normalization"], modules[linear]))
    return branches


def _structure_obstacles(layer: host.CvtLayer, expected: Mapping[tuple[str, ...], type[nn.Module]]) -> list[str]:
    without = [path for path in expected if path[-1] == "convolution_projection" and child(layer, path) is None]
    if without:
        return [
            f"{path[-2]} has no convolution, the fused operator needs qkv_projection_method 'dw_bn'" for path in without
        ]
    return code_obstacles(layer, expected)


def _attention_obstacles(layer: host.CvtLayer, lasting: bool = False) -> list[str]:
    """Why the attention half cannot be fused now; with `lasting` a dropout that is merely at work does not count."""
    reasons = _structure_obstacles(layer, _ATTENTION)
    if reasons:
        return reasons
    attention = layer.attention.attention
    dropout = in_evaluation(attention.dropout, lasting)
    return fused.conv_projection_attention_obstacles(
        _branches(attention), layer.attention.output.dense, dropout, layer.layernorm_before
    )


def _mlp_obstacles(layer: host.CvtLayer) -> list[str]:
    return _structure_obstacles(layer, _MLP) or fused.pointwise_mlp_obstacles(
        layer.intermediate.dense,
        activation(layer.intermediate.activation),
        layer.output.dense,
        norm=layer.layernorm_after,
    )


def _obstacles(layer: nn.Module) -> list[str]:
    assert isinstance(layer, host.CvtLayer)
    reasons = _attention_obstacles(layer, lasting=True) + _mlp_obstacles(layer)
    if "forward" in layer.__dict__:
        reasons.append("its forward was replaced on the instance")
    return reasons


def _unfused(layer: nn.Module) -> list[str]:
    assert isinstance(layer, host.CvtLayer)
    return [
        *(f"attention: {reason}" for reason in _attention_obstacles(layer)),
        *(f"mlp: {reason}" for reason in _mlp_obstacles(layer)),
    ]


def _pack(layer: nn.Module) -> None:
    """Run both halves once on a map as small as the filter: packing needs a call, and any size will do."""
    assert isinstance(layer, host.CvtLayer)
    with torch.no_grad():
        if not _attention_obstacles(layer):
            branches = _branches(layer.attention.attention)
            side = max(branch.conv.kernel_size[0] for branch in branches)
            _attend(layer, _blank(layer, side), (side, side), residual=None)
        if not _mlp_obstacles(layer):
            _feed_forward(layer, _blank(layer, side=1), residual=None)


def _blank(layer: host.CvtLayer, side: int) -> Tensor:
    """One empty image of `side` x `side` tokens, as the layer takes it."""
    weight = layer.attention.attention.projection_query.weight
    return weight.new_zeros((1, int(layer.attention.attention.with_cls_token) + side * side, weight.shape[1]))


ADAPTER = Adapter(
    host=host.CvtLayer,
    fused=FusedCvtLayer,
    operators=("conv_projection", "global_attention", "pointwise_mlp"),
    obstacles=_obstacles,
    unfused=_unfused,
    pack=_pack,
)
