"""PVTv2: pyramid vision transformers of overlapping patches, spatially reduced attention and depthwise MLPs.

Source: Wang et al., "PVT v2: Improved Baselines with Pyramid Vision Transformer". Names, structure and initialisation
follow the official code, so its weights load with `strict=True`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fastvit_kernels.models.checkpoints import Conversion
from fastvit_kernels.models.features import FeatureInfo, check_image
from fastvit_kernels.models.pvt_v2_keys import official_names
from fastvit_kernels.models.registry import register
from fastvit_kernels.nn import DenseLinear, DropPath, LayerNorm, MixFFN, PatchEmbedding, SpatialReductionAttention
from fastvit_kernels.nn.fused import drops_nothing, has_hooks
from fastvit_kernels.nn.initialisation import initialise
from fastvit_kernels.nn.repetition import Repeating
from fastvit_kernels.nn.taping import Taped


class NormEps(NamedTuple):
    """The epsilons of the LayerNorms; the defaults are those of the official code.

    Attributes:
        block: in front of attention and MLP.
        stage: behind the last block of a stage.
        patch_embed: behind the convolution in front of a stage.
        sr: behind the convolution that reduces keys and values.
    """

    block: float = 1e-6
    stage: float = 1e-6
    patch_embed: float = 1e-5
    sr: float = 1e-5


class Block(Taped):
    """Attention and MLP, each behind a LayerNorm and beside a residual, on `[B, h*w, C]` tokens of an `h x w` map."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden_dim: int,
        drop: float,
        drop_path: float,
        linear: bool,
        eps: NormEps,
        **attention: Any,
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, eps.block)
        self.attn = SpatialReductionAttention(dim, num_heads, proj_drop=drop, linear=linear, eps=eps.sr, **attention)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = LayerNorm(dim, eps.block)
        self.mlp = MixFFN(dim, hidden_dim, drop=drop, linear=linear)

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        return self.taped(self._forward, x, h, w)

    def _forward(self, x: Tensor, h: int, w: int) -> Tensor:
        x = self._residual(x, self.attn, self.norm1, h, w)
        return self._residual(x, self.mlp, self.norm2, h, w)

    @torch.no_grad()
    def pack_weights(self) -> None:
        """Where attention and MLP are prepared for inference, pack their weights now, not at the first call.

        Packing takes a call with the LayerNorm that belongs to it; the smallest map will do.
        """
        weight = self.norm1.weight
        side = self.attn.sr_ratio if isinstance(self.attn, SpatialReductionAttention) else 1
        self.forward(weight.new_zeros(1, side * side, len(weight)), side, side)

    def _residual(self, x: Tensor, branch: nn.Module, norm: nn.LayerNorm, h: int, w: int) -> Tensor:
        """`x + drop_path(branch(norm(x)))`, the norm and the addition inside the branch where nobody can tell."""
        if has_hooks(branch) or not isinstance(branch, (SpatialReductionAttention, MixFFN)):
            return x + self.drop_path(branch(norm(x), h, w))
        if drops_nothing(self.drop_path):
            return branch(x, h, w, norm=norm, residual=x)
        return x + self.drop_path(branch(x, h, w, norm=norm))


