"""The transformer MLP: LayerNorm, linear, activation, linear, residual."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvit_kernels.ops import library
from fastvit_kernels.ops.activations import ACTIVATIONS
from fastvit_kernels.ops.arguments import (
    check_activation_tensor,
    check_norm,
    check_parameter,
    check_residual,
    check_tensor,
    compute_dtype,
)
from fastvit_kernels.ops.operator import Operator, Outputs, Tensors
from fastvit_kernels.ops.packing import PackedWeights
from fastvit_kernels.ops.pointwise_mlp import native, triton
from fastvit_kernels.ops.pointwise_mlp.reference import STATIC_SCHEMA, Static, reference

__all__ = ["pointwise_mlp"]


def _fake(tensors: Tensors, static: Static) -> Outputs:
    x, weight2, residual = tensors[0], tensors[5], tensors[7]
    assert x is not None and weight2 is not None
    dtype = static.dtype if residual is None else torch.promote_types(residual.dtype, static.dtype)
    return (x.new_empty((*x.shape[:-1], weight2.shape[0]), dtype=dtype),)


OPERATOR = Operator(
    name="pointwise_mlp",
    static=Static,
    static_schema=STATIC_SCHEMA,
    parameters=tuple(range(1, 7)),
    returns=1,
    reference=reference,
    fake=_fake,
    packing=lambda s: (s.norm_eps is None,),
    residual=7,
    backends=[native.Cpu(), triton.Triton()],
)
library.register(OPERATOR, triton.launch, triton.launch_backward)


def pointwise_mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    activation: str,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float | None = None,
    residual: Tensor | None = None,
    packed: PackedWeights | None = None,
    backend: str | None = None,
) -> Tensor:
    """LayerNorm, linear, activation, linear, residual, the hidden rows never stored.

    Equivalent plain PyTorch::

        h = F.layer_norm(x, (C,), norm_weight, norm_bias, norm_eps)
        out = residual + F.linear(act(F.linear(h, weight1, bias1)), weight2, bias2)

    Args:
        x: `[..., C]`, fp64, fp32, bf16 or fp16; a map in `torch.channels_last` goes in as `x.permute(0, 2, 3, 1)`.
        weight1: `[C_hidden, C]`; fp32 or x's dtype, like all parameters.
        bias1: `[C_hidden]` or None.
        weight2: `[C_out, C_hidden]`.
        bias2: `[C_out]` or None.
        activation: `"gelu"` (exact, erf) or `"quick_gelu"` (`x * sigmoid(1.702 x)`).
        norm_weight, norm_bias: `[C]` or None.
        norm_eps: epsilon of the LayerNorm over C (computed in fp32); None for no normalisation.
        residual: `[..., C_out]`, added to the result (usually `x` itself), or None.
        packed: keeps the weights in the layout of the CPU kernels from call to call and repacks them when they change.
        backend: runs this call on one backend; see `use_backend`.

    Returns:
        `[..., C_out]`, in x's dtype or autocast's, promoted with the residual's.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
        BackendError: the chosen backend cannot run the call.

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", equation 3; QuickGELU as in the CvT code.
    """
    check_activation_tensor("x", x)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    norm_eps = check_norm(norm_weight, norm_bias, norm_eps, x)
    hidden = check_tensor("weight1", weight1, "[C_hidden, C]").shape[0]
    out = check_tensor("weight2", weight2, "[C_out, C_hidden]").shape[0]
    check_parameter("weight1", weight1, (hidden, x.shape[-1]), x)
    check_parameter("bias1", bias1, (hidden,), x, optional=True)
    check_parameter("weight2", weight2, (out, hidden), x)
    check_parameter("bias2", bias2, (out,), x, optional=True)
    if residual is not None:
        check_residual(residual, (*x.shape[:-1], out), x)
    tensors = [x, norm_weight, norm_bias, weight1, bias1, weight2, bias2, residual]
    static = Static(norm_eps, activation, compute_dtype(x))
    return library.call(OPERATOR, tensors, static, packed=packed, backend=backend)[0]
