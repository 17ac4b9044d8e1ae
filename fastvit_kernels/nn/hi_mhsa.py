"""DHVT's head-interacted multi-head self-attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastvit_kernels import ops
from fastvit_kernels.nn import checks, fused
from fastvit_kernels.nn.attention_parts import attend, linear
from fastvit_kernels.nn.layer_norm import LayerNorm
from fastvit_kernels.ops.packing import PackedWeights

# Whose weights are packed: those of the head tokens, of keys and values, and of the attention.
OPERATORS = ("head_tokens", "keys", "global_attention")


class HIMHSA(nn.Module):
    """Attention among tokens and one further token for each head: DHVT's `Attention`, fused.

    Constructor arguments, parameter names and initialisation are those of the official module, so weights load both
    ways with `strict=True`. What the fused operator cannot stand in for (`fusion_obstacles` lists it) runs by calling
    the submodules.

    Equivalent plain PyTorch, with h heads of d channels and `attend` the usual attention with scale `d ** -0.5`::

        u = norm(x)
        heads = u.mean(1).unflatten(-1, (h, d))                  # over all tokens, the class token included
        heads = gelu(ht_norm(ht_proj(heads).unflatten(-1, (h, d)))).flatten(2) + pos_embed
        out = proj(attend(*qkv(torch.cat([u, heads], 1)).chunk(3, -1)))
        rows, heads = out[:, :-h], out[:, -h:]
        rows[:, 0] += heads.mean(1)
        out = residual + rows

    Args:
        dim: channels of input and output.
        num_heads: h; divides `dim`.
        qkv_bias: whether the linear of q, k and v has a bias.
        qk_scale: factor on the scores; `d ** -0.5` if None.
        attn_drop: dropout of the attention probabilities.
        proj_drop: dropout behind the output projection, of the head tokens' rows as well.

    Attributes:
        backend: runs this module's operators on one backend; None for the usual choice.

    Raises:
        TypeError, ValueError: `num_heads` does not divide `dim`.

    Source: Lu et al., "Bridging the Gap Between Vision Transformers and Convolutional Neural Networks on Small
    Datasets", section 3.4.
    """

    backend: str | None = None

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        num_heads = checks.as_integer("num_heads", num_heads)
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads: {num_heads} does not divide dim = {dim}")
        head_dim = dim // num_heads
        self.dim = dim
        self.num_heads = num_heads
        self.scale = head_dim**-0.5 if qk_scale is None else qk_scale
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.act = nn.GELU()
        self.ht_proj = nn.Linear(head_dim, dim)
        self.ht_norm = LayerNorm(head_dim)
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, num_heads, dim), std=0.02))
        self._packed: dict[str, PackedWeights] | None = None

    def forward(self, x: Tensor, *, norm: nn.LayerNorm | None = None, residual: Tensor | None = None) -> Tensor:
        """`residual + attention(norm(x))`; with x alone the official module's forward.

        Args:
            x: `[B, N, dim]` tokens, the class token first.
            norm: LayerNorm to apply to x first.
            residual: `[B, N, dim]`, added to the result; dropout is applied before.

        Returns:
            `[B, N, dim]`.

        Raises:
            TypeError, ValueError: naming the argument, what came and what was expected.
        """
        checks.check_tokens(x, self.dim)
        if x.shape[1] < 1:
            raise ValueError(f"x: expected [B, N, {self.dim}] tokens, the class token first, got {tuple(x.shape)}")
        if self.fusion_obstacles(norm):
            u = x if norm is None else norm(x)
            out = self._compose(torch.cat([u, self._head_tokens(u)], dim=1))
        else:
            out = self._fuse(x, norm)
        out = self.proj_drop(out)
        return ops.merge_head_tokens(out, num_heads=self.num_heads, residual=residual, backend=self.backend)

    def fusion_obstacles(self, norm: nn.LayerNorm | None = None) -> list[str]:
        """Every reason why `forward`, with this `norm`, would call submodules now instead of the fused operators."""
        modules: dict[str, Any] = self._modules
        reasons = fused.about("qkv", fused.linear_obstacles(modules["qkv"]))
        reasons += fused.about("ht_proj", fused.linear_obstacles(modules["ht_proj"]))
        reasons += fused.about("ht_norm", fused.layer_norm_obstacles(modules["ht_norm"]))
        if norm is not None:
            reasons += fused.about("the layer norm", fused.layer_norm_obstacles(norm))
        if fused.activation_name(modules["act"]) != "gelu" or fused.has_hooks(modules["act"]):
            reasons.append(f"act is {modules['act']}, expected GELU (exact) without hooks")
        return reasons + fused.global_attention_obstacles(modules["proj"], modules["attn_drop"])

    def prepare_inference(self, enabled: bool) -> None:
        """Keep the weights in the layout of the CPU kernels between calls (`enabled`), or stop doing so."""
        self._packed = {name: PackedWeights() for name in OPERATORS} if enabled else None

    @torch.no_grad()
    def pack_weights(self) -> None:
        """If the module is prepared for inference, pack its weights now, not at the first call."""
        if not self.fusion_obstacles():
            self.forward(self.proj.weight.new_zeros(1, 2, self.dim))

    def _head_tokens(self, u: Tensor) -> Tensor:
        """One token for each head, `[B, h, dim]`, of the mean that its channels have over all tokens."""
        means = u.mean(1).unflatten(-1, (self.num_heads, -1))
        split = self.ht_norm(self.ht_proj(means).unflatten(-1, (self.num_heads, -1)))
        return self.act(split).flatten(2).to(u.dtype) + self.pos_embed.to(u.dtype)

    def _fuse(self, x: Tensor, norm: nn.LayerNorm | None) -> Tensor:
        modules: dict[str, Any] = self._modules
        ht_proj, ht_norm = modules["ht_proj"]._parameters, modules["ht_norm"]
        tokens = ops.head_tokens(
            x,
            ht_proj["weight"],
            ht_proj["bias"],
            self.pos_embed[0],
            num_heads=self.num_heads,
            head_norm_eps=ht_norm.eps,
            head_norm_weight=ht_norm.weight,
            head_norm_bias=ht_norm.bias,
            packed=self._packing("head_tokens"),
            backend=self.backend,
            **fused.layer_norm_arguments(norm),
        )
        qkv, proj = modules["qkv"]._parameters, modules["proj"]._parameters
        # Split, not sliced: the gradients of slices are summed as tensors of the whole weight's size.
        sizes, bias = [self.dim, 2 * self.dim], qkv["bias"]
        query_weight, key_weight = qkv["weight"].split(sizes)
        query_bias, key_bias = (None, None) if bias is None else bias.split(sizes)
        keys = linear(tokens, key_weight, key_bias, self._packing("keys"), self.backend)
        out = ops.global_attention(
            tokens,
            keys,
            num_heads=self.num_heads,
            scale=self.scale,
            query_weight=query_weight,
            query_bias=query_bias,
            proj_weight=proj["weight"],
            proj_bias=proj["bias"],
            packed=self._packing("global_attention"),
            backend=self.backend,
        )
        assert isinstance(out, Tensor)
        return out

    def _compose(self, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(tokens).chunk(3, dim=-1)
        attended = attend(q, k, v, self.attn_drop, num_heads=self.num_heads, scale=self.scale, backend=self.backend)
        projected: Tensor = self.proj(attended)
        return projected

    def _packing(self, name: str) -> PackedWeights | None:
        return None if self._packed is None else self._packed[name]
