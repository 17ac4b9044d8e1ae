"""Stochastic depth."""

from __future__ import annotations

from torch import Tensor, nn

from fastvit_kernels.nn import checks


class DropPath(nn.Module):
    """In training, zeroes a whole sample with probability `drop_prob` and scales the others up to keep the mean.

    Same semantics and constructor as timm's module of this name.

    Args:
        drop_prob: probability of dropping a sample, in [0, 1].
        scale_by_keep: divide what is kept by `1 - drop_prob`.

    Raises:
        ValueError: `drop_prob` lies outside [0, 1].

    Source: Huang et al., "Deep Networks with Stochastic Depth", section 3.
    """

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True) -> None:
        super().__init__()
        if not 0.0 <= drop_prob <= 1.0:
            raise ValueError(f"drop_prob: expected a probability in [0, 1], got {drop_prob}")
        self.drop_prob = drop_prob
        self.scale_by_keep = scale_by_keep

    def forward(self, x: Tensor) -> Tensor:
        checks.check_any_tensor("x", x)
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1.0 - self.drop_prob
        mask = x.new_empty((x.shape[0], *(1,) * (x.ndim - 1))).bernoulli_(keep)
        if self.scale_by_keep and keep > 0.0:
            mask = mask / keep
        return x * mask

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:g}"
