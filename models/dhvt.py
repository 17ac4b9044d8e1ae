"""DHVT: vision transformers for small data sets, with tokens for the attention's heads and depthwise MLPs.

Source: Lu et al., "Bridging the Gap Between Vision Transformers and Convolutional Neural Networks on Small Datasets".
Names, structure and initialisation follow the official code, so its weights load with `strict=True`. Where that has
`SyncBatchNorm` there are `BatchNorm2d`s of the same names here; `SyncBatchNorm.convert_sync_batchnorm` replaces them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastvit_kernels.models.features import FeatureInfo, check_image
from fastvit_kernels.models.registry import register
from fastvit_kernels.nn import DAFF, HIMHSA, DenseConv2d, DenseLinear, DropPath, LayerNorm
from fastvit_kernels.nn.dense_conv import convolve
from fastvit_kernels.nn.fused import drops_nothing, has_hooks
from fastvit_kernels.nn.repetition import Repeating
from fastvit_kernels.nn.taping import Taped

EPS = 1e-6
# Channels of the patch embedding's convolutions, each of stride 2, over those of the model.
PATCHES = {2: (1,), 4: (2, 1), 16: (8, 4, 2, 1)}


class Affine(nn.Module):
    """Scale and shift of each channel of a map."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, dim, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.beta, x, self.alpha)

    def vectors(self) -> tuple[Tensor, Tensor]:
        """Scale and shift, `[dim]` both."""
        return self.alpha.flatten(), self.beta.flatten()


class PatchEmbed(nn.Module):
    """Convolutions of stride 2 with batch norms, activations between them, between two affines."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        steps: list[nn.Module] = []
        channels = in_chans
        for divisor in PATCHES[patch_size]:
            if steps:
                steps.append(nn.GELU())
            width = embed_dim // divisor
            steps.append(_conv3x3(channels, width))
            channels = width
        # A convolution that is alone has its activation behind it, the last of several has none.
        self.proj = nn.Sequential(*(steps if len(steps) > 1 else [*steps, nn.GELU()]))
        self.pre_affine = Affine(in_chans)
        self.post_affine = Affine(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to a map `[B, embed_dim, H', W']`."""
        if has_hooks(self.proj) or any(map(_is_changed, (self.pre_affine, self.post_affine))):
            out: Tensor = self.post_affine(self.proj(self.pre_affine(x)))
            return out
        return self._project(x)

    @torch.no_grad()
    def pack_weights(self) -> None:
        """Where the convolutions are prepared for inference, pack their weights now, not at the first call."""
        self.forward(self.pre_affine.alpha.new_zeros(1, *self.pre_affine.alpha.shape[1:2], 1, 1))

    def _project(self, x: Tensor) -> Tensor:
        """All of it, with activations and affines handed to the convolutions beside them where nobody can tell."""
        steps = list(self.proj)
        before: Affine | None = self.pre_affine
        behind: Affine | None = self.post_affine
        while steps:
            step = steps.pop(0)
            if isinstance(step, _ConvNorm) and not has_hooks(step):
                act = steps.pop(0) if steps and isinstance(steps[0], nn.GELU) else None
                last = None if steps else behind
                x = step(x, act, before, last)
                behind = behind if last is None else None
            else:
                x = step(x if before is None else before(x))
            before = None
        return x if behind is None else behind(x)


