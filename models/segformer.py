"""SegFormer: semantic segmentation by a MiT backbone and a head of linears.

Source: Xie et al., "SegFormer: Simple and Efficient Design for Semantic Segmentation with Transformers". Names and
structure follow the official code. Where that has `SyncBatchNorm` there is a `BatchNorm2d` of the same names here;
`SyncBatchNorm.convert_sync_batchnorm` replaces it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit_kernels.models.checkpoints import Conversion
from fastvit_kernels.models.mit import mix_transformer
from fastvit_kernels.models.pvt_v2_keys import official_names
from fastvit_kernels.models.registry import register
from fastvit_kernels.nn import fused
from fastvit_kernels.nn.repetition import Repeating

_PROJECTION = re.compile(r"decode_head\.(?:linear_c|linear_projections)\.(\d+)\.proj\.(\w+)")
_IN_HEAD = {
    "decode_head.linear_fuse.": "decode_head.linear_fuse.conv.",
    "decode_head.batch_norm.": "decode_head.linear_fuse.bn.",
    "decode_head.classifier.": "decode_head.linear_pred.",
}


class Projection(nn.Module):
    """A linear over the channels of each pixel of a map."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to a channels-last `[B, out_dim, H, W]`."""
        out: Tensor = self.proj(x.permute(0, 2, 3, 1))
        return out.permute(0, 3, 1, 2)