class PyramidVisionTransformerV2(Repeating):
    """PVTv2 for classification, or for feature maps.

    Image `[B, in_chans, H, W]`, best in `torch.channels_last`, of any size from `min_size` on. With the classifier the
    result is `[B, num_classes]`, with `num_classes=0` the mean over the last map's pixels `[B, C]`. With
    `features_only=True` it is a list of channels-last maps `[B, C, H, W]`, one per stage, normalised.

    fp64, fp32, bf16 and fp16 all work, the LayerNorms in at least fp32.

    The same weights are run with other epsilons by other libraries; `eps` chooses. In fp32 the difference is hardly
    larger than rounding.

    Args:
        embed_dims, depths, num_heads: channels, blocks and heads of each stage.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the image.
        features_only: return feature maps; the model then has no classifier.
        mlp_ratios: hidden channels of the MLP over its channels, for each stage.
        sr_ratios: how many times smaller the map of keys and values is each way, for each stage.
        qkv_bias, qk_scale: of the attention; see `fastvit_kernels.nn.SpatialReductionAttention`.
        linear: the variant with linear attention: keys and values of a map pooled to 7 x 7 in place of `sr_ratios`, and
            a ReLU in the MLP.
        drop_rate: dropout of attention outputs and MLPs.
        attn_drop_rate: dropout of attention probabilities.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0 through all blocks.
        eps: epsilons of the LayerNorms, or whose to use: one of `conventions`.
        backend: runs the fused operators on one backend; None for the usual choice.

    Attributes:
        conventions: epsilons by the name of who uses them.
        eps: epsilons of the LayerNorms.
        feature_info: channels and reduction of each stage's map.
        min_size: the smallest height and width of an image.
        left_out: beginnings of the names of the full model's parameters that this one does not have.

    Raises:
        ValueError: an unknown `eps`, heads that do not divide the channels, or arguments per stage of different
            lengths; from `forward`, an image of the wrong rank, channels or size.
    """

    conventions: ClassVar[Mapping[str, NormEps]] = {
        "official": NormEps(),
        "timm": NormEps(),
        "transformers": NormEps(1e-6, 1e-6, 1e-6, 1e-6),
        "tiny-transformers": NormEps(1e-6, 1e-6, 1e-6, 1e-6),
    }

    def __init__(
        self,
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (3, 4, 6, 3),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        features_only: bool = False,
        mlp_ratios: Sequence[float] = (8.0, 8.0, 4.0, 4.0),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        linear: bool = False,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        eps: str | NormEps = "official",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        per_stage = (depths, num_heads, mlp_ratios, sr_ratios)
        if not embed_dims or any(len(values) != len(embed_dims) for values in per_stage):
            raise ValueError(
                f"embed_dims: {len(embed_dims)} stages, but the other arguments have {[len(v) for v in per_stage]}"
            )
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_stages = len(embed_dims)
        self.eps = self._resolve(eps)
        drop_paths = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        channels = in_chans
        for stage, dim in enumerate(embed_dims):
            size, stride = (7, 4) if stage == 0 else (3, 2)
            embedding = PatchEmbedding(size, channels, dim, stride, size // 2, self.eps.patch_embed)
            blocks = nn.ModuleList(
                Block(
                    dim,
                    num_heads[stage],
                    int(mlp_ratios[stage] * dim),
                    drop_rate,
                    next(drop_paths),
                    linear,
                    self.eps,
                    qkv_bias=qkv_bias,
                    qk_scale=qk_scale,
                    attn_drop=attn_drop_rate,
                    sr_ratio=sr_ratios[stage],
                )
                for _ in range(depths[stage])
            )
            self.add_module(f"patch_embed{stage + 1}", embedding)
            self.add_module(f"block{stage + 1}", blocks)
            self.add_module(f"norm{stage + 1}", LayerNorm(dim, self.eps.stage))
            channels = dim
        self.head = None if features_only else _classifier(channels, num_classes)
        self.left_out = ("head.",) if features_only or num_classes == 0 else ()
        self.feature_info = [FeatureInfo(dim, 4 << stage) for stage, dim in enumerate(embed_dims)]
        self.min_size = _min_size([1] * self.num_stages if linear else sr_ratios)
        for module in self.modules():
            # The attentions and MLPs initialised themselves.
            if isinstance(module, PatchEmbedding) or module is self.head:
                module.apply(initialise)
            if isinstance(module, (DenseLinear, MixFFN, PatchEmbedding, SpatialReductionAttention)):
                module.backend = backend

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Logits `[B, num_classes]`; pooled features or a list of feature maps if the model was built for them."""
        return self.repeat(self._forward, x)

    def _forward(self, x: Tensor) -> Tensor | list[Tensor]:
        if self.head is None:
            return self.forward_maps(x)
        return self.head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """The mean `[B, C]` over the last map's pixels, in front of the classifier."""
        check_image(x, self.in_chans, self.min_size)
        norm: nn.Module | None = None
        for stage in range(1, self.num_stages + 1):
            x, norm = self._stage(stage, x, norm), self.get_submodule(f"norm{stage}")
        return _normalised(x, norm).mean((2, 3))

    def forward_maps(self, x: Tensor) -> list[Tensor]:
        """Every stage's normalised map `[B, C, H, W]` in channels-last memory."""
        check_image(x, self.in_chans, self.min_size)
        maps = []
        for stage in range(1, self.num_stages + 1):
            x = _normalised(self._stage(stage, x, None), self.get_submodule(f"norm{stage}"))
            maps.append(x)
        return maps

    def _stage(self, stage: int, x: Tensor, norm: nn.Module | None) -> Tensor:
        """The map behind a stage's blocks, not normalised yet; `norm` is that of the stage before, if still to come."""
        embed = self.get_submodule(f"patch_embed{stage}")
        if isinstance(norm, nn.LayerNorm) and isinstance(embed, PatchEmbedding) and not has_hooks(embed):
            x = embed(x, in_norm=norm) if embed.fuses(norm) else embed(_normalised(x, norm))
        else:
            x = embed(_normalised(x, norm))
        h, w = x.shape[2:]
        rows = x.permute(0, 2, 3, 1).flatten(1, 2)
        blocks = self.get_submodule(f"block{stage}")
        assert isinstance(blocks, nn.ModuleList)
        for block in blocks:
            rows = block(rows, h, w)
        return rows.transpose(1, 2).unflatten(2, (h, w))

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that training leaves out of weight decay, besides biases and norms: none."""
        return set()

    def convert_checkpoint(self, state_dict: dict[str, Tensor]) -> Conversion:
        """Official, timm's or transformers' names to this model's; see `fastvit_kernels.models.load_checkpoint`."""
        source, converted = official_names(state_dict)
        return Conversion(source, converted, self.notes_about(source))

    def notes_about(self, source: str) -> list[str]:
        """What somebody should know who loads weights of this source."""
        # tiny-transformers' names are the official ones.
        if source != "transformers" or self.eps == self.conventions[source]:
            return []
        return [
            f"transformers runs these weights with other LayerNorm epsilons, {self.conventions[source]}, than this "
            f"model, {self.eps}: with eps='transformers' it returns what transformers returns"
        ]

    def _resolve(self, eps: str | NormEps) -> NormEps:
        if isinstance(eps, NormEps):
            return eps
        if eps not in self.conventions:
            raise ValueError(f"eps: expected a NormEps or one of {', '.join(self.conventions)}, got {eps!r}")
        return self.conventions[eps]


def _normalised(x: Tensor, norm: nn.Module | None) -> Tensor:
    """A map whose pixels have gone through a LayerNorm."""
    return x if norm is None else norm(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:])


def _classifier(channels: int, num_classes: int) -> nn.Module:
    return DenseLinear(channels, num_classes) if num_classes > 0 else nn.Identity()


def _min_size(sr_ratios: Sequence[int]) -> int:
    """The image size from which every stage's map holds a square of its attention's reduction."""
    size = 1
    for ratio in reversed(sr_ratios):
        # A stage halves its map, rounding up.
        size = max(2 * size - 1, ratio)
    return 4 * (size - 1) + 1


def _build(defaults: dict[str, Any], overrides: dict[str, Any]) -> PyramidVisionTransformerV2:
    return PyramidVisionTransformerV2(**{**defaults, **overrides})


@register
def pvt_v2_b0(**overrides: Any) -> PyramidVisionTransformerV2:
    """PVTv2-B0: 3.7 M parameters, 0.6 G multiply-adds at 224 x 224."""
    return _build({"embed_dims": (32, 64, 160, 256), "depths": (2, 2, 2, 2)}, overrides)


@register
def pvt_v2_b1(**overrides: Any) -> PyramidVisionTransformerV2:
    """PVTv2-B1: 14.0 M parameters, 2.1 G multiply-adds at 224 x 224."""
    return _build({"depths": (2, 2, 2, 2)}, overrides)


@register
def pvt_v2_b2(**overrides: Any) -> PyramidVisionTransformerV2:
    """PVTv2-B2: 25.4 M parameters, 4.0 G multiply-adds at 224 x 224."""
    return _build({"depths": (3, 4, 6, 3)}, overrides)


@register
def pvt_v2_b2_li(**overrides: Any) -> PyramidVisionTransformerV2:
    """PVTv2-B2 with linear attention: 22.6 M parameters, 3.9 G multiply-adds at 224 x 224."""
    return _build({"depths": (3, 4, 6, 3), "linear": True}, overrides)


@register
def pvt_v2_b3(**overrides: Any) -> PyramidVisionTransformerV2:
    """PVTv2-B3: 45.2 M parameters, 6.9 G multiply-adds at 224 x 224."""
    return _build({"depths": (3, 4, 18, 3)}, overrides)


@register
def pvt_v2_b4(**overrides: Any) -> PyramidVisionTransformerV2:
    """PVTv2-B4: 62.6 M parameters, 10.1 G multiply-adds at 224 x 224."""
    return _build({"depths": (3, 8, 27, 3)}, overrides)


@register
def pvt_v2_b5(**overrides: Any) -> PyramidVisionTransformerV2:
    """PVTv2-B5: 82.0 M parameters, 11.7 G multiply-adds at 224 x 224."""
    return _build({"depths": (3, 6, 40, 3), "mlp_ratios": (4.0, 4.0, 4.0, 4.0)}, overrides)
