"""CMT's lightweight multi-head self-attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastvit_kernels import ops
from fastvit_kernels.nn import checks, fused
from fastvit_kernels.nn.attention_parts import attend, linear
from fastvit_kernels.ops.arguments import check_tensor
from fastvit_kernels.ops.packing import PackedWeights

OPERATORS = ("depthwise_conv", "global_attention", "key", "value")


class LMHSA(nn.Module):
    """Attention to keys and values of a map that a depthwise convolution made smaller: CMT's `Attention`, fused.

    Constructor arguments, parameter names and initialisation are those of the official module, so weights load both
    ways with `strict=True`. The table of relative positions belongs to the stage, which shares it among its blocks, and
    comes with the call; its gradient is summed over the batch. What the fused operator cannot stand in for
    (`fusion_obstacles` lists it) runs by calling the submodules.

    Equivalent plain PyTorch, the tables' `N` and `M` being the pixels of the map and of the smaller one::

        u = norm(x)
        w = batch_norm(depthwise(u))                       # sr_ratio = 1: w = u
        scores = q(u) @ k(w).mT * scale + relative_pos     # per head
        out = residual + proj(scores.softmax(-1) @ v(w))

    Args:
        dim: channels of input and output.
        num_heads: heads; divides `dim` and `dim // qk_ratio`.
        qkv_bias: whether the linears of q, k and v have a bias.
        qk_scale: factor on the scores; `(dim / num_heads) ** -0.5` if None, whatever `qk_ratio` is.
        attn_drop: dropout of the attention probabilities.
        proj_drop: dropout behind the output projection.
        qk_ratio: divides the channels of queries and keys.
        sr_ratio: side and stride of the depthwise convolution; 1 for none.

    Attributes:
        backend: runs this module's operators on one backend; None for the usual choice.

    Raises:
        TypeError, ValueError: `num_heads` does not divide the channels, `qk_ratio` does not divide `dim`, or a ratio
            that is no positive integer.

    Source: Guo et al., "CMT: Convolutional Neural Networks Meet Vision Transformers", section 3.3. There is a batch
    norm behind the convolution, as in the official code, and no LayerNorm.
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
        qk_ratio: int = 1,
        sr_ratio: int = 1,
    ) -> None:
        super().__init__()
        num_heads = checks.as_integer("num_heads", num_heads)
        qk_ratio, sr_ratio = checks.as_integer("qk_ratio", qk_ratio, 1), checks.as_integer("sr_ratio", sr_ratio, 1)
        if dim % qk_ratio:
            raise ValueError(f"qk_ratio: {qk_ratio} does not divide dim = {dim}")
        qk_dim = dim // qk_ratio
        if num_heads < 1 or dim % num_heads or qk_dim % num_heads:
            raise ValueError(f"num_heads: {num_heads} does not divide dim = {dim} and the queries' {qk_dim} channels")
        self.dim = dim
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5 if qk_scale is None else qk_scale
        self.sr_ratio = sr_ratio
        # Created in the order of the official module: the same seed gives the same weights.
        self.q = nn.Linear(dim, qk_dim, bias=qkv_bias)
        self.k = nn.Linear(dim, qk_dim, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        if sr_ratio > 1:
            self.sr = nn.Sequential(nn.Conv2d(dim, dim, sr_ratio, sr_ratio, groups=dim), nn.BatchNorm2d(dim))
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self._packed: dict[str, PackedWeights] | None = None

    def forward(
        self,
        x: Tensor,
        h: int,
        w: int,
        relative_pos: Tensor,
        *,
        norm: nn.LayerNorm | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """`residual + attention(norm(x))`; without the optional arguments the official module's forward.

        Args:
            x: `[B, h*w, dim]` tokens of an `h x w` map, row-major.
            h, w: height and width of the map, multiples of `sr_ratio`.
            relative_pos: added to the scores, `[num_heads, h*w, h*w / sr_ratio**2]`.
            norm: LayerNorm to apply to x first, in front of the queries fused where possible.
            residual: `[B, h*w, dim]`, added to the result; dropout is applied before.

        Returns:
            `[B, h*w, dim]`.

        Raises:
            TypeError, ValueError: naming the argument, what came and what was expected.
        """
        h, w = self._check(x, h, w, relative_pos)
        drops_nothing = fused.drops_nothing(self.proj_drop)
        if self.fusion_obstacles(norm):
            out = self._compose(x if norm is None else norm(x), h, w, relative_pos)
        else:
            out = self._fuse(x, h, w, relative_pos, norm, residual if drops_nothing else None)
            if drops_nothing:
                return out
        out = self.proj_drop(out)
        return checks.add_residual(residual, out)

    def fusion_obstacles(self, norm: nn.LayerNorm | None = None) -> list[str]:
        """Every reason why `forward`, with this `norm`, would call submodules now instead of the fused operator."""
        modules: dict[str, Any] = self._modules
        reasons = []
        for name in ("q", "k", "v"):
            reasons += fused.about(name, fused.linear_obstacles(modules[name]))
        reasons += fused.global_attention_obstacles(modules["proj"], modules["attn_drop"])
        if norm is not None:
            reasons += fused.about("the layer norm", fused.layer_norm_obstacles(norm))
        if self.sr_ratio > 1:
            reasons += self._reduction_obstacles()
        return reasons

    def prepare_inference(self, enabled: bool) -> None:
        """Keep the weights in the layout of the CPU kernels between calls (`enabled`), or stop doing so."""
        self._packed = {name: PackedWeights() for name in OPERATORS} if enabled else None

    def _check(self, x: Tensor, h: int, w: int, relative_pos: Tensor) -> tuple[int, int]:
        h, w = checks.check_tokens_of_map(x, h, w, self.dim)
        if h % self.sr_ratio or w % self.sr_ratio:
            raise ValueError(f"h, w: expected multiples of sr_ratio = {self.sr_ratio}, got {h} x {w}")
        expected = (self.num_heads, h * w, h * w // self.sr_ratio**2)
        if tuple(check_tensor("relative_pos", relative_pos).shape) != expected:
            raise ValueError(f"relative_pos: expected shape {expected} for {h} x {w}, got {tuple(relative_pos.shape)}")
        return h, w

    def _reduction_obstacles(self) -> list[str]:
        sr: Any = self._modules["sr"]
        if len(sr._modules) != 2 or fused.has_hooks(sr):
            return ["the reduction's parts are not those it was made with"]
        return fused.about("the reduction:", fused.depthwise_conv_obstacles(*sr))

    def _fuse(
        self, x: Tensor, h: int, w: int, relative_pos: Tensor, norm: nn.LayerNorm | None, residual: Tensor | None
    ) -> Tensor:
        modules: dict[str, Any] = self._modules
        rows, rows_norm = x, norm
        if self.sr_ratio > 1:
            conv, bn = modules["sr"]
            packed = self._packing("depthwise_conv")
            rows = fused.depthwise_conv(x, (h, w), conv, bn, norm=norm, packed=packed, backend=self.backend)
            rows_norm = None
        weights = {name: modules[name]._parameters for name in ("q", "proj")}
        key, value = self._keys_and_values(rows, rows_norm)
        out = ops.global_attention(
            x,
            key,
            value,
            num_heads=self.num_heads,
            scale=self.scale,
            norm=None if norm is None else "layer",
            query_weight=weights["q"]["weight"],
            query_bias=weights["q"]["bias"],
            attn_bias=relative_pos,
            proj_weight=weights["proj"]["weight"],
            proj_bias=weights["proj"]["bias"],
            residual=residual,
            packed=self._packing("global_attention"),
            backend=self.backend,
            **fused.layer_norm_arguments(norm),
        )
        assert isinstance(out, Tensor)
        return out

    def _keys_and_values(self, rows: Tensor, norm: nn.LayerNorm | None) -> tuple[Tensor, Tensor | None]:
        """Of the rows behind the norm; while gradients are recorded as one linear, the values behind the keys."""
        modules: dict[str, Any] = self._modules
        k, v = modules["k"]._parameters, modules["v"]._parameters
        alike = k["weight"].shape == v["weight"].shape and (k["bias"] is None) == (v["bias"] is None)
        alike = alike and k["weight"].requires_grad == v["weight"].requires_grad  # what is frozen gets no gradient
        if alike and torch.is_grad_enabled() and self._packed is None:
            weight = torch.cat([k["weight"], v["weight"]])
            bias = None if k["bias"] is None else torch.cat([k["bias"], v["bias"]])
            return linear(rows, weight, bias, None, self.backend, norm=norm), None
        key, value = (
            linear(rows, own["weight"], own["bias"], self._packing(packing), self.backend, norm=norm)
            for own, packing in ((k, "key"), (v, "value"))
        )
        return key, value

    def _compose(self, u: Tensor, h: int, w: int, relative_pos: Tensor) -> Tensor:
        """Attention to rows that are normalised already, by calling the submodules."""
        keys = u
        if self.sr_ratio > 1:
            maps: Tensor = self.sr(u.transpose(1, 2).unflatten(2, (h, w)))
            keys = maps.flatten(2).transpose(1, 2)
        out = attend(
            self.q(u),
            self.k(keys),
            self.v(keys),
            self.attn_drop,
            num_heads=self.num_heads,
            scale=self.scale,
            attn_bias=relative_pos,
            backend=self.backend,
        )
        projected: Tensor = self.proj(out)
        return projected

    def _packing(self, name: str) -> PackedWeights | None:
        return None if self._packed is None else self._packed[name]
