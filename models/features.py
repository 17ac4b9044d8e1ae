"""What the models share about their images and feature maps."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastvit_kernels.ops.arguments import check_tensor


class FeatureInfo(NamedTuple):
    """One feature map of a model with `features_only=True`: its channels, and the image's size over the map's."""

    channels: int
    reduction: int


def check_image(x: Tensor, channels: int, min_size: int) -> None:
    """Raise unless x is a tensor `[B, channels, H, W]` of at least `min_size` pixels each way."""
    check_tensor("x", x)
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"x: expected an image batch [B, {channels}, H, W], got shape {tuple(x.shape)}")
    if min(x.shape[2:]) < min_size:
        raise ValueError(f"x: expected at least {min_size} x {min_size} pixels, got {tuple(x.shape[2:])}")
