"""CMT's MLP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastvit_kernels.nn import checks, fused
from fastvit_kernels.nn.fused_depthwise import DepthwiseMLPParts, depthwise_mlp, depthwise_mlp_obstacles
from fastvit_kernels.ops.packing import PackedWeights


class IRFFN(nn.Module):
    """The inverted residual feed-forward network: CMT's `Mlp`, fused.

    Constructor arguments, parameter names and initialisation are those of the official module, so weights load both
    ways with `strict=True`. What the fused operator cannot stand in for (`fusion_obstacles` lists it) runs by calling
    the submodules.

    Equivalent plain PyTorch, all convolutions with bias; the first batch norm's result, not the activation's, is what
    the depthwise convolution pads with zeros and what the shortcut adds::

        t = batch_norm1(act(conv1x1(norm(x))))
        t = batch_norm2(act(depthwise3x3(t) + t))
        out = residual + batch_norm3(conv1x1(t))

    Args:
        in_features: channels of the input.
        hidden_features: channels of the hidden map; `in_features` if None.
        out_features: channels of the output; `in_features` if None.
        act_layer: makes the activations.
        drop: dropout of the first batch norm's result and of the output.

    Attributes:
        backend: runs this module's operator on one backend; None for the usual choice.

    Source: Guo et al., "CMT: Convolutional Neural Networks Meet Vision Transformers", section 3.4. Order of the batch
    norms and place of the shortcut as in the official code.
    """

    backend: str | None = None

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        hidden, out = hidden_features or in_features, out_features or in_features
        self.conv1 = nn.Sequential(nn.Conv2d(in_features, hidden, 1), act_layer(), nn.BatchNorm2d(hidden))
        self.proj = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.proj_act = act_layer()
        self.proj_bn = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Sequential(nn.Conv2d(hidden, out, 1), nn.BatchNorm2d(out))
        self.drop = nn.Dropout(drop)
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
        h, w = checks.check_tokens_of_map(x, h, w, checks.input_channels(self._modules["conv1"]))
        parts = self._parts(norm)
        if parts is not None and not depthwise_mlp_obstacles(parts):
            out: Tensor = depthwise_mlp(
                x,
                (h, w),
                parts,
                inner_residual="before_activation",
                bn_after_activation=True,
                residual=residual,
                packed=self._packed,
                backend=self.backend,
            )
            return out
        maps = (x if norm is None else norm(x)).transpose(1, 2).unflatten(2, (h, w))
        hidden = self.drop(self.conv1(maps))
        hidden = self.proj_bn(self.proj_act(self.proj(hidden) + hidden))
        out = self.drop(self.conv2(hidden).flatten(2).transpose(1, 2))
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
        first, last = modules["conv1"], modules["conv2"]
        if [len(part._modules) for part in (first, last)] != [3, 2] or fused.has_hooks(first) or fused.has_hooks(last):
            return None
        fc1, hidden_act, bn1 = first
        fc2, bn3 = last
        return DepthwiseMLPParts(
            fc1,
            modules["proj"],
            modules["proj_act"],
            fc2,
            hidden_act=hidden_act,
            bn1=bn1,
            bn2=modules["proj_bn"],
            bn3=bn3,
            norm=norm,
            dropouts=(modules["drop"],),
        )
