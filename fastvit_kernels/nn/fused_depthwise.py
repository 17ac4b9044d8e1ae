"""From submodules to `ops.depthwise_mlp`: what may be fused, and the operator's arguments; see `fused`."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from fastvit_kernels import ops
from fastvit_kernels.nn import fused
from fastvit_kernels.ops.packing import PackedWeights

_ACTIVATIONS: dict[type[nn.Module], str] = {nn.SiLU: "silu", nn.ReLU: "relu"}


class DepthwiseMLPParts(NamedTuple):
    """The submodules of an MLP with a depthwise convolution, in the order of the data.

    Attributes:
        fc1, fc2: linears, or 1 x 1 convolutions.
        dw: the depthwise convolution.
        act: the activation behind it.
        hidden_act: the activation behind `fc1`, or None.
        bn1, bn2, bn3: batch norms of the hidden map, of the filtered map and of the result, or None.
        norm: the LayerNorm or the GroupNorm of one group in front, if it is to be fused as well.
        out_norm: the GroupNorm of one group behind `fc2`, or None.
        dropouts: every dropout on the way that is not behind all of this.
    """

    fc1: nn.Module
    dw: nn.Conv2d
    act: nn.Module
    fc2: nn.Module
    hidden_act: nn.Module | None = None
    bn1: nn.BatchNorm2d | None = None
    bn2: nn.BatchNorm2d | None = None
    bn3: nn.BatchNorm2d | None = None
    norm: nn.Module | None = None
    out_norm: nn.GroupNorm | None = None
    dropouts: tuple[nn.Module, ...] = ()


def activation_name(module: nn.Module) -> str | None:
    """The operator's name of an activation module, or None for one it does not have."""
    return fused.activation_name(module) or _ACTIVATIONS.get(type(module))


def depthwise_mlp_obstacles(parts: DepthwiseMLPParts) -> list[str]:
    """Why `depthwise_mlp` would not compute what calling these submodules computes."""
    reasons: list[str] = []
    for name, layer in (("the first linear", parts.fc1), ("the second linear", parts.fc2)):
        reasons += fused.about(name, _linear_obstacles(layer))
    reasons += fused.about("the depthwise convolution", _filter_obstacles(parts.dw))
    for act in (parts.act, parts.hidden_act):
        if act is None:
            continue
        if activation_name(act) is None:
            reasons.append(f"the activation is {act}, the fused ones are GELU (exact), QuickGELU, SiLU and ReLU")
        elif fused.has_hooks(act):
            reasons.append("the activation has hooks")
    norms = [bn for bn in (parts.bn1, parts.bn2, parts.bn3) if bn is not None]
    for bn in norms:
        reasons += fused.about("a batch norm", fused.batch_norm_obstacles(bn))
    if not reasons and len({fused.uses_batch_statistics(bn) for bn in norms}) > 1:
        reasons.append("the batch norms are in different modes")
    if isinstance(parts.norm, nn.GroupNorm):
        reasons += fused.about("the norm", fused.group_norm_obstacles(parts.norm))
    elif parts.norm is not None:
        reasons += fused.about("the norm", fused.layer_norm_obstacles(parts.norm))
    if parts.out_norm is not None:
        reasons += fused.about("the norm behind", fused.group_norm_obstacles(parts.out_norm))
    if not all(map(fused.drops_nothing, parts.dropouts)):
        reasons.append("a dropout is active or has hooks")
    return reasons


def depthwise_mlp(
    x: Tensor,
    grid: tuple[int, int],
    parts: DepthwiseMLPParts,
    *,
    inner_residual: str | None = None,
    bn_after_activation: bool = False,
    residual: Tensor | None = None,
    statistics: Tensor | None = None,
    num_prefix_tokens: int = 0,
    return_statistics: bool = False,
    return_mean: bool = False,
    packed: PackedWeights | None = None,
    backend: str | None = None,
) -> Any:
    """`ops.depthwise_mlp` from submodules without obstacles; batch norms in training count the batch.

    Args:
        x: `[B, P + H*W, C]`.
        grid: `(H, W)`.
        parts: the submodules.
        statistics: of x, for a GroupNorm in front, where they are known already.
        inner_residual, bn_after_activation, residual, num_prefix_tokens, return_statistics, return_mean, packed,
            backend: as the operator takes them.
    """
    fc1_weight, fc1_bias = _linear(parts.fc1)
    fc2_weight, fc2_bias = _linear(parts.fc2)
    dw_weight, dw_bias = parts.dw._parameters["weight"], parts.dw._parameters["bias"]
    assert dw_weight is not None
    assert (name := activation_name(parts.act)) is not None
    options: dict[str, Any] = {}
    if parts.norm is not None:
        weights = parts.norm._parameters
        kind = "group" if isinstance(parts.norm, nn.GroupNorm) else "layer"
        options = {"norm": kind, "norm_weight": weights["weight"], "norm_bias": weights["bias"]}
        options["norm_eps"] = parts.norm.eps
        if kind == "group":
            options["norm_statistics"] = statistics
    if parts.out_norm is not None:
        weights = parts.out_norm._parameters
        options |= {"out_norm_weight": weights["weight"], "out_norm_bias": weights["bias"]}
        options["out_norm_eps"] = parts.out_norm.eps
    return ops.depthwise_mlp(
        x,
        fc1_weight,
        fc1_bias,
        dw_weight,
        dw_bias,
        fc2_weight,
        fc2_bias,
        grid=grid,
        activation=name,
        hidden_activation=None if parts.hidden_act is None else activation_name(parts.hidden_act),
        inner_residual=inner_residual,
        bn1=None if parts.bn1 is None else fused.batch_norm_of(parts.bn1),
        bn2=None if parts.bn2 is None else fused.batch_norm_of(parts.bn2),
        bn3=None if parts.bn3 is None else fused.batch_norm_of(parts.bn3),
        bn_after_activation=bn_after_activation,
        residual=residual,
        num_prefix_tokens=num_prefix_tokens,
        return_statistics=return_statistics,
        return_mean=return_mean,
        packed=packed,
        backend=backend,
        **options,
    )


def _linear(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    if isinstance(layer, nn.Conv2d):
        return fused.linear_of(layer)
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    assert weight is not None
    return weight, bias


def _linear_obstacles(layer: nn.Module) -> list[str]:
    if isinstance(layer, nn.Conv2d):
        return fused.pointwise_conv_obstacles(layer)
    return fused.linear_obstacles(layer)


def _filter_obstacles(conv: nn.Conv2d) -> list[str]:
    reasons = fused.filter_obstacles(conv)
    if not reasons and not (
        conv.kernel_size[0] % 2 == 1 and conv.stride == (1, 1) and conv.padding[0] == conv.kernel_size[0] // 2
    ):
        reasons.append("changes the size of the map")
    return reasons
