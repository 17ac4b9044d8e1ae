"""HAT-Net's attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit_kernels import ops
from fastvit_kernels.nn import checks, fused
from fastvit_kernels.ops.arguments import check_flag, check_integer, compute_dtype
from fastvit_kernels.ops.normalization import group_statistics, normalize_by
from fastvit_kernels.ops.packing import PackedWeights
from fastvit_kernels.ops.pooling import average_pool

EPS = 1e-6
PADS = ("none", "mask")
OPERATORS = ("local_attention", "global_attention", "pooled_projection")
# Up to this side a map is attended to as one window; others take the operator for any number of keys.
_LARGEST_WINDOW = 16


class HierarchicalAttention(nn.Module):
    """Attention inside windows, then of every pixel to a pooled map: HAT-Net's `Attention`, fused.

    Constructor arguments, parameter names and initialisation are those of the official module, so weights load both
    ways with `strict=True`. What the fused operators cannot stand in for (`fusion_obstacles` lists it: hooks on a
    submodule, a GroupNorm of several groups, a pooling with padding, ...) runs by calling the submodules.

    Equivalent plain PyTorch, for `grid_size > 1`, with `windowed` the attention among the pixels of each window of
    `grid_size` x `grid_size` pixels, `attend` that of all pixels, both with scale `head_dim ** -0.5`::

        a = grid_norm(x + windowed(*qkv(norm(x)).chunk(3, 1)))
        k, v = kv(ds_norm(avg_pool(a))).chunk(2, 1)
        out = proj(attend(q(a), k, v) + a)

    and for `grid_size = 1`::

        out = proj(attend(*qkv(norm(x)).chunk(3, 1)))

    Args:
        dim: channels of input and output.
        head_dim: channels of a head; divides `dim`.
        grid_size: side of a window in pixels; 1 for attention among all pixels.
        ds_ratio: side and stride of the pooling that makes the keys of the second step.
        drop: rate of the channel dropout (`nn.Dropout2d`) behind the output projection.
        pad: what to do with a map whose sides are no multiples of `grid_size`: `"none"` refuses it, as the official
            module does, and pools whole squares only; `"mask"` lets the windows and the pooled squares at the right and
            at the bottom hold fewer pixels. Where all sides are multiples of both sizes there is no difference.

    Attributes:
        backend: runs this module's operators on one backend; None for the usual choice.
        proj_norm: in the official checkpoints and without any effect. Kept, so that checkpoints pass through unchanged,
            but not trainable, so that `DistributedDataParallel` need not look for it. Who makes it trainable
            (`model.requires_grad_(True)`) finds gradients of zero there, as for any parameter without effect.

    Raises:
        TypeError, ValueError: `head_dim` does not divide `dim`, a `grid_size` or a `ds_ratio` that is no positive
            integer, or an unknown `pad`.

    Source: Liu et al., "Vision Transformers with Hierarchical Attention", section 3.2. The first residual is the input
    itself, not its norm, and every norm is a GroupNorm of one group with epsilon 1e-6, as in the official code.
    """

    backend: str | None = None

    def __init__(
        self,
        dim: int,
        head_dim: int,
        grid_size: int = 1,
        ds_ratio: int = 1,
        drop: float = 0.0,
        *,
        pad: str = "none",
    ) -> None:
        super().__init__()
        head_dim = checks.as_integer("head_dim", head_dim)
        if head_dim < 1 or dim % head_dim:
            raise ValueError(f"head_dim: {head_dim} does not divide dim = {dim}")
        check_integer("grid_size", grid_size, 1)
        check_integer("ds_ratio", ds_ratio, 1)
        if pad not in PADS:
            raise ValueError(f"pad: expected one of {', '.join(PADS)}, got {pad!r}")
        self.num_heads = dim // head_dim
        self.head_dim = head_dim
        self.scale = head_dim**-0.5
        self.grid_size = grid_size
        self.ds_ratio = ds_ratio
        self.pad = pad
        # Created in the order of the official module: the same seed gives the same weights.
        self.norm = nn.GroupNorm(1, dim, eps=EPS)
        self.qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)
        self.proj_norm = nn.GroupNorm(1, dim, eps=EPS).requires_grad_(False)
        self.drop = nn.Dropout2d(drop)
        if grid_size > 1:
            self.grid_norm = nn.GroupNorm(1, dim, eps=EPS)
            pool = nn.AvgPool2d if pad == "none" else _PoolOfAnySize
            self.avg_pool = pool(ds_ratio, ds_ratio)
            self.ds_norm = nn.GroupNorm(1, dim, eps=EPS)
            self.q = nn.Conv2d(dim, dim, 1)
            self.kv = nn.Conv2d(dim, 2 * dim, 1)
        self._packed: dict[str, PackedWeights] | None = None

    def forward(
        self,
        x: Tensor,
        *,
        residual: Tensor | None = None,
        statistics: Tensor | None = None,
        return_statistics: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`residual + attention(x)`, the norm in front included; with x alone the official module's forward.

        Args:
            x: `[B, dim, H, W]`, best in channels-last memory.
            residual: `[B, dim, H, W]`, added to the result; dropout is applied before.
            statistics: mean and biased variance of each sample of x, `[B, 2]`, where they are known already.
            return_statistics: also return those of the result.

        Returns:
            `[B, dim, H, W]` in channels-last memory; with `return_statistics` also `[B, 2]`.

        Raises:
            TypeError, ValueError: naming the argument, what came and what was expected.
        """
        self._check(x)
        check_flag("return_statistics", return_statistics)
        checks.check_residual_shape(residual, (x.shape[0], self.num_heads * self.head_dim, *x.shape[2:]))
        drops_nothing = fused.drops_nothing(self.drop)
        found = None
        if self.fusion_obstacles():
            out = self._compose(x)
            within = False
        else:
            within = drops_nothing
            out, found = self._fuse(x, residual if within else None, statistics, return_statistics and within)
        if not within:
            out = self.drop(out)
            out = out if residual is None else residual + out
        out = self._with_unused(out)
        if not return_statistics:
            return out
        return out, group_statistics(_tokens(out)) if found is None else found

    def _with_unused(self, out: Tensor) -> Tensor:
        """`out`; if somebody made `proj_norm` trainable, with a part in the graph that gives it gradients of zero."""
        unused = self._modules.get("proj_norm")
        if unused is None or not torch.is_grad_enabled():
            return out
        # Of no element: whatever they hold has no effect.
        nothing = [p.flatten()[:0].sum() for p in unused.parameters() if p.requires_grad]
        return out + torch.stack(nothing).sum() if nothing else out

    def fusion_obstacles(self) -> list[str]:
        """Every reason why `forward` would call submodules now instead of the fused operators."""
        modules: dict[str, Any] = self._modules
        norms, convs = ["norm"], ["qkv", "proj"]
        if self.grid_size > 1:
            norms += ["grid_norm", "ds_norm"]
            convs += ["q", "kv"]
        reasons = [f"{name} {reason}" for name in norms for reason in fused.group_norm_obstacles(modules[name])]
        reasons += [f"{name} {reason}" for name in convs for reason in fused.pointwise_conv_obstacles(modules[name])]
        if self.grid_size > 1:
            reasons += [f"avg_pool {reason}" for reason in _pooling_obstacles(modules["avg_pool"])]
        return reasons

    def prepare_inference(self, enabled: bool) -> None:
        """Keep the weights in the layout of the CPU kernels between calls (`enabled`), or stop doing so."""
        self._packed = {name: PackedWeights() for name in OPERATORS} if enabled else None

    @torch.no_grad()
    def pack_weights(self) -> None:
        """If the module is prepared for inference, pack its weights now, not at the first call."""
        if not self.fusion_obstacles():
            # Packing takes a call; few windows will do, or a map that is one, as wide as in the published models.
            windows = -(-max(self.grid_size, self.ds_ratio) // self.grid_size)
            side = windows * self.grid_size if self.grid_size > 1 else 7
            blank = self.norm.weight.new_zeros(1, side, side, self.norm.num_channels).permute(0, 3, 1, 2)
            self._fuse(blank, None, None, False)

    def _check(self, x: Tensor) -> None:
        checks.check_map("x", x, self.num_heads * self.head_dim)
        if self.grid_size > 1 and self.pad == "none":
            height, width = x.shape[2:]
            if height % self.grid_size or width % self.grid_size:
                raise ValueError(
                    f"x: expected sides that are multiples of grid_size = {self.grid_size}, got {height} x {width}; "
                    'pad="mask" takes any'
                )
            if min(height, width) < self.ds_ratio:
                raise ValueError(
                    f"x: expected sides of at least ds_ratio = {self.ds_ratio}, got {height} x {width}; "
                    'pad="mask" takes any'
                )

    def _fuse(
        self, x: Tensor, residual: Tensor | None, statistics: Tensor | None, return_statistics: bool
    ) -> tuple[Tensor, Tensor | None]:
        grid = x.shape[2], x.shape[3]
        rows = _tokens(x)
        rest = rows if residual is x else None if residual is None else _tokens(residual)
        attend = self._fuse_levels if self.grid_size > 1 else self._fuse_one_level
        found = attend(rows, grid, rest, statistics, return_statistics)
        out, statistics = found if isinstance(found, tuple) else (found, None)
        return _map(out, grid), statistics

    def _fuse_levels(
        self,
        rows: Tensor,
        grid: tuple[int, int],
        residual: Tensor | None,
        statistics: Tensor | None,
        return_statistics: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        modules: dict[str, Any] = self._modules
        qkv_weight, qkv_bias = fused.linear_of(modules["qkv"])
        mixed, mixed_statistics = ops.local_attention(
            rows,
            grid=grid,
            window_size=self.grid_size,
            num_heads=self.num_heads,
            scale=self.scale,
            norm_statistics=statistics,
            qkv_weight=qkv_weight,
            qkv_bias=qkv_bias,
            residual=rows,
            pad=self.pad,
            return_statistics=True,
            packed=self._packing("local_attention"),
            backend=self.backend,
            **fused.group_norm_arguments(modules["norm"]),
        )
        grid_norm = fused.group_norm_arguments(modules["grid_norm"])
        query_weight, query_bias = fused.linear_of(modules["q"])
        proj_weight, proj_bias = fused.linear_of(modules["proj"])
        return ops.global_attention(
            mixed,
            self._pooled_keys(mixed, mixed_statistics, grid),
            num_heads=self.num_heads,
            scale=self.scale,
            norm_statistics=mixed_statistics,
            query_weight=query_weight,
            query_bias=query_bias,
            add_query_input=True,
            proj_weight=proj_weight,
            proj_bias=proj_bias,
            residual=residual,
            return_statistics=return_statistics,
            packed=self._packing("global_attention"),
            backend=self.backend,
            **grid_norm,
        )

    def _pooled_keys(self, mixed: Tensor, statistics: Tensor, grid: tuple[int, int]) -> Tensor:
        """Keys and values of the second step, from the first step's rows in front of `grid_norm`."""
        modules: dict[str, Any] = self._modules
        weight, bias = fused.linear_of(modules["kv"])
        in_norm, norm = (fused.group_norm_arguments(modules[name]) for name in ("grid_norm", "ds_norm"))
        return ops.pooled_projection(
            mixed,
            weight,
            bias,
            grid=grid,
            kernel_size=modules["avg_pool"].kernel_size,
            ceil_mode=isinstance(modules["avg_pool"], _PoolOfAnySize),
            in_norm_weight=in_norm["norm_weight"],
            in_norm_bias=in_norm["norm_bias"],
            in_norm_eps=in_norm["norm_eps"],
            in_norm_statistics=statistics,
            norm_weight=norm["norm_weight"],
            norm_bias=norm["norm_bias"],
            norm_eps=norm["norm_eps"],
            packed=self._packing("pooled_projection"),
            backend=self.backend,
        )

    def _fuse_one_level(
        self,
        rows: Tensor,
        grid: tuple[int, int],
        residual: Tensor | None,
        statistics: Tensor | None,
        return_statistics: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        modules: dict[str, Any] = self._modules
        norm = fused.group_norm_arguments(modules["norm"])
        qkv_weight, qkv_bias = fused.linear_of(modules["qkv"])
        proj_weight, proj_bias = fused.linear_of(modules["proj"])
        if 0 < max(grid) <= _LARGEST_WINDOW:
            return ops.local_attention(
                rows,
                grid=grid,
                window_size=max(grid),
                # A map that is not square is cut out of the window.
                pad="none" if grid[0] == grid[1] else "mask",
                num_heads=self.num_heads,
                scale=self.scale,
                norm_statistics=statistics,
                qkv_weight=qkv_weight,
                qkv_bias=qkv_bias,
                proj_weight=proj_weight,
                proj_bias=proj_bias,
                residual=residual,
                return_statistics=return_statistics,
                packed=self._packing("local_attention"),
                backend=self.backend,
                **norm,
            )
        normalized = normalize_by(
            "group", rows, statistics, norm["norm_weight"], norm["norm_bias"], norm["norm_eps"], compute_dtype(rows)
        )
        q, k, v = _linear(normalized, qkv_weight, qkv_bias).chunk(3, dim=-1)
        return ops.global_attention(
            q,
            k,
            v,
            num_heads=self.num_heads,
            scale=self.scale,
            proj_weight=proj_weight,
            proj_bias=proj_bias,
            residual=residual,
            return_statistics=return_statistics,
            packed=self._packing("global_attention"),
            backend=self.backend,
        )

    def _compose(self, x: Tensor) -> Tensor:
        """The module's mathematics by calling its submodules; only the attentions themselves have none."""
        grid = x.shape[2], x.shape[3]
        qkv = _tokens(self.qkv(self.norm(x)))
        if self.grid_size == 1:
            q, k, v = qkv.chunk(3, dim=-1)
            return self._project(self._attend(q, k, v), grid)
        windowed = ops.local_attention(
            qkv,
            grid=grid,
            window_size=self.grid_size,
            num_heads=self.num_heads,
            scale=self.scale,
            pad=self.pad,
            backend=self.backend,
        )
        assert isinstance(windowed, Tensor)
        mixed = self.grid_norm(x + _map(windowed, grid))
        k, v = _tokens(self.kv(self.ds_norm(self.avg_pool(mixed)))).chunk(2, dim=-1)
        return self._project(self._attend(_tokens(self.q(mixed)), k, v) + _tokens(mixed), grid)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = ops.global_attention(q, k, v, num_heads=self.num_heads, scale=self.scale, backend=self.backend)
        assert isinstance(out, Tensor)
        return out

    def _project(self, rows: Tensor, grid: tuple[int, int]) -> Tensor:
        projected: Tensor = self.proj(_map(rows, grid))
        return projected

    def _packing(self, operator: str) -> PackedWeights | None:
        return None if self._packed is None else self._packed[operator]


class _PoolOfAnySize(nn.AvgPool2d):
    """Average pooling whose squares at the right and at the bottom hold the pixels that are there."""

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.kernel_size, int)
        return average_pool(x, self.kernel_size, ceil_mode=True)


def _tokens(x: Tensor) -> Tensor:
    """A map `[B, C, H, W]` as dense rows `[B, H*W, C]`: a view of channels-last memory, a copy of any other."""
    return x.permute(0, 2, 3, 1).flatten(1, 2).contiguous()


def _map(rows: Tensor, grid: tuple[int, int]) -> Tensor:
    """Rows as a map, the other way round: a view."""
    return rows.transpose(1, 2).unflatten(2, grid)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _pooling_obstacles(pool: nn.AvgPool2d) -> list[str]:
    """Why the pooling is none that the operator knows."""
    if type(pool) not in (nn.AvgPool2d, _PoolOfAnySize):
        return [f"is a {type(pool).__name__}, expected AvgPool2d"]
    if fused.has_hooks(pool):
        return ["has hooks"]
    if not isinstance(pool.kernel_size, int) or pool.stride != pool.kernel_size:
        return [f"has kernel_size={pool.kernel_size} and stride={pool.stride}, expected one number for both"]
    if pool.padding not in (0, (0, 0)) or pool.ceil_mode or pool.divisor_override is not None:
        return ["does not return averages of pixels alone"]
    return []