class Fusion(nn.Module):
    """1 x 1 convolution, batch norm and ReLU."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, out_dim, 1, bias=False)
        self.bn = nn.BatchNorm2d(out_dim)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(self.conv(x))

    def finish(self, convolved: Tensor) -> Tensor:
        """What is behind the convolution."""
        return F.relu(self.bn(convolved))


class DecodeHead(nn.Module):
    """SegFormer's head: every stage's map projected to the same channels, enlarged to the largest, joined.

    Equivalent plain PyTorch::

        maps = [F.interpolate(linear_c(m), size, mode="bilinear") for linear_c, m in ...]
        out = linear_pred(dropout(relu(bn(conv(torch.cat(maps[::-1], 1))))))

    Enlarging is a mean of pixels with weights that sum to one, so the linears on both sides of it may be exchanged with
    it: each map gets the product of its two matrices at its own size, and the results are enlarged and added. The
    maps of all stages in one, the largest of the model, are never made, and most of the multiply-adds fall away.

    Args:
        in_dims: channels of the maps, largest map first.
        embed_dim: channels that they are projected to.
        num_classes: channels of the output; 0 for the `embed_dim` in front of the last convolution.
        drop_rate: channel dropout in front of the last convolution.

    Source: Xie et al., "SegFormer", section 3.2.
    """

    def __init__(self, in_dims: Sequence[int], embed_dim: int, num_classes: int, drop_rate: float = 0.1) -> None:
        super().__init__()
        self.num_stages = len(in_dims)
        for stage in range(self.num_stages, 0, -1):
            self.add_module(f"linear_c{stage}", Projection(in_dims[stage - 1], embed_dim))
        self.linear_fuse = Fusion(self.num_stages * embed_dim, embed_dim)
        self.linear_pred = nn.Conv2d(embed_dim, num_classes, 1) if num_classes > 0 else nn.Identity()
        self.dropout = nn.Dropout2d(drop_rate)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps `[B, C, H, W]`, largest first, to `[B, num_classes, H, W]` of the largest's size."""
        if self.exchange_obstacles():
            joined = self.linear_fuse(self._join(maps))
        else:
            joined = self.linear_fuse.finish(self._add(maps))
        out: Tensor = self.linear_pred(self.dropout(joined))
        return out

    def exchange_obstacles(self) -> list[str]:
        """Every reason why `forward` would enlarge the maps in front of the joining convolution, as the original."""
        fusion = self.linear_fuse
        if type(fusion) is not Fusion or fused.has_hooks(fusion):
            return ["the joining convolution is not that of this class, or has hooks"]
        reasons = fused.about("the joining convolution", fused.pointwise_conv_obstacles(fusion.conv))
        for stage in range(1, self.num_stages + 1):
            projection = self.get_submodule(f"linear_c{stage}")
            if type(projection) is not Projection or fused.has_hooks(projection):
                reasons.append(f"linear_c{stage} is not that of this class, or has hooks")
            else:
                reasons += fused.about(f"linear_c{stage}", fused.linear_obstacles(projection.proj))
        return reasons

    def _join(self, maps: Sequence[Tensor]) -> Tensor:
        """All projected maps at the size of the largest, the smallest first."""
        size = maps[0].shape[2:]
        return torch.cat(
            [_enlarge(self.get_submodule(f"linear_c{s}")(maps[s - 1]), size) for s in range(self.num_stages, 0, -1)],
            dim=1,
        )

    def _add(self, maps: Sequence[Tensor]) -> Tensor:
        """What the joining convolution makes of them."""
        size = maps[0].shape[2:]
        total = None
        joining = self.linear_fuse.conv.weight.flatten(1).chunk(self.num_stages, 1)
        for stage, matrix in zip(range(self.num_stages, 0, -1), joining, strict=True):
            x, proj = maps[stage - 1], self.get_submodule(f"linear_c{stage}.proj")
            assert isinstance(proj, nn.Linear)
            weight, bias = _product(matrix, proj)
            rows = F.linear(x.permute(0, 2, 3, 1), weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
            part = _enlarge(rows.permute(0, 3, 1, 2), size)
            total = part if total is None else total + part
        assert total is not None
        return total


def _product(matrix: Tensor, linear: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the linear with a matrix behind it, in at least fp32, autocast or not."""
    wide = torch.float64 if matrix.dtype is torch.float64 else torch.float32
    with torch.autocast(matrix.device.type, enabled=False):
        weight = matrix.to(wide) @ linear.weight.to(wide)
        bias = None if linear.bias is None else matrix.to(wide) @ linear.bias.to(wide)
    return weight, bias


def _enlarge(x: Tensor, size: Sequence[int]) -> Tensor:
    return x if x.shape[2:] == size else F.interpolate(x, list(size), mode="bilinear", align_corners=False)


class SegFormer(Repeating):
    """SegFormer for semantic segmentation, or its backbone's feature maps.

    Image `[B, in_chans, H, W]`, best in `torch.channels_last`, of any size from `min_size` on. The result is
    `[B, num_classes, ceil(H / 4), ceil(W / 4)]`, one pixel for 4 x 4 of the image's, as the original returns it in
    front of its last enlargement: `F.interpolate(y, (H, W), mode="bilinear")` makes logits of the image's size. With
    `num_classes=0` it is the map of `decoder_dim` channels in front of the classifier; with `features_only=True` a list
    of the backbone's channels-last maps, one per stage.

    fp64, fp32, bf16 and fp16 all work. A checkpoint of a classifier fills the backbone alone:
    `load_checkpoint(model.backbone, "mit_b0.pth")`.

    Args:
        variant: of the backbone: `"b0"` to `"b5"`.
        num_classes: classes of a pixel; 0 for none.
        features_only: return feature maps; the model then has no head.
        decoder_dim: channels of the head.
        decoder_drop_rate: channel dropout in front of the classifier.
        **backbone: further arguments of `MixVisionTransformer`, in place of the variant's own.

    Attributes:
        feature_info: channels and reduction of each stage's map.
        min_size: the smallest height and width of an image.
        left_out: beginnings of the names of the full model's parameters that this one does not have.

    Raises:
        ValueError: what the backbone raises.
    """

    def __init__(
        self,
        variant: str,
        *,
        num_classes: int = 150,
        features_only: bool = False,
        decoder_dim: int = 256,
        decoder_drop_rate: float = 0.1,
        **backbone: Any,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.backbone = mix_transformer(variant, {**backbone, "features_only": True})
        self.feature_info = self.backbone.feature_info
        self.min_size = self.backbone.min_size
        dims = [info.channels for info in self.feature_info]
        self.decode_head = None if features_only else DecodeHead(dims, decoder_dim, num_classes, decoder_drop_rate)
        # The official head inherits a second classifier that it never calls.
        self.left_out: tuple[str, ...] = ("decode_head.conv_seg.",)
        if features_only:
            self.left_out = ("decode_head.",)
        elif num_classes == 0:
            self.left_out += ("decode_head.linear_pred.",)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Logits of the pixels; features or a list of feature maps if the model was built for them."""
        return self.repeat(self._forward, x)

    def _forward(self, x: Tensor) -> Tensor | list[Tensor]:
        maps = self.backbone.forward_maps(x)
        return maps if self.decode_head is None else self.decode_head(maps)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that training leaves out of weight decay, besides biases and norms: none."""
        return set()

    def convert_checkpoint(self, state_dict: dict[str, Tensor]) -> Conversion:
        """Official or transformers' names to this model's; see `fastvit_kernels.models.load_checkpoint`."""
        head = {name: value for name, value in state_dict.items() if name.startswith("decode_head.")}
        source, rest = official_names({name: value for name, value in state_dict.items() if name not in head})
        if source != "official":
            head = {_head_name(name): value for name, value in head.items()}
            rest = {f"backbone.{name}": value for name, value in rest.items()}
        return Conversion(source, {**rest, **head}, self.backbone.notes_about(source))


def _head_name(name: str) -> str:
    if projection := _PROJECTION.fullmatch(name):
        return f"decode_head.linear_c{int(projection[1]) + 1}.proj.{projection[2]}"
    for old, new in _IN_HEAD.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


@register
def segformer_b0(**overrides: Any) -> SegFormer:
    """SegFormer-B0: 3.7 M parameters with 19 classes."""
    return SegFormer("b0", **overrides)


@register
def segformer_b1(**overrides: Any) -> SegFormer:
    """SegFormer-B1: 13.7 M parameters with 19 classes."""
    return SegFormer("b1", **overrides)


@register
def segformer_b2(**overrides: Any) -> SegFormer:
    """SegFormer-B2: 27.4 M parameters with 19 classes."""
    return SegFormer("b2", **{"decoder_dim": 768, **overrides})


@register
def segformer_b3(**overrides: Any) -> SegFormer:
    """SegFormer-B3: 47.2 M parameters with 19 classes."""
    return SegFormer("b3", **{"decoder_dim": 768, **overrides})


@register
def segformer_b4(**overrides: Any) -> SegFormer:
    """SegFormer-B4: 64.0 M parameters with 19 classes."""
    return SegFormer("b4", **{"decoder_dim": 768, **overrides})


@register
def segformer_b5(**overrides: Any) -> SegFormer:
    """SegFormer-B5: 84.6 M parameters with 19 classes."""
    return SegFormer("b5", **{"decoder_dim": 768, **overrides})
