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


class LayerNormArguments(TypedDict, total=False):
    """The operators' keyword arguments for the LayerNorm in front of them."""

    norm_weight: Tensor | None
    norm_bias: Tensor | None
    norm_eps: float


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

    Knows `nn.Identity`, `nn.Dropout` and any module with timm's `drop_prob` attribute.
    """
    if has_hooks(module):
        return False
    if type(module) is nn.Identity:
        return True
    rate = module.p if type(module) is nn.Dropout else getattr(module, "drop_prob", None)
    return rate is not None and (rate == 0.0 or not module.training)


def activation_name(module: nn.Module) -> str | None:
    """The operators' name of an activation module, or None for one they do not have."""
    if type(module) is QuickGELU:
        return "quick_gelu"
    if type(module) is nn.GELU and module.approximate == "none":
        return "gelu"
    return None


def conv_projection_attention_obstacles(
    branches: Sequence[Branch],
    proj: nn.Linear,
    attn_drop: nn.Module,
    norm: nn.LayerNorm | None = None,
) -> list[str]:
    """Why `conv_projection_attention` would not compute what calling these submodules computes.

    Args:
        branches: the submodules of q, k and v.
        proj: the output projection.
        attn_drop: the dropout on the attention probabilities.
        norm: the LayerNorm in front, if it is to be fused as well.
    """
    reasons = []
    for name, branch in zip(("q", "k", "v"), branches, strict=True):
        reasons += _conv_obstacles(f"{name}'s convolution", branch.conv)
        reasons += _batch_norm_obstacles(f"{name}'s batch norm", branch.bn)
        reasons += _linear_obstacles(f"{name}'s linear", branch.linear)
    if not reasons and len({_uses_batch_statistics(branch.bn) for branch in branches}) > 1:
        reasons.append("the batch norms of q, k and v are in different modes")
    reasons += _linear_obstacles("the output projection", proj)
    reasons += _dropout_obstacles("attention dropout", attn_drop)
    if norm is not None:
        reasons += _layer_norm_obstacles(norm)
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
    reasons = _linear_obstacles("the first linear", fc1)
    if has_hooks(act):
        reasons.append("the activation has hooks")
    if activation_name(act) is None:
        reasons.append(f"the activation is {act}, the fused ones are QuickGELU and exact GELU")
    reasons += _linear_obstacles("the second linear", fc2)
    if hidden_drop is not None:
        reasons += _dropout_obstacles("hidden dropout", hidden_drop)
    if norm is not None:
        reasons += _layer_norm_obstacles(norm)
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
    q, k, v = ops.conv_projection(
        x,
        *(projection_of(*branch) for branch in branches),
        grid=grid,
        num_prefix_tokens=num_prefix_tokens,
        packed=None if packed is None else packed["conv_projection"],
        backend=backend,
        **layer_norm_arguments(norm),
    )
    return ops.global_attention(
        q,
        k,
        v,
        num_heads=num_heads,
        scale=scale,
        proj_weight=proj.weight,
        proj_bias=proj.bias,
        residual=residual,
        packed=None if packed is None else packed["global_attention"],
        backend=backend,
    )


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
    assert activation is not None
    return ops.pointwise_mlp(
        x,
        fc1.weight,
        fc1.bias,
        fc2.weight,
        fc2.bias,
        activation=activation,
        residual=residual,
        packed=None if packed is None else packed["pointwise_mlp"],
        backend=backend,
        **layer_norm_arguments(norm),
    )


def layer_norm_arguments(norm: nn.LayerNorm | None) -> LayerNormArguments:
    """The operators' `norm_*` arguments for a LayerNorm; none of them for None."""
    if norm is None:
        return {}
    return {"norm_weight": norm.weight, "norm_bias": norm.bias, "norm_eps": norm.eps}


