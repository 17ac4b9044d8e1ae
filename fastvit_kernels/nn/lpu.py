"""CMT's local perception unit."""

from __future__ import annotations

from torch import Tensor, nn

from fastvit_kernels.nn import checks, fused
from fastvit_kernels.ops.packing import PackedWeights


class LPU(nn.Conv2d):
    """A map plus its 3 x 3 depthwise convolution: CMT's local perception unit, fused.

    Parameters are those of the convolution alone, `weight` `[dim, 1, 3, 3]` and `bias` `[dim]`: under the name `proj`
    this takes the weights of the official block. What the fused operator cannot stand in for (`fusion_obstacles` lists
    it) runs by calling the convolution.

    Equivalent plain PyTorch::

        out = x + F.conv2d(x, weight, bias, padding=1, groups=dim)

    Args:
        dim: channels.

    Attributes:
        backend: runs the operator on one backend; None for the usual choice.

    Source: Guo et al., "CMT: Convolutional Neural Networks Meet Vision Transformers", section 3.2.
    """

    backend: str | None = None
    _packed: PackedWeights | None = None

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, 3, padding=1, groups=dim)

    def forward(self, input: Tensor) -> Tensor:
        """`[B, dim, H, W]`, best in channels-last memory, to the same size, channels-last.

        Raises:
            TypeError, ValueError: naming the argument, what came and what was expected.
        """
        checks.check_map("input", input, self.in_channels)
        if self.fusion_obstacles():
            return input + super().forward(input)
        height, width = input.shape[2:]
        out = self._of_tokens(input.flatten(2).transpose(1, 2), (height, width))
        return out.transpose(1, 2).unflatten(2, (height, width))

    def forward_tokens(self, x: Tensor, h: int, w: int) -> Tensor:
        """`forward` of the `h x w` map that tokens `[B, h*w, dim]` are, row-major, to tokens: without hooks."""
        if self.fusion_obstacles():
            return self.forward(x.transpose(1, 2).unflatten(2, (h, w))).flatten(2).transpose(1, 2)
        return self._of_tokens(x, checks.check_tokens_of_map(x, h, w, self.in_channels))

    def _of_tokens(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return fused.depthwise_conv(x, grid, self, residual=x, packed=self._packed, backend=self.backend)

    def fusion_obstacles(self) -> list[str]:
        """Every reason why `forward` would call PyTorch's convolution now instead of the fused operator."""
        return fused.own_filter_obstacles(self)

    def prepare_inference(self, enabled: bool) -> None:
        """Keep the weights in the layout of the CPU kernels between calls (`enabled`), or stop doing so."""
        self._packed = PackedWeights() if enabled else None
