"""The transformer MLP."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from fastvit_kernels.nn import checks, fused
from fastvit_kernels.nn.activations import QuickGELU
from fastvit_kernels.ops.packing import PackedWeights


class PointwiseMLP(nn.Module):
    """Linear, activation, dropout, linear, dropout: CvT's `Mlp`, fused.

    Constructor arguments, parameter names and initialisation are those of the official module (and timm's), so weights
    load both ways with `strict=True`. What the fused operator cannot stand in for (`fusion_obstacles` lists it: an
    active dropout, an activation other than QuickGELU and exact GELU, hooks on a submodule, ...) runs by calling the
    submodules.

    Args:
        in_features: channels of the input.
        hidden_features: channels between the linears; `in_features` if None.
        out_features: channels of the output; `in_features` if None.
        act_layer: makes the activation module.
        drop: dropout rate behind the activation and behind the second linear.

    Attributes:
        backend: runs this module's operator on one backend; None for the usual choice.

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", equation 3; QuickGELU as in the CvT code.
    """

    backend: str | None = None

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = QuickGELU,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features or in_features)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features or in_features, out_features or in_features)
        self.drop = nn.Dropout(drop)
        self._packed: dict[str, PackedWeights] | None = None

    def forward(self, x: Tensor, *, norm: nn.LayerNorm | None = None, residual: Tensor | None = None) -> Tensor:
        """`residual + mlp(norm(x))`; without the optional arguments the official module's forward.

        Args:
            x: `[..., in_features]`.
            norm: LayerNorm to apply to x first, fused where possible.
            residual: `[..., out_features]`, added to the result.

        Returns:
            `[..., out_features]`.

        Raises:
            TypeError, ValueError: naming the argument, what came and what was expected.
        """
        checks.check_rows("x", x, checks.input_channels(self._modules["fc1"]))
        if not self.fusion_obstacles(norm):
            return fused.pointwise_mlp(
                x,
                self.fc1,
                self.act,
                self.fc2,
                norm=norm,
                residual=residual,
                packed=self._packed,
                backend=self.backend,
            )
        hidden = self.drop(self.act(self.fc1(x if norm is None else norm(x))))
        out = self.drop(self.fc2(hidden))
        return checks.add_residual(residual, out)

    def fusion_obstacles(self, norm: nn.LayerNorm | None = None) -> list[str]:
        """Every reason why `forward`, with this `norm`, would call submodules now instead of the fused operator."""
        return fused.pointwise_mlp_obstacles(self.fc1, self.act, self.fc2, self.drop, norm)

    def prepare_inference(self, enabled: bool) -> None:
        """Keep the weights in the layout of the CPU kernels between calls (`enabled`), or stop doing so."""
        self._packed = {"pointwise_mlp": PackedWeights()} if enabled else None
