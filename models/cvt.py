"""CvT: vision transformers whose tokens come from convolutions.

Source: Wu et al., "CvT: Introducing Convolutions to Vision Transformers". Names, structure and initialisation follow
the official code, so its weights load with `strict=True`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastvit_kernels.models.checkpoints import Conversion
from fastvit_kernels.models.cvt_keys import from_transformers, is_transformers
from fastvit_kernels.models.features import FeatureInfo, check_image
from fastvit_kernels.models.registry import register
from fastvit_kernels.nn import ConvProjectionAttention, DropPath, LayerNorm, PatchEmbedding, PointwiseMLP, QuickGELU
from fastvit_kernels.nn.fused import drops_nothing, has_hooks
from fastvit_kernels.nn.repetition import Repeating
from fastvit_kernels.nn.taping import Taped

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"quick_gelu": QuickGELU, "gelu": nn.GELU}


class Block(Taped):
    """Attention and MLP, each behind a LayerNorm and beside a residual, on `[B, N, C]` tokens of an `h x w` map."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        drop: float,
        attn_drop: float,
        drop_path: float,
        act_layer: Callable[[], nn.Module],
        **attention: Any,
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = ConvProjectionAttention(dim, dim, num_heads, qkv_bias, attn_drop, drop, **attention)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = LayerNorm(dim)
        self.mlp = PointwiseMLP(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=drop)

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        return self.taped(self._forward, x, h, w)

    def _forward(self, x: Tensor, h: int, w: int) -> Tensor:
        x = self._residual(x, self.attn, self.norm1, h, w)
        return self._residual(x, self.mlp, self.norm2)

    @torch.no_grad()
    def pack_weights(self) -> None:
        """Where attention and MLP are prepared for inference, pack their weights now, not at the first call.

        Packing takes a call with the LayerNorm that belongs to it; the smallest map will do.
        """
        attn, mlp, weight = self.attn, self.mlp, self.norm1.weight
        if isinstance(attn, ConvProjectionAttention) and not attn.fusion_obstacles(self.norm1):
            side = max(conv.kernel_size[0] for conv in attn.modules() if isinstance(conv, nn.Conv2d))
            rows = int(attn.with_cls_token) + side * side
            if drops_nothing(attn.proj_drop):
                attn.forward(weight.new_zeros(1, rows, len(weight)), side, side, norm=self.norm1)
        if isinstance(mlp, PointwiseMLP) and not mlp.fusion_obstacles(self.norm2):
            mlp.forward(weight.new_zeros(1, len(weight)), norm=self.norm2)

    def _residual(self, x: Tensor, branch: nn.Module, norm: nn.LayerNorm, *size: int) -> Tensor:
        """`x + drop_path(branch(norm(x)))`, the norm and the addition inside the branch where nobody can tell."""
        if has_hooks(branch) or not isinstance(branch, (ConvProjectionAttention, PointwiseMLP)):
            return x + self.drop_path(branch(norm(x), *size))
        if drops_nothing(self.drop_path):
            return branch(x, *size, norm=norm, residual=x)
        return x + self.drop_path(branch(x, *size, norm=norm))


