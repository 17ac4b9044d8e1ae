"""Softmax attention of many heads, the middle of both attention operators: step by step, and by PyTorch's function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit_kernels.ops.arguments import short
from fastvit_kernels.ops.operator import GradientKernels, Outputs, Tensors
from fastvit_kernels.ops.precision import wide

# Queries, keys, values, bias table, keys that are left out, scale.
Attend = Callable[[Tensor, Tensor, Tensor, "Tensor | None", "Tensor | None", float], Tensor]
# A launch of a GPU has no more blocks along its second and third axis, where PyTorch's kernels put the batch.
_LARGEST_BATCH = 65535


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, absent: Tensor | None, scale: float) -> Tensor:
    """`softmax(q k^T * scale + bias) v` with the softmax in at least fp32.

    Args:
        q, k, v: `[..., heads, N, d]`, `[..., heads, M, d]` and `[..., heads, M, d_v]`.
        bias: `[heads, N, M]`, or None.
        absent: keys that take no part, of any shape that `[..., heads, N, M]` broadcasts; or None.
        scale: factor on the scores.
    """
    scores = (q * scale) @ k.transpose(-2, -1)
    if bias is not None:
        scores = scores + bias.to(wide(q.dtype))
    if absent is not None:
        scores = scores.masked_fill(absent, float("-inf"))
    return scores.softmax(-1, dtype=wide(q.dtype)).to(q.dtype) @ v


def sdpa_attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, absent: Tensor | None, scale: float) -> Tensor:
    """As `attend`, by `F.scaled_dot_product_attention`, which chooses among PyTorch's kernels for the device."""
    if not q.numel():
        # Not all of those kernels take nothing.
        return attend(q, k, v, bias, absent, scale)
    batch = q.shape[:-3]
    mask = None if bias is None else bias.to(q.dtype)
    if absent is not None:
        mask = ~absent if mask is None else torch.where(absent, float("-inf"), mask)
        mask = mask.expand(*batch, *mask.shape[-3:]).flatten(0, -4)
    elif mask is not None:
        mask = mask.unsqueeze(0)
    q, k, v = (t.flatten(0, -4) for t in (q, k, v))
    found = []
    for first in range(0, len(q), _LARGEST_BATCH):
        part = slice(first, first + _LARGEST_BATCH)
        masked = mask if mask is None or len(mask) == 1 else mask[part]
        found.append(F.scaled_dot_product_attention(q[part], k[part], v[part], masked, scale=scale))
    return torch.cat(found).unflatten(0, batch) if len(found) > 1 else found[0].unflatten(0, batch)


def sdpa_reasons(tensors: Tensors) -> list[str]:
    """Why the operators with `sdpa_attend` in them cannot run a call (empty: they can)."""
    first = tensors[0]
    assert first is not None
    if first.device.type in ("cpu", "cuda"):
        return []
    return [f"tensors are on {first.device.type}, it is registered for cpu and cuda"]


def sdpa_gradient_reasons(tensors: Tensors, dtype: torch.dtype) -> list[str]:
    """Why their gradients are not recomputed through `sdpa_attend` (empty: they are)."""
    first = tensors[0]
    assert first is not None
    if first.device.type != "cpu" or dtype is torch.bfloat16:
        return []
    # There PyTorch's kernel has an approximate exponential: errors of up to 28 times the reference's were seen in fp32.
    return [f"{short(dtype)} on a CPU: PyTorch's gradients of attention break the numerics rule but in bfloat16"]


class SdpaBackend(GradientKernels):
    """An attention operator's reference with PyTorch's attention in it; gradients by recomputing the same."""

    name = "sdpa"

    def supports(self, tensors: Tensors, static: Any) -> list[str]:
        return sdpa_reasons(tensors)

    def run(self, tensors: Tensors, packed: Tensor | None, static: Any) -> Outputs:
        name, overload = self.backward
        kernels = getattr(getattr(torch.ops.fastvit, name.removesuffix("_backward")), overload)
        return tuple(kernels(tensors, *static))

    def supports_backward(
        self, grads: Sequence[Tensor], tensors: Tensors, needs: Sequence[bool], static: Any
    ) -> list[str]:
        return sdpa_gradient_reasons(tensors, static.dtype)