class Block(Taped):
    """Attention and MLP, each behind a LayerNorm and beside a residual, on `[B, 1 + H*W, C]` tokens."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden_dim: int,
        qkv_bias: bool,
        qk_scale: float | None,
        drop: float,
        attn_drop: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, EPS)
        self.attn = HIMHSA(dim, num_heads, qkv_bias, qk_scale, attn_drop, drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = LayerNorm(dim, EPS)
        self.mlp = DAFF(dim, hidden_dim, dim)

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """The tokens behind both halves; `grid` is needed for a map that is not square."""
        return self.taped(self._forward, x, grid)

    def _forward(self, x: Tensor, grid: tuple[int, int] | None) -> Tensor:
        x = self._residual(x, self.attn, self.norm1)
        return self._residual(x, self.mlp, self.norm2, grid=grid)

    @torch.no_grad()
    def pack_weights(self) -> None:
        """Where attention and MLP are prepared for inference, pack their weights now, not at the first call."""
        self.forward(self.norm1.weight.new_zeros(1, 2, self.norm1.normalized_shape[0]), (1, 1))

    def _residual(self, x: Tensor, branch: nn.Module, norm: nn.LayerNorm, **arguments: Any) -> Tensor:
        """`x + drop_path(branch(norm(x)))`, the norm and the addition inside the branch where nobody can tell."""
        if has_hooks(branch) or not isinstance(branch, (HIMHSA, DAFF)):
            return x + self.drop_path(branch(norm(x), **arguments))
        if drops_nothing(self.drop_path):
            return branch(x, norm=norm, residual=x, **arguments)
        return x + self.drop_path(branch(x, norm=norm, **arguments))


class DHVT(Repeating):
    """DHVT for classification, or for its feature map.

    Image `[B, in_chans, H, W]`, best in `torch.channels_last`, of any size: there is no table of positions. With the
    classifier the result is `[B, num_classes]`, with `num_classes=0` the normalised class token `[B, C]`. With
    `features_only=True` it is a list of one channels-last map `[B, C, H, W]`, that of the last block, not normalised.

    fp64, fp32, bf16 and fp16 all work, the LayerNorms in at least fp32.

    Args:
        patch_size: 2, 4 or 16: how many times smaller the map is than the image.
        embed_dim, depth, num_heads: channels, blocks and heads.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the image.
        features_only: return the feature map; the model then has no final norm and no classifier.
        mlp_ratio: hidden channels of the MLP over its channels.
        qkv_bias, qk_scale: of the attention; see `fastvit_kernels.nn.HIMHSA`.
        drop_rate: dropout behind the attention's projection.
        attn_drop_rate: dropout of attention probabilities.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0 through all blocks.
        backend: runs the fused operators on one backend; None for the usual choice.

    Attributes:
        feature_info: channels and reduction of the map.
        left_out: beginnings of the names of the full model's parameters that this one does not have.

    Raises:
        ValueError: a `patch_size` that is none of these, or heads that do not divide the channels; from `forward`, an
            image of the wrong rank or channels.
    """

    def __init__(
        self,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        features_only: bool = False,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if patch_size not in PATCHES:
            raise ValueError(f"patch_size: expected one of {', '.join(map(str, PATCHES))}, got {patch_size!r}")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, embed_dim), std=0.02))
        drop_paths = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                int(embed_dim * mlp_ratio),
                qkv_bias,
                qk_scale,
                drop_rate,
                attn_drop_rate,
                drop_path,
            )
            for drop_path in drop_paths
        )
        self.norm = None if features_only else LayerNorm(embed_dim, EPS)
        self.head: nn.Module | None = None
        if not features_only:
            self.head = DenseLinear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self.left_out = ("norm.", "head.") if features_only else ("head.",) if num_classes == 0 else ()
        self.feature_info = [FeatureInfo(embed_dim, patch_size)]
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            if isinstance(module, (DAFF, HIMHSA, DenseConv2d, DenseLinear)):
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
        tokens, _ = self._tokens(x)
        return self.norm(tokens[:, 0])

    def forward_maps(self, x: Tensor) -> list[Tensor]:
        """The last block's map `[B, C, H, W]` in channels-last memory, not normalised, without the class token."""
        tokens, grid = self._tokens(x)
        # The map lies between class tokens; a copy makes it dense.
        maps = tokens[:, 1:].transpose(1, 2).unflatten(2, grid)
        return [maps.contiguous(memory_format=torch.channels_last)]

    def _tokens(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        check_image(x, self.in_chans, 1)
        # Only an image in NCHW memory is copied here; all maps behind it are channels-last already.
        maps = self.patch_embed(x.contiguous(memory_format=torch.channels_last))
        grid = maps.shape[2], maps.shape[3]
        rows = maps.flatten(2).transpose(1, 2)
        rows = torch.cat([self.cls_token.to(rows.dtype).expand(x.shape[0], -1, -1), rows], dim=1)
        for block in self.blocks:
            rows = block(rows, grid)
        return rows, grid

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that training leaves out of weight decay, besides biases and norms."""
        return {"cls_token"}


class _ConvNorm(nn.Sequential):
    """A convolution and its batch norm, on a map that stays in channels-last memory; more may stand around them."""

    def forward(
        self,
        input: Tensor,
        act: nn.Module | None = None,
        before: Affine | None = None,
        behind: Affine | None = None,
    ) -> Tensor:
        modules: Any = self
        conv, bn = modules
        return convolve(
            conv,
            input,
            act=act,
            bn=bn,
            before=None if before is None else before.vectors(),
            behind=None if behind is None else behind.vectors(),
        )


def _is_changed(affine: nn.Module) -> bool:
    """Whether calling it might do something else than scaling and shifting."""
    return type(affine) is not Affine or has_hooks(affine)


def _conv3x3(in_dim: int, out_dim: int) -> nn.Module:
    conv = DenseConv2d(in_dim, out_dim, 3, stride=2, padding=1, bias=False)
    return _ConvNorm(conv, nn.BatchNorm2d(out_dim))


TINY, SMALL = 192, 384


def _build(patch_size: int, embed_dim: int, num_heads: int, overrides: dict[str, Any]) -> DHVT:
    return DHVT(**{"patch_size": patch_size, "embed_dim": embed_dim, "num_heads": num_heads, **overrides})


@register
def dhvt_tiny_cifar_patch4(**overrides: Any) -> DHVT:
    """DHVT-T for CIFAR: 6.0 M parameters with 100 classes, 0.4 G multiply-adds at 32 x 32."""
    return _build(4, TINY, 4, overrides)


@register
def dhvt_small_cifar_patch4(**overrides: Any) -> DHVT:
    """DHVT-S for CIFAR: 23.4 M parameters with 100 classes, 1.5 G multiply-adds at 32 x 32."""
    return _build(4, SMALL, 8, overrides)


@register
def dhvt_tiny_cifar_patch2(**overrides: Any) -> DHVT:
    """DHVT-T for CIFAR, patches half the size: 5.8 M parameters with 100 classes, 1.7 G multiply-adds at 32 x 32."""
    return _build(2, TINY, 4, overrides)


@register
def dhvt_small_cifar_patch2(**overrides: Any) -> DHVT:
    """DHVT-S for CIFAR, patches half the size: 22.8 M parameters with 100 classes, 6.2 G multiply-adds at 32 x 32."""
    return _build(2, SMALL, 8, overrides)


@register
def dhvt_tiny_domain_patch16(**overrides: Any) -> DHVT:
    """DHVT-T for DomainNet: 6.1 M parameters with 345 classes, 1.4 G multiply-adds at 224 x 224."""
    return _build(16, TINY, 4, overrides)


@register
def dhvt_small_domain_patch16(**overrides: Any) -> DHVT:
    """DHVT-S for DomainNet: 23.8 M parameters with 345 classes, 5.0 G multiply-adds at 224 x 224."""
    return _build(16, SMALL, 6, overrides)


@register
def dhvt_tiny_imagenet_patch16(**overrides: Any) -> DHVT:
    """DHVT-T for ImageNet, with three heads: 6.3 M parameters, 1.4 G multiply-adds at 224 x 224."""
    return _build(16, TINY, 3, overrides)


@register
def dhvt_small_imagenet_patch16(**overrides: Any) -> DHVT:
    """DHVT-S for ImageNet: 24.0 M parameters, 5.0 G multiply-adds at 224 x 224."""
    return _build(16, SMALL, 6, overrides)
