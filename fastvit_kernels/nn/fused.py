"""From submodules to fused operators: what may be fused, and the operators' arguments.

Everything here takes plain PyTorch submodules, so it serves our own modules and those of other libraries alike. A fused
operator reads the parameters of the submodules it stands in for and never calls them; `*_obstacles` lists every reason
why that would change what the model computes (no reason: the fused call is the same function). The annotations name the
classes that can be fused; a model may hold something else in their place, and the obstacles say so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypedDict

import torch
import torch.distributed
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastvit_kernels import ops
from fastvit_kernels.nn.activations import QuickGELU
from fastvit_kernels.nn.layer_norm import LayerNorm
from fastvit_kernels.ops.packing import PackedWeights


class Branch(NamedTuple):
    """The submodules that make q, k or v: depthwise convolution, batch normalisation, linear."""

    conv: nn.Conv2d
    bn: nn.BatchNorm2d
    linear: nn.Linear


class GroupNormArguments(TypedDict):
    """The operators' keyword arguments for the GroupNorm of one group in front of them."""

    norm: str
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    norm_eps: float


class LayerNormArguments(TypedDict, total=False):
    """The operators' keyword arguments for the LayerNorm in front of them."""

    norm_weight: Tensor | None
    norm_bias: Tensor | None
    norm_eps: float


class InNormArguments(TypedDict, total=False):
    """`ops.patch_embedding`'s keyword arguments for the LayerNorm in front of its convolution."""

    in_norm_weight: Tensor | None
    in_norm_bias: Tensor | None
    in_norm_eps: float


def has_hooks(module: nn.Module) -> bool:
    """Whether something on the module expects it to be called: a hook, or a `forward` replaced on the instance."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def drops_nothing(module: nn.Module) -> bool:
    """Whether calling this dropout or drop path now would return its input (and nobody expects the call).

    Knows `nn.Identity`, `nn.Dropout`, `nn.Dropout2d` and any module with timm's `drop_prob` attribute.
    """
    if has_hooks(module):
        return False
    if type(module) is nn.Identity:
        return True
    rate = getattr(module, "p" if type(module) in (nn.Dropout, nn.Dropout2d) else "drop_prob", None)
    return rate is not None and (rate == 0.0 or not module.training)


def activation_name(module: nn.Module) -> str | None:
    """The operators' name of an activation module, or None for one they do not have."""
    if type(module) is QuickGELU:
        return "quick_gelu"
    if type(module) is nn.GELU and module.approximate == "none":
        return "gelu"
    return None


def conv_projection_attention_obstacles(
    branches: Sequence[Branch], proj: nn.Linear, attn_drop: nn.Module, norm: nn.LayerNorm | None = None
) -> list[str]:
    """Why `conv_projection_attention` would not compute what calling these submodules computes.

    Args:
        branches: the submodules of q, k and v.
        proj: the output projection.
        attn_drop: the dropout on the attention probabilities.
        norm: the LayerNorm in front, if it is to be fused as well.
    """
    return conv_projection_obstacles(branches, norm) + global_attention_obstacles(proj, attn_drop)


def conv_projection_obstacles(branches: Sequence[Branch], norm: nn.LayerNorm | None = None) -> list[str]:
    """Why `conv_projection` would not compute what calling these submodules computes."""
    reasons: list[str] = []
    for name, (conv, bn, linear) in zip(("q", "k", "v"), branches, strict=True):
        if found := _conv_obstacles(conv):
            reasons += about(f"{name}'s convolution", found)
        if found := batch_norm_obstacles(bn):
            reasons += about(f"{name}'s batch norm", found)
        if found := _obstacles(linear, nn.Linear):
            reasons += about(f"{name}'s linear", found)
    if not reasons and len({uses_batch_statistics(branch.bn) for branch in branches}) > 1:
        reasons.append("the batch norms of q, k and v are in different modes")
    if norm is not None and (found := layer_norm_obstacles(norm)):
        reasons += about("the layer norm", found)
    return reasons


def global_attention_obstacles(proj: nn.Linear, attn_drop: nn.Module) -> list[str]:
    """Why `global_attention` would not compute what calling these submodules around softmax computes."""
    reasons: list[str] = []
    if found := _obstacles(proj, nn.Linear):
        reasons += about("the output projection", found)
    if not drops_nothing(attn_drop):
        reasons += about("attention dropout", _dropout_obstacles(attn_drop))
    return reasons


