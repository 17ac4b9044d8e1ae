"""What the attention modules do outside the fused operators, and where they call submodules instead."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit_kernels import ops
from fastvit_kernels.nn import fused
from fastvit_kernels.ops.packing import PackedWeights
from fastvit_kernels.ops.patch_embedding import linear_of_rows


def linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    packed: PackedWeights | None,
    backend: str | None,
    *,
    norm: nn.LayerNorm | None = None,
) -> Tensor:
    """A linear over the channels of `[B, N, C]` rows, normalised first if there is a `norm`.

    With `packed` its weights stay packed between calls; a norm is fused in any case.
    """
    assert weight is not None
    if packed is None and norm is None and not _faster_fused(x):
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    norms = fused.layer_norm_arguments(norm)
    return linear_of_rows(x, weight, bias, packed=packed, backend=backend, **norms)


def _faster_fused(x: Tensor) -> bool:
    """Whether the operator is faster than `F.linear` even if it packs the weights at each call.

    Measured with DHVT's keys and values (batch 8, forward and backward): in fp32 on a CPU, not in bf16.
    """
    training = torch.is_grad_enabled() and x.requires_grad
    return training and x.device.type == "cpu" and x.dtype is torch.float32


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_drop: nn.Module,
    *,
    num_heads: int,
    scale: float,
    attn_bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention without its projection, on rows; with dropout of the probabilities it is spelt out."""
    if fused.drops_nothing(attn_drop):
        out = ops.global_attention(q, k, v, num_heads=num_heads, scale=scale, attn_bias=attn_bias, backend=backend)
        assert isinstance(out, Tensor)
        return out
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    scores = q * scale @ k.transpose(-2, -1)
    scores = scores if attn_bias is None else scores + attn_bias.to(scores.dtype)
    return (attn_drop(scores.softmax(-1)).to(v.dtype) @ v).transpose(1, 2).flatten(2)
