"""The attention of PVTv2 and SegFormer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastvit_kernels.nn import checks, fused
from fastvit_kernels.nn.attention_parts import attend
from fastvit_kernels.nn.fused_spatial_reduction import (
    OPERATORS,
    SpatialReductionParts,
    spatial_reduction_attention,
    spatial_reduction_obstacles,
)
from fastvit_kernels.nn.initialisation import initialise
from fastvit_kernels.nn.layer_norm import LayerNorm
from fastvit_kernels.ops.packing import PackedWeights

POOLED = 7


class SpatialReductionAttention(nn.Module):
    """Attention to keys and values of a map that a convolution made smaller: the `Attention` of PVTv2, fused.

    Constructor arguments, parameter names and initialisation are those of the official module, so weights load both
    ways with `strict=True`. What the fused operators cannot stand in for (`fusion_obstacles` lists it) runs by calling
    the submodules.

    Equivalent plain PyTorch; rows and columns of the map that do not fill a square of `sr_ratio` are left out::

        u = norm(x)
        r = self.norm(sr(u))                                # sr_ratio = 1: r = u
        r = gelu(self.norm(sr(adaptive_avg_pool2d(u, 7))))  # linear
        k, v = kv(r).chunk(2, -1)
        out = residual + proj((q(u) @ k.mT * scale).softmax(-1) @ v)

    Args:
        dim: channels of input and output.
        num_heads: heads; divides `dim`.
        qkv_bias: whether the linears of q, k and v have a bias.
        qk_scale: factor on the scores; `(dim / num_heads) ** -0.5` if None.
        attn_drop: dropout of the attention probabilities.
        proj_drop: dropout behind the output projection.
        sr_ratio: side and stride of the convolution; 1 for none.
        linear: pool to 7 x 7 whatever the map's size instead, with a 1 x 1 convolution behind: the cost is then linear
            in the map.
        eps: epsilon of the LayerNorm behind the convolution.

    Attributes:
        backend: runs this module's operators on one backend; None for the usual choice.

    Raises:
        TypeError, ValueError: `num_heads` does not divide `dim`, or an `sr_ratio` that is no positive integer.

    Source: Wang et al., "Pyramid Vision Transformer", section 3.3; the linear variant is that of Wang et al., "PVT v2:
    Improved Baselines with Pyramid Vision Transformer", section 3.1; Xie et al., "SegFormer", section 3.1.
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
        sr_ratio: int = 1,
        linear: bool = False,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        num_heads, sr_ratio = checks.as_integer("num_heads", num_heads), checks.as_integer("sr_ratio", sr_ratio, 1)
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads: {num_heads} does not divide dim = {dim}")
        self.dim = dim
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5 if qk_scale is None else qk_scale
        self.sr_ratio = 1 if linear else sr_ratio
        self.linear = linear
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.pool = nn.AdaptiveAvgPool2d(POOLED) if linear else None
        reduces = linear or sr_ratio > 1
        self.sr = nn.Conv2d(dim, dim, self.sr_ratio, self.sr_ratio) if reduces else None
        self.norm = LayerNorm(dim, eps) if reduces else None
        self.act = nn.GELU() if linear else None
        self.apply(initialise)
        self._packed: dict[str, PackedWeights] | None = None

    def forward(
        self, x: Tensor, h: int, w: int, *, norm: nn.LayerNorm | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """`residual + attention(norm(x))`; without the optional arguments the official module's forward.

        Args:
            x: `[B, h*w, dim]` tokens of an `h x w` map, row-major.
            h, w: height and width of the map, at least `sr_ratio`.
            norm: LayerNorm to apply to x first, fused where possible.
            residual: `[B, h*w, dim]`, added to the result; dropout is applied before.

        Returns:
            `[B, h*w, dim]`.

        Raises:
            TypeError, ValueError: naming the argument, what came and what was expected.
        """
        h, w = checks.check_tokens_of_map(x, h, w, self.dim)
        if min(h, w) < self.sr_ratio:
            raise ValueError(f"h, w: expected at least sr_ratio = {self.sr_ratio}, got {h} x {w}")
        parts = self._parts(norm)
        drops_nothing = fused.drops_nothing(self.proj_drop)
        if spatial_reduction_obstacles(parts):
            out = self._compose(x if norm is None else norm(x), h, w)
        else:
            out = spatial_reduction_attention(
                x,
                (h, w),
                parts,
                num_heads=self.num_heads,
                scale=self.scale,
                residual=residual if drops_nothing else None,
                packed=self._packed,
                backend=self.backend,
            )
            if drops_nothing:
                return out
        out = self.proj_drop(out)
        return checks.add_residual(residual, out)

    def fusion_obstacles(self, norm: nn.LayerNorm | None = None) -> list[str]:
        """Every reason why `forward`, with this `norm`, would call submodules now instead of the fused operators."""
        return spatial_reduction_obstacles(self._parts(norm))

    def prepare_inference(self, enabled: bool) -> None:
        """Keep the weights in the layout of the CPU kernels between calls (`enabled`), or stop doing so."""
        self._packed = {name: PackedWeights() for name in OPERATORS} if enabled else None

    def _compose(self, u: Tensor, h: int, w: int) -> Tensor:
        """The attention of normalised rows by its submodules."""
        rows = u
        if self.sr is not None:
            maps = u.transpose(1, 2).unflatten(2, (h, w))
            maps = self.sr(maps if self.pool is None else self.pool(maps))
            assert self.norm is not None
            rows = self.norm(maps.flatten(2).transpose(1, 2))
            rows = rows if self.act is None else self.act(rows)
        k, v = self.kv(rows).chunk(2, -1)
        out = attend(self.q(u), k, v, self.attn_drop, num_heads=self.num_heads, scale=self.scale, backend=self.backend)
        projected: Tensor = self.proj(out)
        return projected

    def _parts(self, norm: nn.LayerNorm | None) -> SpatialReductionParts:
        modules: dict[str, Any] = self._modules
        return SpatialReductionParts(
            modules["q"],
            (modules["kv"],),
            modules["proj"],
            modules["attn_drop"],
            sr=modules.get("sr"),
            sr_norm=modules.get("norm"),
            pool=modules.get("pool"),
            act=modules.get("act"),
            norm=norm,
        )