def pointwise_mlp_obstacles(
    fc1: nn.Linear,
    act: nn.Module,
    fc2: nn.Linear,
    hidden_drop: nn.Module | None = None,
    norm: nn.LayerNorm | None = None,
) -> list[str]:
    """Why `pointwise_mlp` would not compute what calling these submodules computes.

    Args:
        fc1, act, fc2: linear, activation, linear.
        hidden_drop: the dropout behind the activation, if there is one.
        norm: the LayerNorm in front, if it is to be fused as well.
    """
    reasons: list[str] = []
    if found := _obstacles(fc1, nn.Linear):
        reasons += about("the first linear", found)
    if activation_name(act) is None:
        reasons.append(f"the activation is {act}, the fused ones are QuickGELU and exact GELU")
    elif has_hooks(act):
        reasons.append("the activation has hooks")
    if found := _obstacles(fc2, nn.Linear):
        reasons += about("the second linear", found)
    if hidden_drop is not None and not drops_nothing(hidden_drop):
        reasons += about("hidden dropout", _dropout_obstacles(hidden_drop))
    if norm is not None and (found := layer_norm_obstacles(norm)):
        reasons += about("the layer norm", found)
    return reasons


def dense_conv_obstacles(conv: nn.Conv2d) -> list[str]:
    """Why `patch_embedding` without norms would not compute what this convolution (of any class) computes."""
    reasons = _square_conv_obstacles(conv)
    if conv.groups != 1:
        reasons.append(f"has {conv.groups} groups, expected 1")
    return reasons + _storage_obstacles(conv)


def own_linear_obstacles(linear: nn.Linear) -> list[str]:
    """`linear_obstacles` of a linear of any class, hooked or not: of a module that is one itself."""
    return _storage_obstacles(linear)


def own_filter_obstacles(conv: nn.Conv2d) -> list[str]:
    """`filter_obstacles` of a convolution of any class, hooked or not: of a module that is one itself."""
    reasons = _square_conv_obstacles(conv)
    if not conv.groups == conv.in_channels == conv.out_channels:
        reasons.append("is not depthwise")
    return reasons + _storage_obstacles(conv)


def depthwise_conv_obstacles(
    conv: nn.Conv2d, bn: nn.BatchNorm2d | None = None, norm: nn.LayerNorm | None = None
) -> list[str]:
    """Why `depthwise_conv` would not compute what calling these submodules computes."""
    reasons = about("the convolution", filter_obstacles(conv))
    if bn is not None:
        reasons += about("the batch norm", batch_norm_obstacles(bn))
    if norm is not None:
        reasons += about("the layer norm", layer_norm_obstacles(norm))
    return reasons


def patch_embedding_obstacles(conv: nn.Conv2d, norm: nn.LayerNorm) -> list[str]:
    """Why `patch_embedding` would not compute what calling these submodules computes."""
    reasons: list[str] = []
    if found := _obstacles(conv, nn.Conv2d) or _square_conv_obstacles(conv):
        reasons += about("the convolution", found)
    elif conv.groups != 1:
        reasons.append(f"the convolution has {conv.groups} groups, expected 1")
    if found := layer_norm_obstacles(norm):
        reasons += about("the layer norm", found)
    return reasons


def group_norm_obstacles(norm: nn.GroupNorm) -> list[str]:
    """Why the operators' `norm="group"` would not compute what calling this GroupNorm computes."""
    reasons = _obstacles(norm, nn.GroupNorm)
    if not reasons and norm.num_groups != 1:
        reasons.append(f"has {norm.num_groups} groups, expected 1")
    elif not reasons and any(parameter is None for parameter in _weight_and_bias(norm)):
        reasons.append("has no weight or no bias")
    return reasons


def pointwise_conv_obstacles(conv: nn.Conv2d) -> list[str]:
    """Why a linear over the channels of each pixel would not compute what calling this convolution computes."""
    reasons = _obstacles(conv, nn.Conv2d)
    if not reasons and not (
        conv.kernel_size == conv.stride == (1, 1) and conv.padding in ("valid", "same", (0, 0)) and conv.groups == 1
    ):
        reasons.append("does more than mix the channels of a pixel")
    return reasons


