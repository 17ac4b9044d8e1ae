"""DHVT's head tokens: normalised tokens, and behind them one token for each head."""

from __future__ import annotations

from torch import Tensor

from fastvit_kernels.ops import library
from fastvit_kernels.ops.arguments import (
    check_activation_tensor,
    check_eps,
    check_integer,
    check_norm,
    check_parameter,
    check_vectors,
    compute_dtype,
)
from fastvit_kernels.ops.head_tokens import native, triton
from fastvit_kernels.ops.head_tokens.reference import STATIC_SCHEMA, Static, reference
from fastvit_kernels.ops.operator import Operator, Outputs, Tensors
from fastvit_kernels.ops.packing import PackedWeights

__all__ = ["head_tokens"]


def _fake(tensors: Tensors, static: Static) -> Outputs:
    x = tensors[0]
    assert x is not None
    return (x.new_empty((x.shape[0], x.shape[1] + static.num_heads, x.shape[2]), dtype=static.dtype),)


OPERATOR = Operator(
    name="head_tokens",
    static=Static,
    static_schema=STATIC_SCHEMA,
    parameters=tuple(range(1, 8)),
    returns=1,
    reference=reference,
    fake=_fake,
    packing=lambda s: (s.num_heads, s.norm_eps is None),
    backends=[native.Cpu(), triton.Triton()],
)
library.register(OPERATOR, triton.launch, triton.launch_backward)


def head_tokens(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor,
    *,
    num_heads: int,
    head_norm_eps: float,
    head_norm_weight: Tensor | None = None,
    head_norm_bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float | None = None,
    packed: PackedWeights | None = None,
    backend: str | None = None,
) -> Tensor:
    """LayerNorm of all tokens, and one further token for each head, made of what its channels have on average.

    Equivalent plain PyTorch, with h heads of d = C / h channels::

        rows = F.layer_norm(x, (C,), norm_weight, norm_bias, norm_eps)
        heads = F.linear(rows.mean(1).unflatten(-1, (h, d)), weight, bias).unflatten(-1, (h, d))
        heads = F.gelu(F.layer_norm(heads, (d,), head_norm_weight, head_norm_bias, head_norm_eps))
        out = torch.cat([rows, heads.flatten(2) + pos_embed], 1)

    Args:
        x: `[B, N, C]` tokens, a class token among them if there is one; fp64, fp32, bf16 or fp16.
        weight: `[C, d]`; fp32 or x's dtype, like all parameters.
        bias: `[C]` or None.
        pos_embed: `[h, C]`.
        num_heads: h; divides C.
        head_norm_eps: epsilon of the LayerNorm over the d channels of every piece of a head token.
        head_norm_weight, head_norm_bias: `[d]` or None.
        norm_weight, norm_bias: `[C]` or None.
        norm_eps: epsilon of the LayerNorm of x; None for no normalisation. Both norms are computed in at least fp32.
        packed: keeps the weights in the layout of the CPU kernels from call to call and repacks them when they change.
        backend: runs this call on one backend; see `use_backend`.

    Returns:
        `[B, N + h, C]`, in x's dtype or autocast's.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
        BackendError: the chosen backend cannot run the call.

    Source: Lu et al., "Bridging the Gap Between Vision Transformers and Convolutional Neural Networks on Small
    Datasets" (DHVT), section 3.4.
    """
    _, tokens, channels = check_activation_tensor("x", x, 3).shape
    if tokens < 1:
        raise ValueError(f"x: expected at least one token, got shape {tuple(x.shape)}")
    check_integer("num_heads", num_heads, 1)
    if channels < 1 or channels % num_heads:
        raise ValueError(f"num_heads: {num_heads} does not divide {channels} channels")
    width = channels // num_heads
    check_parameter("weight", weight, (channels, width), x)
    check_parameter("bias", bias, (channels,), x, optional=True)
    check_parameter("pos_embed", pos_embed, (num_heads, channels), x)
    check_vectors(("head_norm_weight", "head_norm_bias"), (head_norm_weight, head_norm_bias), width, x)
    norm_eps = check_norm(norm_weight, norm_bias, norm_eps, x)
    static = Static(num_heads, norm_eps, check_eps("head_norm_eps", head_norm_eps), compute_dtype(x))
    tensors = [x, norm_weight, norm_bias, weight, bias, head_norm_weight, head_norm_bias, pos_embed]
    return library.call(OPERATOR, tensors, static, packed=packed, backend=backend)[0]
