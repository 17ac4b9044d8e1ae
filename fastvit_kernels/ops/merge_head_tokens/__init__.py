"""DHVT's head tokens behind its attention: their mean goes to the class token, and they are gone."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvit_kernels.ops import library
from fastvit_kernels.ops.arguments import check_activation_tensor, check_integer, check_residual, compute_dtype
from fastvit_kernels.ops.merge_head_tokens import native, triton
from fastvit_kernels.ops.merge_head_tokens.reference import STATIC_SCHEMA, Static, gradients, reference
from fastvit_kernels.ops.operator import Operator, Outputs, Tensors

__all__ = ["merge_head_tokens"]


def _fake(tensors: Tensors, static: Static) -> Outputs:
    x, residual = tensors
    assert x is not None
    dtype = static.dtype if residual is None else torch.promote_types(residual.dtype, static.dtype)
    return (x.new_empty((x.shape[0], x.shape[1] - static.num_heads, x.shape[2]), dtype=dtype),)


OPERATOR = Operator(
    name="merge_head_tokens",
    static=Static,
    static_schema=STATIC_SCHEMA,
    parameters=(),
    returns=1,
    reference=reference,
    fake=_fake,
    residual=1,
    unread=(0, 1),
    backends=[native.Cpu(), triton.Triton()],
)
library.register(OPERATOR, triton.launch, triton.launch_backward, gradients=gradients)


def merge_head_tokens(
    x: Tensor, *, num_heads: int, residual: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """The class token with the mean of the head tokens added, and the other tokens, all on top of a residual.

    Equivalent plain PyTorch::

        out = residual + x[:, :-num_heads]
        out[:, :1] += x[:, -num_heads:].mean(1, keepdim=True)

    Args:
        x: `[B, N + num_heads, C]`: the class token, the patches, and a token for each head; fp64, fp32, bf16 or fp16.
        num_heads: head tokens at the end; fewer than there are tokens.
        residual: `[B, N, C]` or None; added in its own dtype promoted with x's.
        backend: runs this call on one backend; see `use_backend`.

    Returns:
        `[B, N, C]`, in x's dtype or autocast's, promoted with the residual's.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
        BackendError: the chosen backend cannot run the call.

    Source: Lu et al., "Bridging the Gap Between Vision Transformers and Convolutional Neural Networks on Small
    Datasets" (DHVT), section 3.4.
    """
    batch, tokens, channels = check_activation_tensor("x", x, 3).shape
    check_integer("num_heads", num_heads, 1)
    if tokens <= num_heads:
        raise ValueError(f"x: expected more than {num_heads} tokens, got shape {tuple(x.shape)}")
    if residual is not None:
        check_residual(residual, (batch, tokens - num_heads, channels), x)
    static = Static(num_heads, compute_dtype(x))
    return library.call(OPERATOR, [x, residual], static, backend=backend)[0]