def conv_projection_attention(
    x: Tensor,
    grid: tuple[int, int],
    branches: Sequence[Branch],
    proj: nn.Linear,
    *,
    num_heads: int,
    scale: float,
    num_prefix_tokens: int = 0,
    norm: nn.LayerNorm | None = None,
    residual: Tensor | None = None,
    packed: Mapping[str, PackedWeights] | None = None,
    backend: str | None = None,
) -> Tensor:
    """CvT's attention on fused operators, from submodules without obstacles.

    Args:
        x: `[B, P + H*W, C]`.
        grid: `(H, W)`.
        branches: the submodules of q, k and v; batch norms in training count the batch and update their statistics.
        proj: the output projection, an `nn.Linear`.
        num_heads, scale: of the attention.
        num_prefix_tokens: P, the class tokens in front, which skip convolution and batch normalisation.
        norm: LayerNorm applied to x first, or None.
        residual: added to the result, or None.
        packed: packed weights by operator name, `conv_projection` and `global_attention`.
        backend: passed to both operators.

    Returns:
        `[B, P + H_q*W_q, C_out]`.
    """
    q, k, v = conv_projection(
        x, grid, branches, num_prefix_tokens=num_prefix_tokens, norm=norm, packed=packed, backend=backend
    )
    return global_attention(
        q, k, v, proj, num_heads=num_heads, scale=scale, residual=residual, packed=packed, backend=backend
    )


