"""The MLP of PVTv2 and SegFormer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastvit_kernels.nn import checks, fused
from fastvit_kernels.nn.fused_depthwise import DepthwiseMLPParts, depthwise_mlp, depthwise_mlp_obstacles
from fastvit_kernels.nn.initialisation import initialise
from fastvit_kernels.ops.packing import PackedWeights


class DWConv(nn.Module):
    """A depthwise 3 x 3 convolution of `[B, h*w, C]` tokens of an `h x w` map."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        maps: Tensor = self.dwconv(x.transpose(1, 2).unflatten(2, (h, w)))
        return maps.flatten(2).transpose(1, 2)


class MixFFN(nn.Module):
    """Linear, depthwise 3 x 3, activation, linear: PVTv2's `Mlp` and SegFormer's Mix-FFN, fused.

    Constructor arguments, parameter names and initialisation are those of the official module, so weights load both
    ways with `strict=True`. What the fused operator cannot stand in for (`fusion_obstacles` lists it) runs by calling
    the submodules.

    Equivalent plain PyTorch, the ReLU with `linear` only::

        h = relu(fc1(norm(x)))
        out = residual + fc2(act(dwconv(h)))

    Args:
        in_features: channels of the input.
        hidden_features: channels of the hidden map; `in_features` if None.
        out_features: channels of the output; `in_features` if None.
        act_layer: makes the activation behind the depthwise convolution.
        drop: dropout of the activation's result and of the output.
        linear: put a ReLU in front of the depthwise convolution, as PVTv2 with linear attention does.

    Attributes:
        backend: runs this module's operator on one backend; None for the usual choice.

    Source: Wang et al., "PVT v2: Improved Baselines with Pyramid Vision Transformer", section 3.3; Xie et al.,
    "SegFormer: Simple and Efficient Design for Semantic Segmentation with Transformers", section 3.1.
    """

    backend: str | None = None

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
        linear: bool = False,
    ) -> None:
        super().__init__()
        hidden, out = hidden_features or in_features, out_features or in_features
        self.fc1 = nn.Linear(in_features, hidden)
        self.dwconv = DWConv(hidden)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden, out)
        self.drop = nn.Dropout(drop)
        self.relu = nn.ReLU() if linear else None
        self.apply(initialise)
        self._packed: PackedWeights | None = None

    def forward(
        self, x: Tensor, h: int, w: int, *, norm: nn.LayerNorm | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """`residual + mlp(norm(x))`; without the optional arguments the official module's forward.

        Args:
            x: `[B, h*w, in_features]` tokens of an `h x w` map, row-major.
            h, w: height and width of the map.
            norm: LayerNorm to apply to x first, fused where possible.
            residual: `[B, h*w, out_features]`, added to the result; dropout is applied before.

        Returns:
            `[B, h*w, out_features]`.

        Raises:
            TypeError, ValueError: naming the argument, what came and what was expected.
        """
        h, w = checks.check_tokens_of_map(x, h, w, checks.input_channels(self._modules["fc1"]))
        parts = self._parts(norm)
        if parts is not None and not depthwise_mlp_obstacles(parts):
            out: Tensor = depthwise_mlp(x, (h, w), parts, residual=residual, packed=self._packed, backend=self.backend)
            return out
        hidden = self.fc1(x if norm is None else norm(x))
        hidden = self.dwconv(hidden if self.relu is None else self.relu(hidden), h, w)
        out = self.drop(self.fc2(self.drop(self.act(hidden))))
        return checks.add_residual(residual, out)

    def fusion_obstacles(self, norm: nn.LayerNorm | None = None) -> list[str]:
        """Every reason why `forward`, with this `norm`, would call submodules now instead of the fused operator."""
        parts = self._parts(norm)
        return ["its parts are not those it was made with"] if parts is None else depthwise_mlp_obstacles(parts)

    def prepare_inference(self, enabled: bool) -> None:
        """Keep the weights in the layout of the CPU kernels between calls (`enabled`), or stop doing so."""
        self._packed = PackedWeights() if enabled else None

    def _parts(self, norm: nn.LayerNorm | None) -> DepthwiseMLPParts | None:
        modules: dict[str, Any] = self._modules
        if type(modules["dwconv"]) is not DWConv or fused.has_hooks(modules["dwconv"]):
            return None
        return DepthwiseMLPParts(
            modules["fc1"],
            modules["dwconv"].dwconv,
            modules["act"],
            modules["fc2"],
            hidden_act=modules.get("relu"),
            norm=norm,
            dropouts=(modules["drop"],),
        )
