"""transformers' Segformer: its layers on fused operators, in the layouts of transformers 4 and 5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.models.segformer import modeling_segformer as host

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
from fastvit_kernels.integrations.structure import NO_DROPOUT, code_obstacles, in_evaluation
from fastvit_kernels.integrations.transformers_parts import WEIGHTS_WANTED, activation, has_hooks, is_recorded
from fastvit_kernels.nn.fused_depthwise import DepthwiseMLPParts, depthwise_mlp_obstacles
from fastvit_kernels.nn.fused_spatial_reduction import SpatialReductionParts, spatial_reduction_obstacles

# Softmax attention without a mask, whichever way it is computed.
_ATTENTIONS = (None, "eager", "sdpa")
# What a caller of the model may say that means nothing to a layer.
_IRRELEVANT = ("num_items_in_batch", "output_hidden_states", "return_dict")
_Code = Mapping[tuple[str, ...], type[nn.Module]]


class _Layout(NamedTuple):
    """Where a layer keeps its submodules. `attention_code` and `mlp_code`: the classes whose code is not called."""

    norms: tuple[str, str]
    attention_code: _Code
    mlp_code: _Code


def _layout_of_4() -> _Layout:
    attention = {
        ("attention",): host.SegformerAttention,
        ("attention", "self"): host.SegformerEfficientSelfAttention,
        ("attention", "output"): host.SegformerSelfOutput,
    }
    mlp = {("mlp",): host.SegformerMixFFN, ("mlp", "dwconv"): host.SegformerDWConv}
    return _Layout(("layer_norm_1", "layer_norm_2"), attention, mlp)


def _layout_of_5() -> _Layout:
    mlp = {("mlp",): host.SegformerMixMLP, ("mlp", "dwconv"): host.SegformerDepthWiseConv}
    return _Layout(("layernorm_before", "layernorm_after"), {("attention",): host.SegformerAttention}, mlp)


_IS_4 = hasattr(host, "SegformerMixFFN")
_LAYOUT = _layout_of_4() if _IS_4 else _layout_of_5()


class FusedSegformerLayer(host.SegformerLayer):
    """`SegformerLayer` on `patch_embedding`, `global_attention` and `depthwise_mlp`.

    A half that the operators cannot express as things are now (a dropout at work, a hook that was added) runs the
    host's modules instead; so does the attention in a call that asks for its weights or for anything else unknown.
    """

    def forward(self, hidden_states: Tensor, height: int, width: int, *args: Any, **kwargs: Any) -> Any:
        """`[B, H*W, C]` to `[B, H*W, C]`; in transformers 4 a tuple, with the attention's weights if asked for."""
        wanted = _wanted(self, args, kwargs)
        note_call(self, *wanted)
        if not wanted:
            out = repeated(self, _compute, hidden_states, height, width)
            return (out,) if _IS_4 else out
        x, grid = hidden_states.contiguous(), (height, width)
        x, weights = _attend_unfused(self, x, grid, *args, **kwargs)
        out = _mlp_half(self, x, grid)
        return (out, *weights) if _IS_4 else out