def conv_projection(
    x: Tensor,
    grid: tuple[int, int],
    branches: Sequence[Branch],
    *,
    num_prefix_tokens: int = 0,
    norm: nn.LayerNorm | None = None,
    packed: Mapping[str, PackedWeights] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The first half of `conv_projection_attention`: q, k and v."""
    query, key, value = branches
    return ops.conv_projection(
        x,
        projection_of(*query),
        projection_of(*key),
        projection_of(*value),
        grid=grid,
        num_prefix_tokens=num_prefix_tokens,
        packed=None if packed is None else packed["conv_projection"],
        backend=backend,
        **layer_norm_arguments(norm),
    )


def global_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    proj: nn.Linear,
    *,
    num_heads: int,
    scale: float,
    residual: Tensor | None = None,
    packed: Mapping[str, PackedWeights] | None = None,
    backend: str | None = None,
) -> Tensor:
    """The second half of `conv_projection_attention`: attention, output projection and residual."""
    weight, bias = _weight_and_bias(proj)
    out = ops.global_attention(
        q,
        k,
        v,
        num_heads=num_heads,
        scale=scale,
        proj_weight=weight,
        proj_bias=bias,
        residual=residual,
        packed=None if packed is None else packed["global_attention"],
        backend=backend,
    )
    assert isinstance(out, Tensor)
    return out


def pointwise_mlp(
    x: Tensor,
    fc1: nn.Linear,
    act: nn.Module,
    fc2: nn.Linear,
    *,
    norm: nn.LayerNorm | None = None,
    residual: Tensor | None = None,
    packed: Mapping[str, PackedWeights] | None = None,
    backend: str | None = None,
) -> Tensor:
    """LayerNorm (or none), linear, activation, linear, residual (or none), from submodules without obstacles.

    `packed` holds the packed weights by operator name, here `pointwise_mlp`.
    """
    activation = activation_name(act)
    weight1, bias1 = _weight_and_bias(fc1)
    weight2, bias2 = _weight_and_bias(fc2)
    assert activation is not None and weight1 is not None and weight2 is not None
    return ops.pointwise_mlp(
        x,
        weight1,
        bias1,
        weight2,
        bias2,
        activation=activation,
        residual=residual,
        packed=None if packed is None else packed["pointwise_mlp"],
        backend=backend,
        **layer_norm_arguments(norm),
    )


def patch_embedding(
    x: Tensor,
    conv: nn.Conv2d,
    norm: nn.LayerNorm,
    *,
    in_norm: nn.LayerNorm | None = None,
    packed: Mapping[str, PackedWeights] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Strided convolution and LayerNorm over the channels, from submodules without obstacles.

    `[B, C, H, W]` to a channels-last `[B, C_out, H', W']`; `in_norm` is applied to the pixels in front of the
    convolution; `packed` holds the packed weights by operator name, here `patch_embedding`.
    """
    weight, bias = _weight_and_bias(conv)
    padding = conv.padding[0]
    assert weight is not None and isinstance(padding, int)
    return ops.patch_embedding(
        x,
        weight,
        bias,
        stride=conv.stride[0],
        padding=padding,
        packed=None if packed is None else packed["patch_embedding"],
        backend=backend,
        **layer_norm_arguments(norm),
        **in_norm_arguments(in_norm),
    )


def depthwise_conv(
    x: Tensor,
    grid: tuple[int, int],
    conv: nn.Conv2d,
    bn: nn.BatchNorm2d | None = None,
    *,
    norm: nn.LayerNorm | None = None,
    residual: Tensor | None = None,
    packed: PackedWeights | None = None,
    backend: str | None = None,
) -> Tensor:
    """LayerNorm (or none), depthwise convolution, batch norm (or none), residual (or none), without obstacles.

    `[B, H*W, C]` to `[B, H'*W', C]`, `grid` being `(H, W)`. A batch norm in training counts the batch.
    """
    weight, bias = _weight_and_bias(conv)
    padding = conv.padding[0]
    assert weight is not None and isinstance(padding, int)
    return ops.depthwise_conv(
        x,
        weight,
        bias,
        grid=grid,
        stride=conv.stride[0],
        padding=padding,
        bn=None if bn is None else batch_norm_of(bn),
        residual=residual,
        packed=packed,
        backend=backend,
        **layer_norm_arguments(norm),
    )


def layer_norm_arguments(norm: nn.LayerNorm | None) -> LayerNormArguments:
    """The operators' `norm_*` arguments for a LayerNorm; none of them for None."""
    if norm is None:
        return {}
    weight, bias = _weight_and_bias(norm)
    return {"norm_weight": weight, "norm_bias": bias, "norm_eps": norm.eps}


def in_norm_arguments(norm: nn.LayerNorm | None) -> InNormArguments:
    """`ops.patch_embedding`'s `in_norm_*` arguments for a LayerNorm; none of them for None."""
    if norm is None:
        return {}
    weight, bias = _weight_and_bias(norm)
    return {"in_norm_weight": weight, "in_norm_bias": bias, "in_norm_eps": norm.eps}


def group_norm_arguments(norm: nn.GroupNorm) -> GroupNormArguments:
    """The operators' `norm*` arguments for a GroupNorm of one group."""
    weight, bias = _weight_and_bias(norm)
    return {"norm": "group", "norm_weight": weight, "norm_bias": bias, "norm_eps": norm.eps}


def linear_of(conv: nn.Conv2d) -> tuple[Tensor, Tensor | None]:
    """Weight `[C_out, C]` and bias of the linear that a 1 x 1 convolution is."""
    weight, bias = _weight_and_bias(conv)
    assert weight is not None
    return weight.flatten(1), bias


def projection_of(conv: nn.Conv2d, bn: nn.BatchNorm2d, linear: nn.Linear) -> ops.Projection:
    """One branch of `ops.conv_projection`. A batch norm in training counts the batch, as calling it would."""
    conv_weight, _ = _weight_and_bias(conv)
    weight, bias = _weight_and_bias(linear)
    padding = conv.padding[0]
    assert conv_weight is not None and weight is not None and isinstance(padding, int)
    return ops.Projection(conv_weight, weight, bias, batch_norm_of(bn), conv.stride[0], padding)


def batch_norm_of(bn: nn.BatchNorm2d) -> ops.BatchNorm:
    """A `BatchNorm2d` as the operator's argument, with the mode and the momentum that calling it now would use."""
    weight, bias = _weight_and_bias(bn)
    buffers = bn._buffers
    mean, var = buffers["running_mean"], buffers["running_var"]
    if not bn.training:
        return ops.BatchNorm(weight, bias, mean, var, bn.eps, training=mean is None and var is None)
    if not bn.track_running_stats:
        return ops.BatchNorm(weight, bias, None, None, bn.eps, training=True)
    momentum = 0.0 if bn.momentum is None else bn.momentum
    batches = buffers["num_batches_tracked"]
    if batches is not None:
        batches.add_(1)
        if bn.momentum is None:
            momentum = 1.0 / float(batches)
    return ops.BatchNorm(weight, bias, mean, var, bn.eps, True, momentum)


def _weight_and_bias(module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    # Straight from the dictionary: attribute access through Module.__getattr__ is what costs most in a small block.
    parameters = module._parameters
    return parameters["weight"], parameters["bias"]


def uses_batch_statistics(bn: nn.BatchNorm2d) -> bool:
    """Whether calling it now would normalise by the statistics of the batch."""
    return bn.training or (bn._buffers["running_mean"] is None and bn._buffers["running_var"] is None)


def _synchronises(bn: nn.SyncBatchNorm) -> bool:
    """Whether a `SyncBatchNorm` would exchange its statistics with other processes now."""
    return (
        bn.training
        and torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size(bn.process_group) > 1
    )


def about(name: str, predicates: list[str]) -> list[str]:
    """Reasons that say what they are about."""
    return [f"{name} {predicate}" for predicate in predicates]


def _obstacles(module: nn.Module, *expected: type[nn.Module]) -> list[str]:
    """Why this module's parameters may not be read instead of calling it."""
    if type(module) not in expected:
        names = dict.fromkeys(cls.__name__ for cls in expected)
        return [f"is a {type(module).__name__}, expected {' or '.join(names)}"]
    if has_hooks(module):
        return ["has hooks"]
    for name in ("weight", "bias"):
        value = module._parameters.get(name, module)
        if type(value) is not nn.Parameter and value is not None and not _is_plain(value):
            return [f"holds no plain parameter as its {name}"]
    return []


def _storage_obstacles(module: nn.Module) -> list[str]:
    values = module._parameters.values()
    plain = all(value is None or type(value) is nn.Parameter or _is_plain(value) for value in values)
    return [] if plain else ["holds no plain parameters"]


def _is_plain(value: object) -> bool:
    """Whether a value found in a module's parameters is a tensor whose memory the kernels may read."""
    return isinstance(value, Tensor) and not is_traceable_wrapper_subclass(value)


def layer_norm_obstacles(norm: nn.Module) -> list[str]:
    """Why a LayerNorm over the channels would not compute what calling this module computes."""
    reasons = _obstacles(norm, LayerNorm, nn.LayerNorm)
    if not reasons and isinstance(norm, nn.LayerNorm) and len(norm.normalized_shape) != 1:
        return [f"is over {tuple(norm.normalized_shape)}, expected the channels only"]
    return reasons


def linear_obstacles(linear: nn.Module) -> list[str]:
    """Why a linear over the channels would not compute what calling this module computes."""
    return _obstacles(linear, nn.Linear)


def filter_obstacles(conv: nn.Conv2d) -> list[str]:
    """Why a square depthwise filter over zero padding would not compute what calling this module computes."""
    if reasons := _obstacles(conv, nn.Conv2d):
        return reasons
    if not conv.groups == conv.in_channels == conv.out_channels:
        reasons.append("is not depthwise")
    return reasons + _square_conv_obstacles(conv)


def _conv_obstacles(conv: nn.Conv2d) -> list[str]:
    reasons = filter_obstacles(conv)
    if type(conv) is nn.Conv2d and conv._parameters["bias"] is not None:
        reasons.append("has a bias")
    return reasons


def _square_conv_obstacles(conv: nn.Conv2d) -> list[str]:
    """What the operators' convolutions do not know: their filters are square, dense and padded with zeros."""
    reasons: list[str] = []
    if conv.padding_mode != "zeros":
        reasons.append(f"pads with {conv.padding_mode!r}, expected zeros")
    kernel, stride, padding = conv.kernel_size, conv.stride, conv.padding
    if isinstance(padding, str):
        reasons.append(f"pads by {padding!r}, expected a number")
    elif kernel[0] != kernel[1] or stride[0] != stride[1] or padding[0] != padding[1]:
        reasons.append("differs between the axes in kernel size, stride or padding")
    if conv.dilation != (1, 1):
        reasons.append(f"is dilated by {conv.dilation}")
    return reasons


def batch_norm_obstacles(bn: nn.Module) -> list[str]:
    """Why the operators' batch normalisation would not compute what calling this module computes."""
    reasons = _obstacles(bn, nn.BatchNorm2d, nn.SyncBatchNorm)
    if not reasons and isinstance(bn, nn.SyncBatchNorm) and _synchronises(bn):
        return ["exchanges statistics between processes"]
    return reasons


def _dropout_obstacles(dropout: nn.Module) -> list[str]:
    return ["has hooks" if has_hooks(dropout) else "is active"]
