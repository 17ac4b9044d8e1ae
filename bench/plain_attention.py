"""The attention of the plain models: as its equation says, or as PyTorch's one function for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]


def _explicit(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    scores = q * q.shape[-1] ** -0.5 @ k.mT
    return (scores if bias is None else scores + bias).softmax(-1) @ v


def _sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


_attention: Attention = _explicit


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Rows `[..., N, d]`; the scale is that of a head, and goes on the queries. `bias` is added to the scores."""
    return _attention(q, k, v, bias)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """Tokens `[B, N, C]` to `[B, M, C]` keys and values; a head's channels are neighbours."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return softmax_attention(q, k, v, bias).transpose(1, 2).flatten(2)


@contextmanager
def sdpa() -> Iterator[None]:
    """Inside, the plain models attend by `F.scaled_dot_product_attention`."""
    global _attention
    previous, _attention = _attention, _sdpa
    try:
        yield
    finally:
        _attention = previous