def projection_of(conv: nn.Conv2d, bn: nn.BatchNorm2d, linear: nn.Linear) -> ops.Projection:
    """One branch of `ops.conv_projection`. A batch norm in training counts the batch, as calling it would."""
    padding = conv.padding[0]
    assert isinstance(padding, int)
    return ops.Projection(
        conv.weight,
        linear.weight,
        linear.bias,
        batch_norm_of(bn),
        conv.stride[0],
        padding,
    )


def batch_norm_of(bn: nn.BatchNorm2d) -> ops.BatchNorm:
    """A `BatchNorm2d` as the operator's argument, with the mode and the momentum that calling it now would use."""
    momentum = 0.0 if bn.momentum is None else bn.momentum
    if bn.training and bn.track_running_stats and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if bn.momentum is None:
            momentum = 1.0 / float(bn.num_batches_tracked)
    mean, var = bn.running_mean, bn.running_var
    if bn.training and not bn.track_running_stats:
        mean = var = None
    return ops.BatchNorm(bn.weight, bn.bias, mean, var, bn.eps, _uses_batch_statistics(bn), momentum)


def _uses_batch_statistics(bn: nn.BatchNorm2d) -> bool:
    return bn.training or (bn.running_mean is None and bn.running_var is None)


def _synchronises(bn: nn.SyncBatchNorm) -> bool:
    """Whether a `SyncBatchNorm` would exchange its statistics with other processes now."""
    return (
        bn.training
        and torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size(bn.process_group) > 1
    )


def _obstacles(name: str, module: nn.Module, *expected: type[nn.Module]) -> list[str]:
    if type(module) not in expected:
        return [f"{name} is a {type(module).__name__}, expected {' or '.join(t.__name__ for t in expected)}"]
    if has_hooks(module):
        return [f"{name} has hooks"]
    weight = module.weight
    if type(weight) is not nn.Parameter and is_traceable_wrapper_subclass(weight):
        return [f"{name}'s weight is a {type(weight).__name__}"]
    return []


def _linear_obstacles(name: str, linear: nn.Linear) -> list[str]:
    return _obstacles(name, linear, nn.Linear)


def _layer_norm_obstacles(norm: nn.LayerNorm) -> list[str]:
    reasons = _obstacles("the layer norm", norm, LayerNorm, nn.LayerNorm)
    if not reasons and len(norm.normalized_shape) != 1:
        reasons.append(f"the layer norm is over {tuple(norm.normalized_shape)}, expected the channels only")
    return reasons


def _conv_obstacles(name: str, conv: nn.Conv2d) -> list[str]:
    reasons = _obstacles(name, conv, nn.Conv2d)
    if reasons:
        return reasons
    if not conv.groups == conv.in_channels == conv.out_channels:
        reasons.append(f"{name} is not depthwise")
    if conv.bias is not None:
        reasons.append(f"{name} has a bias")
    if conv.padding_mode != "zeros":
        reasons.append(f"{name} pads with {conv.padding_mode!r}, expected zeros")
    if isinstance(conv.padding, str):
        reasons.append(f"{name} pads by {conv.padding!r}, expected a number")
    elif any(along_h != along_w for along_h, along_w in (conv.kernel_size, conv.stride, conv.padding)):
        reasons.append(f"{name} differs between the axes in kernel size, stride or padding")
    if conv.dilation != (1, 1):
        reasons.append(f"{name} is dilated by {conv.dilation}")
    return reasons


def _batch_norm_obstacles(name: str, bn: nn.Module) -> list[str]:
    reasons = _obstacles(name, bn, nn.BatchNorm2d, nn.SyncBatchNorm)
    if not reasons and isinstance(bn, nn.SyncBatchNorm) and _synchronises(bn):
        reasons.append(f"{name} exchanges statistics between processes")
    return reasons


def _dropout_obstacles(name: str, dropout: nn.Module) -> list[str]:
    if drops_nothing(dropout):
        return []
    return [f"{name} has hooks" if has_hooks(dropout) else f"{name} is active"]
