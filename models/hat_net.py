"""HAT-Net: vision transformers whose attention works inside windows first, then on a pooled map.

Source: Liu et al., "Vision Transformers with Hierarchical Attention". Names, structure and initialisation follow the
official code, so its weights load with `strict=True`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastvit_kernels.models.features import FeatureInfo, check_image
from fastvit_kernels.models.registry import register
from fastvit_kernels.nn import DenseConv2d, DropPath, HatMLP, HierarchicalAttention
from fastvit_kernels.nn.fused import drops_nothing, has_hooks
from fastvit_kernels.nn.repetition import Repeating
from fastvit_kernels.nn.taping import Taped

EPS = 1e-6
STEM_CHANNELS = 16


class Block(Taped):
    """Attention and MLP on a map `[B, C, H, W]`, each with its norms inside and beside a residual."""

    def __init__(
        self,
        dim: int,
        head_dim: int,
        grid_size: int,
        ds_ratio: int,
        expansion: int,
        drop: float,
        drop_path: float,
        kernel_size: int,
        act_layer: Callable[[], nn.Module],
        pad: str,
    ) -> None:
        super().__init__()
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.attn = HierarchicalAttention(dim, head_dim, grid_size, ds_ratio, drop, pad=pad)
        self.conv = HatMLP(dim, dim * expansion, dim, kernel_size, drop, act_layer)

    def forward(
        self, x: Tensor, statistics: Tensor | None = None, return_statistics: bool = False
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """The map behind both halves.

        Args:
            x: `[B, C, H, W]`.
            statistics: mean and biased variance `[B, 2]` of each sample of x, where they are known already.
            return_statistics: also return those of the result, or None where they were not found on the way.
        """
        found: Tensor | tuple[Tensor, Tensor | None] = self.taped(self._forward, x, statistics, return_statistics)
        return found

    def _forward(
        self, x: Tensor, statistics: Tensor | None, return_statistics: bool
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        x, statistics = self._residual(x, self.attn, statistics, True)
        x, statistics = self._residual(x, self.conv, statistics, return_statistics)
        return (x, statistics) if return_statistics else x

    def _residual(
        self, x: Tensor, branch: nn.Module, statistics: Tensor | None, wanted: bool
    ) -> tuple[Tensor, Tensor | None]:
        """`x + drop_path(branch(x))`, the addition inside the branch where nobody can tell; its statistics if wanted.

        A sum that was made outside has unknown statistics.
        """
        if has_hooks(branch) or not isinstance(branch, (HierarchicalAttention, HatMLP)):
            return x + self.drop_path(branch(x)), None
        if not drops_nothing(self.drop_path):
            return x + self.drop_path(branch(x, statistics=statistics)), None
        out = branch(x, residual=x, statistics=statistics, return_statistics=wanted)
        return out if wanted else (out, None)


class Downsample(nn.Module):
    """A convolution that halves the map, and its norm."""

    def __init__(self, in_dim: int, out_dim: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.conv = DenseConv2d(in_dim, out_dim, kernel_size, stride=2, padding=1)
        self.norm = nn.GroupNorm(1, out_dim, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(x))
        return out


class HATNet(Repeating):
    """HAT-Net for classification, or for feature maps.

    Image `[B, in_chans, H, W]`, best in `torch.channels_last`, of any size. The official code takes multiples of 224
    only; at other sizes the windows and the pooled squares at the right and at the bottom hold fewer pixels
    (`pad="mask"`), and at multiples of 224 there is no difference. With the classifier the result is
    `[B, num_classes]`, with `num_classes=0` the mean over the last map's pixels `[B, C]`. With `features_only=True` it
    is a list of channels-last maps `[B, C, H, W]`, one per stage.

    fp64, fp32, bf16 and fp16 all work.

    Args:
        dims, depths: channels and blocks of each stage.
        head_dim: channels of an attention head, in all stages.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the image.
        features_only: return feature maps; the model then has no classifier.
        expansions: hidden channels of the MLP over its channels, for each stage.
        grid_sizes, ds_ratios: of each stage's attention; see `fastvit_kernels.nn.HierarchicalAttention`.
        kernel_sizes: of each stage's MLP.
        drop_rate: channel dropout behind attention and MLP.
        classifier_drop_rate: dropout in front of the classifier's linear.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0 through all blocks.
        act_layer: makes the activations of stem and MLPs.
        pad: `"mask"` for images of any size, or `"none"` to refuse what the official code refuses.
        backend: runs the fused operators on one backend; None for the usual choice.

    Attributes:
        feature_info: channels and reduction of each stage's map.
        min_size: the smallest height and width of an image.
        left_out: beginnings of the names of the full model's parameters that this one does not have.

    Raises:
        ValueError: a `head_dim` that does not divide the channels, an unknown `pad`, or arguments per stage of
            different lengths; from `forward`, an image of the wrong rank, channels or size.
    """

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 3, 8, 3),
        head_dim: int = 64,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        features_only: bool = False,
        expansions: Sequence[int] = (8, 8, 4, 4),
        grid_sizes: Sequence[int] = (8, 7, 7, 1),
        ds_ratios: Sequence[int] = (8, 4, 2, 1),
        kernel_sizes: Sequence[int] = (3, 3, 3, 3),
        drop_rate: float = 0.0,
        classifier_drop_rate: float = 0.2,
        drop_path_rate: float = 0.0,
        act_layer: Callable[[], nn.Module] = nn.SiLU,
        pad: str = "mask",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        per_stage = (depths, expansions, grid_sizes, ds_ratios, kernel_sizes)
        if not dims or any(len(values) != len(dims) for values in per_stage):
            raise ValueError(f"dims: {len(dims)} stages, but the other arguments have {[len(v) for v in per_stage]}")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_stages = len(dims)
        # Modules are created in the order of the official code: the same seed gives the same weights.
        self.patch_embed = nn.Sequential(
            nn.Conv2d(in_chans, STEM_CHANNELS, 3, stride=2, padding=1),
            nn.GroupNorm(1, STEM_CHANNELS, eps=EPS),
            act_layer(),
            DenseConv2d(STEM_CHANNELS, dims[0], 3, stride=2, padding=1),
        )
        drop_paths = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                Block(
                    dims[stage],
                    head_dim,
                    grid_sizes[stage],
                    ds_ratios[stage],
                    expansions[stage],
                    drop_rate,
                    next(drop_paths),
                    kernel_sizes[stage],
                    act_layer,
                    pad,
                )
                for _ in range(depths[stage])
            )
            for stage in range(len(dims))
        )
        for stage in range(1, len(dims)):
            self.add_module(f"ds{stage + 1}", Downsample(dims[stage - 1], dims[stage]))
        self.classifier = None if features_only else _classifier(dims[-1], num_classes, classifier_drop_rate)
        self.left_out = ("classifier.",) if features_only or num_classes == 0 else ()
        self.feature_info = [FeatureInfo(channels, 4 << stage) for stage, channels in enumerate(dims)]
        self.min_size = 1
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            if isinstance(module, (DenseConv2d, HatMLP, HierarchicalAttention)):
                module.backend = backend

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Logits `[B, num_classes]`; pooled features or a list of feature maps if the model was built for them."""
        return self.repeat(self._forward, x)

    def _forward(self, x: Tensor) -> Tensor | list[Tensor]:
        if self.classifier is None:
            return self.forward_maps(x)
        return self.classifier(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """The mean `[B, C]` over the last map's pixels, in front of the classifier."""
        return self.forward_maps(x)[-1].mean((2, 3))

    def forward_maps(self, x: Tensor) -> list[Tensor]:
        """Every stage's map `[B, C, H, W]` in channels-last memory."""
        check_image(x, self.in_chans, self.min_size)
        # Only an image in NCHW memory is copied here; all maps behind it are channels-last already.
        x = x.contiguous(memory_format=torch.channels_last)
        maps = []
        for stage, blocks in enumerate(self.blocks):
            x = self.patch_embed(x) if stage == 0 else self.get_submodule(f"ds{stage + 1}")(x)
            assert isinstance(blocks, nn.ModuleList)
            x = _run(blocks, x)
            maps.append(x)
        return maps

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that training leaves out of weight decay, besides biases and norms: none."""
        return set()


def _run(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    """One block after the other; the statistics of a block's result are found there and used in the next."""
    statistics = None
    for number, block in enumerate(blocks, start=1):
        if type(block) is not Block or has_hooks(block):
            x, statistics = block(x), None
        elif number < len(blocks):
            x, statistics = block(x, statistics, True)
        else:
            x = block(x, statistics)
    return x


def _classifier(channels: int, num_classes: int, drop_rate: float) -> nn.Module:
    if num_classes == 0:
        return nn.Identity()
    return nn.Sequential(nn.Dropout(drop_rate), nn.Linear(channels, num_classes))


def _build(defaults: dict[str, Any], overrides: dict[str, Any]) -> HATNet:
    return HATNet(**{**defaults, **overrides})


@register
def hat_net_tiny(**overrides: Any) -> HATNet:
    """HAT-Net-Tiny: 12.7 M parameters, 2.1 G multiply-adds at 224 x 224."""
    return _build({"dims": (48, 96, 240, 384), "depths": (2, 2, 6, 3), "head_dim": 48}, overrides)


@register
def hat_net_small(**overrides: Any) -> HATNet:
    """HAT-Net-Small: 25.7 M parameters, 4.5 G multiply-adds at 224 x 224."""
    return _build({"dims": (64, 128, 320, 512), "depths": (2, 3, 8, 3)}, overrides)


@register
def hat_net_medium(**overrides: Any) -> HATNet:
    """HAT-Net-Medium: 42.9 M parameters, 8.8 G multiply-adds at 224 x 224."""
    stages = {"dims": (64, 128, 320, 512), "depths": (3, 6, 18, 3)}
    return _build({**stages, "kernel_sizes": (5, 3, 5, 3)}, overrides)


@register
def hat_net_large(**overrides: Any) -> HATNet:
    """HAT-Net-Large: 63.1 M parameters, 12.1 G multiply-adds at 224 x 224."""
    return _build({"dims": (64, 128, 320, 640), "depths": (3, 8, 27, 3)}, overrides)
