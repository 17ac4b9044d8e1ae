"""MiT: the mix transformers of SegFormer, as classifiers and backbones.

Source: Xie et al., "SegFormer: Simple and Efficient Design for Semantic Segmentation with Transformers", section 3.1.
The network is PVTv2's; names, structure and initialisation follow the official code, so its weights load with
`strict=True`. The segmentation models on them are in `segformer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from fastvit_kernels.models.pvt_v2 import NormEps, PyramidVisionTransformerV2
from fastvit_kernels.models.registry import register

# Of the official models and of those in `segformer`.
VARIANTS: dict[str, dict[str, Any]] = {
    "b0": {"embed_dims": (32, 64, 160, 256), "depths": (2, 2, 2, 2)},
    "b1": {"embed_dims": (64, 128, 320, 512), "depths": (2, 2, 2, 2)},
    "b2": {"embed_dims": (64, 128, 320, 512), "depths": (3, 4, 6, 3)},
    "b3": {"embed_dims": (64, 128, 320, 512), "depths": (3, 4, 18, 3)},
    "b4": {"embed_dims": (64, 128, 320, 512), "depths": (3, 8, 27, 3)},
    "b5": {"embed_dims": (64, 128, 320, 512), "depths": (3, 6, 40, 3)},
}
DEFAULTS: dict[str, Any] = {"mlp_ratios": (4.0, 4.0, 4.0, 4.0), "drop_path_rate": 0.1}


class MixVisionTransformer(PyramidVisionTransformerV2):
    """MiT for classification, or for feature maps: PVTv2 with other sizes and other conventions.

    Arguments, attributes and errors are those of `PyramidVisionTransformerV2`. transformers has an epsilon of 1e-5 in
    every LayerNorm, whatever its configuration says.
    """

    conventions: ClassVar[Mapping[str, NormEps]] = {
        "official": NormEps(),
        "transformers": NormEps(1e-5, 1e-5, 1e-5, 1e-5),
    }


def mix_transformer(variant: str, overrides: dict[str, Any]) -> MixVisionTransformer:
    """The published size `"b0"` to `"b5"`."""
    return MixVisionTransformer(**{**DEFAULTS, **VARIANTS[variant], **overrides})


@register
def mit_b0(**overrides: Any) -> MixVisionTransformer:
    """MiT-B0: 3.6 M parameters, 0.5 G multiply-adds at 224 x 224."""
    return mix_transformer("b0", overrides)


@register
def mit_b1(**overrides: Any) -> MixVisionTransformer:
    """MiT-B1: 13.7 M parameters, 1.7 G multiply-adds at 224 x 224."""
    return mix_transformer("b1", overrides)


@register
def mit_b2(**overrides: Any) -> MixVisionTransformer:
    """MiT-B2: 24.7 M parameters, 3.3 G multiply-adds at 224 x 224."""
    return mix_transformer("b2", overrides)


@register
def mit_b3(**overrides: Any) -> MixVisionTransformer:
    """MiT-B3: 44.6 M parameters, 6.1 G multiply-adds at 224 x 224."""
    return mix_transformer("b3", overrides)


@register
def mit_b4(**overrides: Any) -> MixVisionTransformer:
    """MiT-B4: 61.4 M parameters, 8.9 G multiply-adds at 224 x 224."""
    return mix_transformer("b4", overrides)


@register
def mit_b5(**overrides: Any) -> MixVisionTransformer:
    """MiT-B5: 82.0 M parameters, 11.7 G multiply-adds at 224 x 224."""
    return mix_transformer("b5", overrides)
