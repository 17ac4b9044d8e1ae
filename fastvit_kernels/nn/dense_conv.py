"""A dense convolution that keeps its weights packed between calls."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastvit_kernels import ops
from fastvit_kernels.nn import fused
from fastvit_kernels.ops.packing import PackedWeights


class DenseConv2d(nn.Conv2d):
    """`nn.Conv2d`; prepared for inference it runs on `ops.patch_embedding`, whose weights are packed once.

    At batch 1 the small maps behind a few strided convolutions cost PyTorch less than bringing the filters into its
    layout, which it does at every call. Only that case is fused: while training, and on filters that the operator does
    not know (`fusion_obstacles` lists why), this is the convolution it derives from.

    Args: those of `nn.Conv2d`.

    Attributes:
        backend: runs the operator on one backend; None for the usual choice.
    """

    backend: str | None = None
    _packed: PackedWeights | None = None

    def forward(self, input: Tensor) -> Tensor:
        """`[B, in_channels, H, W]`, best in channels-last memory, to `[B, out_channels, H', W']`."""
        if self._packed is None or torch.is_grad_enabled() or self.fusion_obstacles():
            return super().forward(input)
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        assert weight is not None and isinstance(self.padding[0], int)
        return ops.patch_embedding(
            input,
            weight,
            bias,
            stride=self.stride[0],
            padding=self.padding[0],
            packed=self._packed,
            backend=self.backend,
        )

    def fusion_obstacles(self) -> list[str]:
        """Every reason why `forward` would run PyTorch's convolution even when prepared for inference."""
        return fused.dense_conv_obstacles(self)

    def prepare_inference(self, enabled: bool) -> None:
        """Keep the weights in the layout of the CPU kernels between calls (`enabled`), or stop doing so."""
        self._packed = PackedWeights() if enabled else None
