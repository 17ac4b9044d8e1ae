"""A linear of few rows that keeps its weights packed between calls."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastvit_kernels.nn import checks, fused
from fastvit_kernels.nn.attention_parts import linear
from fastvit_kernels.ops.packing import PackedWeights


class DenseLinear(nn.Linear):
    """`nn.Linear`, a classifier; prepared for inference it runs on `ops.patch_embedding`, its weights packed once.

    On a single image all threads share its weights, which PyTorch has one thread read. While training, on a GPU, and on
    input that is no matrix, this is the linear it derives from.

    Args: those of `nn.Linear`.

    Attributes:
        backend: runs the operator on one backend; None for the usual choice.
    """

    backend: str | None = None
    _packed: PackedWeights | None = None

    def forward(self, input: Tensor) -> Tensor:
        """`[B, in_features]` to `[B, out_features]`; rows of any rank where nothing is fused."""
        usable = (
            self._packed is not None and isinstance(input, Tensor) and input.ndim == 2 and input.device.type == "cpu"
        )
        if not usable or torch.is_grad_enabled() or self.fusion_obstacles():
            return super().forward(input)
        checks.check_rows("input", input, self.in_features)
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        return linear(input.unsqueeze(1), weight, bias, self._packed, self.backend).squeeze(1)

    def fusion_obstacles(self) -> list[str]:
        """Every reason why `forward` would call PyTorch's linear even when prepared for inference."""
        return fused.own_linear_obstacles(self)

    def prepare_inference(self, enabled: bool) -> None:
        """Keep the weights in the layout of the CPU kernels between calls (`enabled`), or stop doing so."""
        self._packed = PackedWeights() if enabled else None

    @torch.no_grad()
    def pack_weights(self) -> None:
        """If the module is prepared for inference, pack its weights now, not at the first call."""
        self.forward(self.weight.new_zeros(1, self.in_features))
