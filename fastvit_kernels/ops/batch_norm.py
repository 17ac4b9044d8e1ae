"""Batch normalisation inside an operator."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fastvit_kernels.ops import listening
from fastvit_kernels.ops.arguments import check_eps, check_flag, check_number
from fastvit_kernels.ops.precision import wide


class BatchNorm(NamedTuple):
    """A batch normalisation behind a convolution or a linear.

    Attributes:
        weight, bias: affine parameters `[C]`, or None.
        running_mean, running_var: `[C]`; None when only batch statistics exist (`track_running_stats=False`).
        eps: added to the variance.
        training: normalise by the statistics of this batch and update the running ones in place.
        momentum: weight of this batch in the running statistics, as in `nn.BatchNorm2d`.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    eps: float = 1e-5
    training: bool = False
    momentum: float = 0.1


def check_batch_norm(name: str, bn: object) -> BatchNorm:
    """A `BatchNorm` whose numbers and statistics make sense; its vectors are the matter of `check_vectors`."""
    if not isinstance(bn, BatchNorm):
        raise TypeError(f"{name}: expected a BatchNorm or None, got {type(bn).__name__}")
    if not (type(bn.eps) is float and 0.0 <= bn.eps < math.inf):
        check_eps(f"{name}.eps", bn.eps)
    if type(bn.training) is not bool:
        check_flag(f"{name}.training", bn.training)
    if bn.training:
        check_number(f"{name}.momentum", bn.momentum, 0.0, 1.0)
        if (bn.running_mean is None) != (bn.running_var is None):
            raise ValueError(f"{name}: expected both running statistics or none, got one of them")
    elif bn.running_mean is None or bn.running_var is None:
        raise ValueError(f"{name}: expected running statistics outside training, got None")
    return bn


def batch_norm_tensors(bn: BatchNorm | None, width: int, x: Tensor) -> tuple[Tensor | None, ...]:
    """Weight, bias, mean and variance as an operator lists them; all None where there is no batch norm."""
    if bn is None:
        return (None,) * 4
    if bn.training and bn.running_mean is None:
        # Only marks that there is a batch norm: the batch's statistics take these places.
        mark = torch.zeros(width, device=x.device)
        return bn.weight, bn.bias, mark, mark
    return bn[:4]


def batch_moments(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of an NCHW map, in at least fp32."""
    var, mean = torch.var_mean(maps.to(wide(maps.dtype)), dim=(0, 2, 3), correction=0)
    return mean, var


def batch_normalize(
    maps: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> Tensor:
    """An NCHW map normalised per channel by these statistics in at least fp32, in its own dtype."""
    dtype = wide(maps.dtype)
    scale = torch.rsqrt(var.to(dtype) + eps)
    if weight is not None:
        scale = scale * weight.to(dtype)
    y = (maps.to(dtype) - mean.to(dtype)[:, None, None]) * scale[:, None, None]
    if bias is not None:
        y = y + bias.to(dtype)[:, None, None]
    return y.to(maps.dtype)


class BatchOf(NamedTuple):
    """What a batch normalisation in training found: mean and biased variance `[C]` of the `values` of each channel."""

    bn: BatchNorm
    mean: Tensor
    var: Tensor
    values: int


def update_running_statistics(found: Iterable[BatchOf], by_kernel: bool = False) -> None:
    """What `nn.BatchNorm2d` does in training to its running statistics.

    `by_kernel`: the CPU kernels, which found the batch's, do it where they can, all at once.
    """
    tracked = [batch for batch in found if batch.bn.running_mean is not None and batch.bn.running_var is not None]
    if by_kernel and tracked and _may_write_through_kernel():
        running = [t for batch in tracked for t in batch.bn[2:4] if t is not None]
        if all(map(_is_plain, running)):
            moments = [t for batch in tracked for t in batch[1:3]]
            corrections = [batch.values / (batch.values - 1) for batch in tracked]
            momenta = [batch.bn.momentum for batch in tracked]
            listening.whole(_update, running, moments, momenta, corrections)
            return
    for bn, mean, var, count in tracked:
        assert bn.running_mean is not None and bn.running_var is not None
        bn.running_mean.lerp_(mean.to(bn.running_mean.dtype), bn.momentum)
        bn.running_var.lerp_((var * (count / (count - 1))).to(bn.running_var.dtype), bn.momentum)


def _may_write_through_kernel() -> bool:
    # Who listens to operators, or makes a graph of them, knows PyTorch's; but for our own listener, who is a mode.
    modes = 0 if listening.listener() is None else 1
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() == modes


def _update(running: list[Tensor], moments: list[Tensor], momenta: list[float], corrections: list[float]) -> None:
    torch.ops.fastvit.update_running_statistics.default(running, moments, momenta, corrections)
    torch.autograd.graph.increment_version(running)


def _is_plain(t: Tensor) -> bool:
    """Whether the kernel may write to it: dense fp32, and with a version to count."""
    return t.dtype is torch.float32 and t.is_contiguous() and not t.is_inference()
