"""The gate of DHVT's class token, behind an MLP that passes the token by, in place; for inference on a CPU whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvit_kernels.ops import dispatch, library, listening
from fastvit_kernels.ops.native import cpu_reasons
from fastvit_kernels.ops.operator import Tensors

library.define_in_place(
    "gate_class_token", "Tensor(a!) out, Tensor?[] tensors, float? norm_eps, str activation", activations=2
)


def can_gate(tensors: Tensors, dtype: torch.dtype, backend: str | None) -> bool:
    """Whether `gate_class_token` takes these tensors now, and nobody has to see plain operators in its place."""
    return (
        dispatch.only_computes()
        and dispatch.requested_backend(backend) in ("auto", "cpu")
        and not cpu_reasons(tensors, dtype)
        and all(t is None or t.is_contiguous() for t in tensors)
    )


def gate_class_token(out: Tensor, tensors: Tensors, *, norm_eps: float | None, activation: str) -> None:
    """Add the gated class token to the first row of each image of `out`.

    Equivalent plain PyTorch::

        gate = F.linear(activation(F.linear(mean, weight1, bias1)), weight2, bias2)
        out[:, 0] += F.layer_norm(x[:, 0], (C,), norm_weight, norm_bias, norm_eps) * gate

    Args:
        out: `[B, N, C]`, fp32 or bf16, as all tensors here, dense.
        tensors: `[x, mean, norm_weight, norm_bias, weight1, bias1, weight2, bias2]`: x like `out`, mean `[B, C]`,
            weights `[C_hidden, C]` and `[C, C_hidden]`; norm and biases may be None.
        norm_eps: epsilon of the LayerNorm, None for no normalisation.
        activation: `"gelu"` (exact, erf), `"quick_gelu"`, `"silu"` or `"relu"`.

    Source: Lu et al., "Bridging the Gap Between Vision Transformers and Convolutional Neural Networks on Small
    Datasets", section 3.3.
    """
    torch.ops.fastvit.gate_class_token.default(out, list(tensors), norm_eps, activation)


def add_gated(out: Tensor, token: Tensor, gate: Tensor) -> Tensor:
    """`out`, `[B, N, C]`, with `token * gate`, each `[B, 1, C]`, added to its first row in place; all of one dtype.

    Equivalent plain PyTorch::

        out[:, :1].addcmul_(token, gate)
    """
    if not out.requires_grad or torch.compiler.is_compiling() or dispatch.reasons_for_plain_operators():
        out[:, :1].addcmul_(token, gate)
        return out
    result: Tensor = listening.whole(_AddGated.apply, out, token, gate, differentiable=True)
    return result


class _AddGated(torch.autograd.Function):
    """A write to a view, whose gradient is that of the whole, not a copy of it."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, token: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(token, gate)
        ctx.mark_dirty(out)
        out[:, :1].addcmul_(token, gate)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        token, gate = ctx.saved_tensors
        first = grad[:, :1]
        return grad, first * gate, first * token
