"""DHVT's MLP."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastvit_kernels.nn import checks, fused
from fastvit_kernels.nn.fused_depthwise import DepthwiseMLPParts, depthwise_mlp, depthwise_mlp_obstacles
from fastvit_kernels.ops import class_token
from fastvit_kernels.ops.arguments import check_grid
from fastvit_kernels.ops.packing import PackedWeights

# Whose weights are packed: those of the map, and of the class token's gate.
OPERATORS = ("depthwise_mlp", "pointwise_mlp")


class DAFF(nn.Module):
    """The dynamic aggregation feed-forward network: DHVT's `DAFF`, fused.

    Constructor arguments, parameter names and initialisation are those of the official module, so weights load both
    ways with `strict=True`; where the official code has `SyncBatchNorm` there are `BatchNorm2d`s of the same names.
    What the fused operator cannot stand in for (`fusion_obstacles` lists it) runs by calling the submodules.

    Equivalent plain PyTorch, all convolutions with bias; the gate of the class token has no sigmoid::

        u = norm(x)
        s = act(bn1(conv1(patches of u)))
        z = bn3(conv3(s + act(bn2(conv2(s)))))
        gate = excitation(act(compress(z.mean((2, 3)))))
        out = residual + torch.cat([class token of u * gate, z], 1)

    Args:
        in_dim: channels of the input.
        hid_dim: channels of the hidden map.
        out_dim: channels of the output, those of the input.
        kernel_size: of the depthwise convolution, odd.

    Attributes:
        backend: runs this module's operator on one backend; None for the usual choice.

    Raises:
        TypeError, ValueError: an `in_dim` below 4, an `out_dim` that is not `in_dim`, which the class token keeps, or
            an even `kernel_size`.

    Source: Lu et al., "Bridging the Gap Between Vision Transformers and Convolutional Neural Networks on Small
    Datasets", section 3.3.
    """

    backend: str | None = None

    def __init__(self, in_dim: int, hid_dim: int, out_dim: int, kernel_size: int = 3) -> None:
        super().__init__()
        in_dim = checks.as_integer("in_dim", in_dim)
        if in_dim < 4:
            raise ValueError(f"in_dim: expected at least 4, the class token's gate has a quarter of it, got {in_dim}")
        if out_dim != in_dim:
            raise ValueError(f"out_dim: expected in_dim = {in_dim}, which the class token keeps, got {out_dim}")
        kernel_size = checks.as_integer("kernel_size", kernel_size)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd number, got {kernel_size}")
        # Created in the order of the official module: the same seed gives the same weights.
        self.conv1 = nn.Conv2d(in_dim, hid_dim, 1)
        self.conv2 = nn.Conv2d(hid_dim, hid_dim, kernel_size, padding=kernel_size // 2, groups=hid_dim)
        self.conv3 = nn.Conv2d(hid_dim, out_dim, 1)
        self.act = nn.GELU()
        self.compress = nn.Linear(in_dim, in_dim // 4)
        self.excitation = nn.Linear(in_dim // 4, in_dim)
        self.bn1 = nn.BatchNorm2d(hid_dim)
        self.bn2 = nn.BatchNorm2d(hid_dim)
        self.bn3 = nn.BatchNorm2d(out_dim)
        self._packed: dict[str, PackedWeights] | None = None

    def forward(
        self,
        x: Tensor,
        *,
        grid: tuple[int, int] | None = None,
        norm: nn.LayerNorm | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """`residual + mlp(norm(x))`; with x alone the official module's forward.

        Args:
            x: `[B, 1 + H*W, in_dim]`: the class token and the patches, row-major.
            grid: `(H, W)`; None for a square map, the only one that the official module knows.
            norm: LayerNorm to apply to x first, fused where possible.
            residual: `[B, 1 + H*W, out_dim]`, added to the result.

        Returns:
            `[B, 1 + H*W, out_dim]`.

        Raises:
            TypeError, ValueError: naming the argument, what came and what was expected.
        """
        checks.check_tokens(x, checks.input_channels(self._modules["conv1"]))
        grid = self._grid(x) if grid is None else grid
        parts = self._parts(norm)
        if not depthwise_mlp_obstacles(parts):
            out, mean = depthwise_mlp(
                x,
                grid,
                parts,
                inner_residual="after_activation",
                residual=residual,
                num_prefix_tokens=1,
                return_mean=True,
                packed=None if self._packed is None else self._packed["depthwise_mlp"],
                backend=self.backend,
            )
            # The operator leaves the class token's row to us.
            if self._gate_in_place(out, x, mean, norm):
                return out
            cls = x[:, :1] if norm is None else norm(x[:, :1])
            return class_token.add_gated(out, cls.to(out.dtype), self._gate(mean.to(cls.dtype)).to(out.dtype))
        grid = check_grid(grid, 1, x)
        cls, patches = (x if norm is None else norm(x)).split([1, grid[0] * grid[1]], dim=1)
        hidden = self.act(self.bn1(self.conv1(patches.transpose(1, 2).unflatten(2, grid))))
        maps = self.bn3(self.conv3(hidden + self.act(self.bn2(self.conv2(hidden)))))
        gated = cls * self._gate(maps.mean((2, 3)))
        out = torch.cat([gated, maps.flatten(2).transpose(1, 2)], dim=1)
        return checks.add_residual(residual, out)

    def fusion_obstacles(self, norm: nn.LayerNorm | None = None) -> list[str]:
        """Every reason why `forward`, with this `norm`, would call submodules now instead of the fused operator."""
        return depthwise_mlp_obstacles(self._parts(norm))

    def prepare_inference(self, enabled: bool) -> None:
        """Keep the weights in the layout of the CPU kernels between calls (`enabled`), or stop doing so."""
        self._packed = {name: PackedWeights() for name in OPERATORS} if enabled else None

    def _grid(self, x: Tensor) -> tuple[int, int]:
        side = math.isqrt(max(x.shape[1] - 1, 0))
        if side == 0 or 1 + side * side != x.shape[1]:
            raise ValueError(
                f"x: expected [B, 1 + H*W, C] with H = W, or the grid beside it, got shape {tuple(x.shape)}"
            )
        return side, side

    def _gate_in_place(self, out: Tensor, x: Tensor, mean: Tensor, norm: nn.LayerNorm | None) -> bool:
        """Add the gated class token to the first row, if the kernel for that can be used now."""
        if self._packed is None or fused.pointwise_mlp_obstacles(self.compress, self.act, self.excitation):
            return False
        modules: dict[str, Any] = self._modules
        compress, excitation = modules["compress"]._parameters, modules["excitation"]._parameters
        tensors = [
            *(x, mean, *((norm._parameters["weight"], norm._parameters["bias"]) if norm is not None else (None, None))),
            *(compress["weight"], compress["bias"], excitation["weight"], excitation["bias"]),
        ]
        if not class_token.can_gate(tensors, out.dtype, self.backend):
            return False
        activation = fused.activation_name(modules["act"])
        assert activation is not None
        eps = None if norm is None else norm.eps
        class_token.gate_class_token(out, tensors, norm_eps=eps, activation=activation)
        return True

    def _gate(self, mean: Tensor) -> Tensor:
        if fused.pointwise_mlp_obstacles(self.compress, self.act, self.excitation):
            gate: Tensor = self.excitation(self.act(self.compress(mean)))
        else:
            gate = fused.pointwise_mlp(
                mean, self.compress, self.act, self.excitation, packed=self._packed, backend=self.backend
            )
        return gate.unsqueeze(1)

    def _parts(self, norm: nn.LayerNorm | None) -> DepthwiseMLPParts:
        modules: dict[str, Any] = self._modules
        return DepthwiseMLPParts(
            modules["conv1"],
            modules["conv2"],
            modules["act"],
            modules["conv3"],
            hidden_act=modules["act"],
            bn1=modules["bn1"],
            bn2=modules["bn2"],
            bn3=modules["bn3"],
            norm=norm,
        )