def _wanted(layer: host.SegformerLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """What this call asks for that the fused attention does not do."""
    options = {**dict(zip(("output_attentions",), args, strict=False)), **kwargs}
    wanted = []
    if options.pop("output_attentions", None) or is_recorded(layer.attention, "attentions"):
        wanted.append(WEIGHTS_WANTED)
    unknown = [name for name, value in options.items() if value is not None and name not in _IRRELEVANT]
    if unknown:
        wanted.append(f"attention: it is called with {', '.join(unknown)}")
    return wanted


def _compute(layer: host.SegformerLayer, x: Tensor, height: int, width: int) -> Tensor:
    return _mlp_half(layer, _attention_half(layer, x.contiguous(), (height, width)), (height, width))


def _attention_half(layer: host.SegformerLayer, x: Tensor, grid: tuple[int, int]) -> Tensor:
    if _attention_obstacles(layer):
        return _attend_unfused(layer, x, grid)[0]
    attention, drops = _attention(layer), (_attention_dropout(layer), layer.drop_path)
    return add_branch(x, lambda residual: attend(layer, x, grid, attention, residual), drops)


def _attend_unfused(
    layer: host.SegformerLayer, x: Tensor, grid: tuple[int, int], *args: Any, **kwargs: Any
) -> tuple[Tensor, tuple[Any, ...]]:
    """The host's attention half, and what its attention returns beside the result."""
    norm = layer._modules[_LAYOUT.norms[0]]
    attended, *others = layer.attention(norm(x), *grid, *args, **kwargs)
    if not _IS_4:
        attended = layer.hidden_dropout(attended)
    return layer.drop_path(attended) + x, tuple(others)


def _mlp_half(layer: host.SegformerLayer, x: Tensor, grid: tuple[int, int]) -> Tensor:
    if _mlp_obstacles(layer):
        return layer.drop_path(layer.mlp(layer._modules[_LAYOUT.norms[1]](x), *grid)) + x
    parts = _mlp(layer)
    return add_branch(x, lambda residual: feed_forward(layer, x, grid, parts, residual), (layer.drop_path,))


def _attention_dropout(layer: host.SegformerLayer) -> nn.Module:
    """The dropout behind the output projection."""
    return layer.attention.output.dropout if _IS_4 else layer.hidden_dropout


def _attention(layer: host.SegformerLayer, lasting: bool = False) -> Attention:
    norm = layer._modules[_LAYOUT.norms[0]]
    if _IS_4:
        attention = layer.attention.self
        parts = SpatialReductionParts(
            attention.query,
            (attention.key, attention.value),
            layer.attention.output.dense,
            in_evaluation(attention.dropout, lasting),
            norm=norm,
        )
        if attention.sr_ratio > 1:
            parts = parts._replace(sr=attention.sr, sr_norm=attention.layer_norm)
        return Attention(parts, attention.num_attention_heads, attention.attention_head_size**-0.5)
    attention = layer.attention
    parts = SpatialReductionParts(
        attention.q_proj, (attention.k_proj, attention.v_proj), attention.o_proj, NO_DROPOUT, norm=norm
    )
    if attention.sequence_reduction_ratio > 1:
        reduction = attention.sequence_reduction
        parts = parts._replace(sr=reduction.sequence_reduction, sr_norm=reduction.layer_norm)
    return Attention(parts, attention.num_attention_heads, attention.scaling)


def _mlp(layer: host.SegformerLayer, lasting: bool = False) -> DepthwiseMLPParts:
    """One dropout serves twice, here and behind."""
    mlp = layer.mlp
    if _IS_4:
        fc1, act, fc2 = mlp.dense1, mlp.intermediate_act_fn, mlp.dense2
    else:
        fc1, act, fc2 = mlp.fc1, mlp.activation_fn, mlp.fc2
    return DepthwiseMLPParts(
        fc1,
        mlp.dwconv.dwconv,
        activation(act),
        fc2,
        norm=layer._modules[_LAYOUT.norms[1]],
        dropouts=(in_evaluation(mlp.dropout, lasting),),
    )


def _attention_obstacles(layer: host.SegformerLayer, lasting: bool = False) -> list[str]:
    code = _LAYOUT.attention_code
    if not _IS_4 and "sequence_reduction" in layer.attention._modules:
        code = {**code, ("attention", "sequence_reduction"): host.SegformerSequenceReduction}
    if reasons := code_obstacles(layer, code, has_hooks):
        return reasons
    if not _IS_4:
        attention = layer.attention
        if not lasting and attention.training and attention.attention_dropout > 0:
            reasons.append("attention dropout is active")
        implementation = attention.config._attn_implementation
        if implementation not in _ATTENTIONS:
            reasons.append(f"its attention implementation is {implementation!r}, known are 'eager' and 'sdpa'")
    return reasons + spatial_reduction_obstacles(_attention(layer, lasting).parts)


def _mlp_obstacles(layer: host.SegformerLayer, lasting: bool = False) -> list[str]:
    return code_obstacles(layer, _LAYOUT.mlp_code) or depthwise_mlp_obstacles(_mlp(layer, lasting))


ADAPTER = adapter_of_halves(
    host.SegformerLayer,
    FusedSegformerLayer,
    SITES,
    {
        "attention": Half(_attention_obstacles, lambda layer: attend_to_blank(layer, _attention(layer))),
        "mlp": Half(_mlp_obstacles, lambda layer: feed_blank_forward(layer, _mlp(layer))),
    },
)