class VisionTransformer(nn.Module):
    """One stage: patch embedding, class token (if any), blocks."""

    def __init__(
        self,
        patch_size: int,
        patch_stride: int,
        patch_padding: int,
        in_chans: int,
        embed_dim: int,
        depth: int,
        drop_rate: float,
        drop_path_rate: float,
        with_cls_token: bool,
        **block: Any,
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbedding(patch_size, in_chans, embed_dim, patch_stride, patch_padding)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if with_cls_token else None
        self.pos_drop = nn.Dropout(drop_rate)
        drop_paths = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(
            Block(embed_dim, drop=drop_rate, drop_path=drop_path, with_cls_token=with_cls_token, **block)
            for drop_path in drop_paths
        )
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The map `[B, C, H, W]`, a view of the tokens, and the class token `[B, 1, C]` (None without one)."""
        maps = self.patch_embed(x)
        h, w = maps.shape[2:]
        x = maps.permute(0, 2, 3, 1).flatten(1, 2)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.pos_drop(x)
        for block in self.blocks:
            x = block(x, h, w)
        cls = None
        if self.cls_token is not None:
            cls, x = x.split([1, h * w], dim=1)
        return x.transpose(1, 2).unflatten(2, (h, w)), cls


class ConvolutionalVisionTransformer(Repeating):
    """CvT for classification, or for feature maps.

    Image `[B, in_chans, H, W]`, best in `torch.channels_last`, of any size from `min_size` on. With the classifier the
    result is `[B, num_classes]`, also for one image (the official model squeezes that to `[num_classes]`; a batch axis
    that comes and goes is a trap, so this is not imitated). With `num_classes=0` it is the normalised class token
    `[B, C]`. With `features_only=True` it is a list of channels-last maps `[B, C, H, W]`, one per stage, not
    normalised.

    fp64, fp32, bf16 and fp16 all work, the LayerNorms in at least fp32.

    Args:
        depths, embed_dims, num_heads: blocks, channels and heads of each stage.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the image.
        features_only: return feature maps; the model then has no final norm and no classifier.
        mlp_ratio: hidden channels of the MLP over its channels.
        qkv_bias: whether the linears of q, k and v have a bias.
        patch_sizes, patch_strides, patch_paddings: convolution in front of each stage.
        method, kernel_size, stride_q, stride_kv, padding_q, padding_kv: of the attention; see
            `fastvit_kernels.nn.ConvProjectionAttention`.
        drop_rate: dropout of tokens, attention outputs and MLPs.
        attn_drop_rate: dropout of attention probabilities.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0 inside the last stage, the stages
            before have none.
        activation: `"quick_gelu"` as the official model, or `"gelu"` (exact), which transformers runs instead.
        backend: runs the fused operators on one backend; None for the usual choice.

    Attributes:
        feature_info: channels and reduction of each stage's map.
        min_size: the smallest height and width of an image.
        left_out: beginnings of the names of the full model's parameters that this one does not have.

    Raises:
        ValueError: an unknown `activation` or `method`, heads that do not divide the channels, or arguments per stage
            of different lengths; from `forward`, an image of the wrong rank, channels or size.
    """

    def __init__(
        self,
        depths: Sequence[int] = (1, 2, 10),
        embed_dims: Sequence[int] = (64, 192, 384),
        num_heads: Sequence[int] = (1, 3, 6),
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        features_only: bool = False,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        patch_sizes: Sequence[int] = (7, 3, 3),
        patch_strides: Sequence[int] = (4, 2, 2),
        patch_paddings: Sequence[int] = (2, 1, 1),
        method: str = "dw_bn",
        kernel_size: int = 3,
        stride_q: int = 1,
        stride_kv: int = 2,
        padding_q: int = 1,
        padding_kv: int = 1,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        activation: str = "quick_gelu",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        per_stage = (embed_dims, num_heads, patch_sizes, patch_strides, patch_paddings)
        if not depths or any(len(values) != len(depths) for values in per_stage):
            raise ValueError(
                f"depths: {len(depths)} stages, but the other arguments have {[len(v) for v in per_stage]}"
            )
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.activation = activation
        self.num_stages = len(depths)
        for index, depth in enumerate(depths):
            last = index == len(depths) - 1
            stage = VisionTransformer(
                patch_sizes[index],
                patch_strides[index],
                patch_paddings[index],
                in_chans if index == 0 else embed_dims[index - 1],
                embed_dims[index],
                depth,
                drop_rate,
                drop_path_rate if last else 0.0,
                with_cls_token=last,
                num_heads=num_heads[index],
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                attn_drop=attn_drop_rate,
                act_layer=ACTIVATIONS[activation],
                method=method,
                kernel_size=kernel_size,
                stride_q=stride_q,
                stride_kv=stride_kv,
                padding_q=padding_q,
                padding_kv=padding_kv,
            )
            self.add_module(f"stage{index}", stage)
        self.norm = None if features_only else LayerNorm(embed_dims[-1])
        self.head = None if features_only else _classifier(embed_dims[-1], num_classes)
        self.left_out = ("norm.", "head.") if features_only else ("head.",) if num_classes == 0 else ()
        self.feature_info = _feature_info(embed_dims, patch_strides)
        self.min_size = _min_size(patch_sizes, patch_strides, patch_paddings, kernel_size, min(padding_q, padding_kv))
        for module in self.modules():
            if isinstance(module, (ConvProjectionAttention, PatchEmbedding, PointwiseMLP)):
                module.backend = backend

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Logits `[B, num_classes]`; pooled features or a list of feature maps if the model was built for them."""
        return self.repeat(self._forward, x)

    def _forward(self, x: Tensor) -> Tensor | list[Tensor]:
        if self.head is None:
            return self.forward_maps(x)
        return self.head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """The normalised class token `[B, C]` in front of the classifier."""
        if self.norm is None:
            raise ValueError("features_only: this model was built for feature maps, it has no final norm")
        check_image(x, self.in_chans, self.min_size)
        cls = None
        for index in range(self.num_stages):
            x, cls = getattr(self, f"stage{index}")(x)
        assert cls is not None
        return self.norm(cls[:, 0])

    def forward_maps(self, x: Tensor) -> list[Tensor]:
        """Every stage's map `[B, C, H, W]` in channels-last memory, not normalised, without the class token."""
        check_image(x, self.in_chans, self.min_size)
        maps = []
        for index in range(self.num_stages):
            x, _ = getattr(self, f"stage{index}")(x)
            maps.append(x)
        # The last map lies between class tokens; a copy makes it dense.
        maps[-1] = maps[-1].contiguous(memory_format=torch.channels_last)
        return maps

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that training leaves out of weight decay, besides biases and norms."""
        return {f"stage{self.num_stages - 1}.cls_token"}

    def convert_checkpoint(self, state_dict: dict[str, Tensor]) -> Conversion:
        """Official or transformers' names to this model's; see `fastvit_kernels.models.load_checkpoint`."""
        if not is_transformers(state_dict):
            return Conversion("official", state_dict)
        notes = []
        if self.activation != "gelu":
            notes.append(
                f"transformers runs CvT with the exact GELU, this model has activation={self.activation!r}: "
                "with activation='gelu' it returns what transformers returns"
            )
        return Conversion("transformers", from_transformers(state_dict), notes)


def _classifier(channels: int, num_classes: int) -> nn.Module:
    if num_classes == 0:
        return nn.Identity()
    head = nn.Linear(channels, num_classes)
    nn.init.trunc_normal_(head.weight, std=0.02)
    return head


def _feature_info(embed_dims: Sequence[int], strides: Sequence[int]) -> list[FeatureInfo]:
    info, reduction = [], 1
    for channels, stride in zip(embed_dims, strides, strict=True):
        reduction *= stride
        info.append(FeatureInfo(channels, reduction))
    return info


def _min_size(
    patch_sizes: Sequence[int], strides: Sequence[int], paddings: Sequence[int], kernel_size: int, padding: int
) -> int:
    """The image size from which every stage's map has room for the attention's filters."""
    attention = max(1, kernel_size - 2 * padding)
    size = attention
    for patch, stride, pad in reversed(list(zip(patch_sizes, strides, paddings, strict=True))):
        size = max(1, (size - 1) * stride + patch - 2 * pad)
        size = max(size, attention)
    return size


def _build(defaults: dict[str, Any], overrides: dict[str, Any]) -> ConvolutionalVisionTransformer:
    return ConvolutionalVisionTransformer(**{**defaults, **overrides})


@register
def cvt_13(**overrides: Any) -> ConvolutionalVisionTransformer:
    """CvT-13: 20.0 M parameters, 4.6 G multiply-adds at 224 x 224."""
    return _build({"depths": (1, 2, 10), "embed_dims": (64, 192, 384), "num_heads": (1, 3, 6)}, overrides)


@register
def cvt_21(**overrides: Any) -> ConvolutionalVisionTransformer:
    """CvT-21: 31.6 M parameters, 7.2 G multiply-adds at 224 x 224."""
    return _build({"depths": (1, 4, 16), "embed_dims": (64, 192, 384), "num_heads": (1, 3, 6)}, overrides)


@register
def cvt_w24(**overrides: Any) -> ConvolutionalVisionTransformer:
    """CvT-W24: 277.2 M parameters, 194.2 G multiply-adds at 384 x 384."""
    stages = {"depths": (2, 2, 20), "embed_dims": (192, 768, 1024), "num_heads": (3, 12, 16)}
    return _build({**stages, "drop_path_rate": 0.3}, overrides)
