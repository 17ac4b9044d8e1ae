"""From submodules to attention with spatially reduced keys and values; see `fused`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from fastvit_kernels import ops
from fastvit_kernels.nn import fused
from fastvit_kernels.nn.attention_parts import linear
from fastvit_kernels.ops.packing import PackedWeights

# Whose weights are packed: the reduction's, those of one or of two linears for keys and values, the attention's.
OPERATORS = ("patch_embedding", "keys", "values", "global_attention")


class SpatialReductionParts(NamedTuple):
    """The submodules of an attention with spatially reduced keys and values.

    Attributes:
        q, proj: linears of the queries and of the output.
        kv: one linear for keys and values, keys first, or one for each.
        attn_drop: dropout of the attention probabilities.
        sr: the convolution that reduces the map, or None; with it `sr_norm`, the LayerNorm behind.
        pool: makes the map smaller in front of `sr`, and is called; None for nothing.
        act: behind `sr_norm`, called; None for nothing.
        norm: the LayerNorm in front, if it is to be fused as well.
    """

    q: nn.Linear
    kv: tuple[nn.Linear, ...]
    proj: nn.Linear
    attn_drop: nn.Module
    sr: nn.Conv2d | None = None
    sr_norm: nn.LayerNorm | None = None
    pool: nn.Module | None = None
    act: nn.Module | None = None
    norm: nn.LayerNorm | None = None


def spatial_reduction_obstacles(parts: SpatialReductionParts) -> list[str]:
    """Why `spatial_reduction_attention` would not compute what calling these submodules computes."""
    reasons = fused.about("q", fused.linear_obstacles(parts.q))
    for layer in parts.kv:
        reasons += fused.about("the keys' and values' linear", fused.linear_obstacles(layer))
    reasons += fused.global_attention_obstacles(parts.proj, parts.attn_drop)
    if parts.sr is not None:
        assert parts.sr_norm is not None
        reasons += fused.about("the reduction:", fused.patch_embedding_obstacles(parts.sr, parts.sr_norm))
    if parts.norm is not None:
        reasons += fused.about("the layer norm", fused.layer_norm_obstacles(parts.norm))
    return reasons


def spatial_reduction_attention(
    x: Tensor,
    grid: tuple[int, int],
    parts: SpatialReductionParts,
    *,
    num_heads: int,
    scale: float,
    residual: Tensor | None = None,
    packed: Mapping[str, PackedWeights] | None = None,
    backend: str | None = None,
) -> Tensor:
    """The attention on fused operators, from submodules without obstacles.

    Args:
        x: `[B, H*W, C]`.
        grid: `(H, W)`.
        parts: the submodules.
        num_heads, scale: of the attention.
        residual: added to the result, or None.
        packed: packed weights by name, `OPERATORS`.
        backend: passed to all operators.

    Returns:
        `[B, H*W, C]`.
    """
    rows, norm = _reduce(x, grid, parts, packed, backend)
    keys, *values = (
        linear(
            rows,
            layer._parameters["weight"],
            layer._parameters["bias"],
            None if packed is None else packed[name],
            backend,
            norm=norm,
        )
        for layer, name in zip(parts.kv, ("keys", "values"), strict=False)
    )
    query, proj = parts.q._parameters, parts.proj._parameters
    out = ops.global_attention(
        x,
        keys,
        *values,
        num_heads=num_heads,
        scale=scale,
        norm=None if parts.norm is None else "layer",
        query_weight=query["weight"],
        query_bias=query["bias"],
        proj_weight=proj["weight"],
        proj_bias=proj["bias"],
        residual=residual,
        packed=None if packed is None else packed["global_attention"],
        backend=backend,
        **fused.layer_norm_arguments(parts.norm),
    )
    assert isinstance(out, Tensor)
    return out


def _reduce(
    x: Tensor,
    grid: tuple[int, int],
    parts: SpatialReductionParts,
    packed: Mapping[str, PackedWeights] | None,
    backend: str | None,
) -> tuple[Tensor, nn.LayerNorm | None]:
    """The rows that keys and values are made of, and the LayerNorm that they lack."""
    if parts.sr is None:
        return x, parts.norm
    assert parts.sr_norm is not None
    norm = parts.norm
    if parts.pool is None:
        maps = x.transpose(1, 2).unflatten(2, grid)
    else:
        # What is pooled are the normalised rows.
        rows = x if norm is None else norm(x)
        maps, norm = parts.pool(rows.transpose(1, 2).unflatten(2, grid)), None
    maps = fused.patch_embedding(maps, parts.sr, parts.sr_norm, in_norm=norm, packed=packed, backend=backend)
    rows = maps.flatten(2).transpose(1, 2)
    return rows if parts.act is None else parts.act(rows), None
