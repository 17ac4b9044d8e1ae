"""HAT-Net's MLP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastvit_kernels.nn import checks, fused
from fastvit_kernels.nn.fused_depthwise import DepthwiseMLPParts, depthwise_mlp, depthwise_mlp_obstacles
from fastvit_kernels.ops.arguments import check_flag
from fastvit_kernels.ops.normalization import group_statistics
from fastvit_kernels.ops.packing import PackedWeights

EPS = 1e-6


class HatMLP(nn.Module):
    """GroupNorm, 1 x 1, activation, depthwise, activation, 1 x 1, GroupNorm: HAT-Net's `InvertedResidual`, fused.

    Constructor arguments, parameter names and initialisation are those of the official module, so weights load both
    ways with `strict=True`. What the fused operator cannot stand in for (`fusion_obstacles` lists it) runs by calling
    the submodules.

    Equivalent plain PyTorch, all convolutions without bias, both norms of one group with epsilon 1e-6::

        h = act(conv1x1(group_norm(x)))
        out = group_norm(conv1x1(act(depthwise(h))))

    Args:
        in_dim: channels of the input.
        hidden_dim: channels of the hidden map; `in_dim` if None.
        out_dim: channels of the output; `in_dim` if None.
        kernel_size: of the depthwise convolution, odd.
        drop: rate of the channel dropout (`nn.Dropout2d`) behind the second norm.
        act_layer: makes the activations.

    Attributes:
        backend: runs this module's operator on one backend; None for the usual choice.

    Source: Liu et al., "Vision Transformers with Hierarchical Attention", section 3.3.
    """

    backend: str | None = None

    def __init__(
        self,
        in_dim: int,
        hidden_dim: int | None = None,
        out_dim: int | None = None,
        kernel_size: int = 3,
        drop: float = 0.0,
        act_layer: Callable[[], nn.Module] = nn.SiLU,
    ) -> None:
        super().__init__()
        hidden, out = hidden_dim or in_dim, out_dim or in_dim
        kernel_size = checks.as_integer("kernel_size", kernel_size)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd number, got {kernel_size}")
        padding = kernel_size // 2
        self.conv1 = nn.Sequential(
            nn.GroupNorm(1, in_dim, eps=EPS), nn.Conv2d(in_dim, hidden, 1, bias=False), act_layer()
        )
        self.conv2 = nn.Sequential(
            nn.Conv2d(hidden, hidden, kernel_size, padding=padding, groups=hidden, bias=False), act_layer()
        )
        self.conv3 = nn.Sequential(nn.Conv2d(hidden, out, 1, bias=False), nn.GroupNorm(1, out, eps=EPS))
        self.drop = nn.Dropout2d(drop)
        self._packed: PackedWeights | None = None

    def forward(
        self,
        x: Tensor,
        *,
        residual: Tensor | None = None,
        statistics: Tensor | None = None,
        return_statistics: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`residual + mlp(x)`; with x alone the official module's forward.

        Args:
            x: `[B, in_dim, H, W]`, best in channels-last memory.
            residual: `[B, out_dim, H, W]`, added to the result; dropout is applied before.
            statistics: mean and biased variance of each sample of x, `[B, 2]`, where they are known already.
            return_statistics: also return those of the result.

        Returns:
            `[B, out_dim, H, W]` in channels-last memory; with `return_statistics` also `[B, 2]`.

        Raises:
            TypeError, ValueError: naming the argument, what came and what was expected.
        """
        parts = self._parts()
        checks.check_map("x", x, checks.input_channels(self.conv1[1]))
        check_flag("return_statistics", return_statistics)
        last: Any = self.conv3[0]
        checks.check_residual_shape(residual, (x.shape[0], last.out_channels, *x.shape[2:]))
        drops_nothing = fused.drops_nothing(self.drop)
        if parts is None or depthwise_mlp_obstacles(parts):
            out = self.conv3(self.conv2(self.conv1(x)))
        else:
            grid = (x.shape[2], x.shape[3])
            within = residual if drops_nothing else None
            rows = _rows(x)
            found = depthwise_mlp(
                rows,
                grid,
                parts,
                residual=None if within is None else rows if within is x else _rows(within),
                statistics=statistics,
                return_statistics=return_statistics and drops_nothing,
                packed=self._packed,
                backend=self.backend,
            )
            if isinstance(found, tuple):
                return _map(found[0], grid), found[1]
            out = _map(found, grid)
            if drops_nothing:
                return out
        out = self.drop(out)
        out = out if residual is None else residual + out
        return (out, group_statistics(_rows(out))) if return_statistics else out

    def fusion_obstacles(self) -> list[str]:
        """Every reason why `forward` would call submodules now instead of the fused operator."""
        parts = self._parts()
        return ["its parts are not those it was made with"] if parts is None else depthwise_mlp_obstacles(parts)

    def prepare_inference(self, enabled: bool) -> None:
        """Keep the weights in the layout of the CPU kernels between calls (`enabled`), or stop doing so."""
        self._packed = PackedWeights() if enabled else None

    @torch.no_grad()
    def pack_weights(self) -> None:
        """If the module is prepared for inference, pack its weights now, not at the first call."""
        if not self.fusion_obstacles():
            weight = self.conv1[1].weight
            assert isinstance(weight, Tensor)
            self.forward(weight.new_zeros(1, weight.shape[1], 1, 1))

    def _modules_in_order(self) -> list[Any]:
        return [*self.conv1, *self.conv2, *self.conv3]

    def _parts(self) -> DepthwiseMLPParts | None:
        lengths = [len(part._modules) for part in (self.conv1, self.conv2, self.conv3)]
        if lengths != [3, 2, 2] or any(map(fused.has_hooks, (self.conv1, self.conv2, self.conv3))):
            return None
        norm, fc1, hidden_act, dw, act, fc2, out_norm = self._modules_in_order()
        return DepthwiseMLPParts(fc1, dw, act, fc2, hidden_act=hidden_act, norm=norm, out_norm=out_norm)


def _rows(maps: Tensor) -> Tensor:
    return maps.permute(0, 2, 3, 1).flatten(1, 2)


def _map(rows: Tensor, grid: tuple[int, int]) -> Tensor:
    return rows.transpose(1, 2).unflatten(2, grid)
