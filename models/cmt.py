"""CMT: a convolutional stem, and blocks of local perception, attention to a reduced map, and a depthwise MLP.

Source: Guo et al., "CMT: Convolutional Neural Networks Meet Vision Transformers". Names, structure and initialisation
follow the official code, so its weights load with `strict=True`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastvit_kernels.models.checkpoints import Conversion
from fastvit_kernels.models.cmt_tables import check_tables, resize_tables
from fastvit_kernels.models.features import FeatureInfo, check_image
from fastvit_kernels.models.registry import image_size, register
from fastvit_kernels.nn import IRFFN, LMHSA, LPU, DenseConv2d, DenseLinear, DropPath, LayerNorm, PatchEmbedding
from fastvit_kernels.nn.dense_conv import convolve
from fastvit_kernels.nn.fused import drops_nothing, has_hooks
from fastvit_kernels.nn.repetition import Repeating
from fastvit_kernels.nn.taping import Taped

STAGES = "abcd"
EPS = 1e-6
# Between the image and the last map every side is halved so often.
_REDUCTION = 32


class Block(Taped):
    """Local perception, attention and MLP on `[B, h*w, C]` tokens of an `h x w` map, each beside a residual."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden_dim: int,
        drop: float,
        attn_drop: float,
        drop_path: float,
        **attention: Any,
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, EPS)
        self.attn = LMHSA(dim, num_heads, attn_drop=attn_drop, proj_drop=drop, **attention)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = LayerNorm(dim, EPS)
        self.mlp = IRFFN(dim, hidden_dim, drop=drop)
        self.proj = LPU(dim)

    def forward(self, x: Tensor, h: int, w: int, relative_pos: Tensor) -> Tensor:
        return self.taped(self._forward, x, h, w, relative_pos)

    def _forward(self, x: Tensor, h: int, w: int, relative_pos: Tensor) -> Tensor:
        # As tokens where nobody can tell: a map is the same memory, but eight views.
        if type(self.proj) is LPU and not has_hooks(self.proj) and not _has_any_global_hook():
            x = self.proj.forward_tokens(x, h, w)
        else:
            x = _rows(self.proj(_map(x, h, w)))
        x = self._residual(x, self.attn, self.norm1, h, w, relative_pos)
        return self._residual(x, self.mlp, self.norm2, h, w)

    def _residual(self, x: Tensor, branch: nn.Module, norm: nn.LayerNorm, *arguments: Any) -> Tensor:
        """`x + drop_path(branch(norm(x)))`, the norm and the addition inside the branch where nobody can tell."""
        if has_hooks(branch) or not isinstance(branch, (LMHSA, IRFFN)):
            return x + self.drop_path(branch(norm(x), *arguments))
        if drops_nothing(self.drop_path):
            return branch(x, *arguments, norm=norm, residual=x)
        return x + self.drop_path(branch(x, *arguments, norm=norm))


class CMT(Repeating):
    """CMT for classification, or for feature maps.

    Image `[B, in_chans, H, W]`, best in `torch.channels_last`, of the one size that the model was built for: the
    attention's tables of relative positions have an entry for every pixel of a map. With the classifier the result is
    `[B, num_classes]`, with `num_classes=0` the pooled features `[B, fc_dim]` in front of it. With `features_only=True`
    it is a list of channels-last maps `[B, C, H, W]`, one per stage.

    fp64, fp32, bf16 and fp16 all work, the LayerNorms in at least fp32.

    Args:
        embed_dims, depths, num_heads: channels, blocks and heads of each of the four stages.
        img_size: height and width of the images, or one number for both; multiples of 32.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the image.
        features_only: return feature maps; the model then ends behind its last stage.
        stem_channel: channels of the stem.
        fc_dim: channels in front of the classifier.
        mlp_ratios: hidden channels of the MLP over its channels, for each stage; the product is rounded down.
        qkv_bias, qk_scale, qk_ratio: of the attention; see `fastvit_kernels.nn.LMHSA`.
        sr_ratios: how many times smaller the map of keys and values is each way, for each stage.
        drop_rate: dropout of tokens, attention outputs and MLPs.
        attn_drop_rate: dropout of attention probabilities.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0 through all blocks.
        dp: dropout in front of the classifier.
        resize_relative_pos: resize the tables of checkpoints for another `img_size` when they are loaded; see
            `fastvit_kernels.models.cmt_tables`. Otherwise such a checkpoint does not fit.
        backend: runs the fused operators on one backend; None for the usual choice.

    Attributes:
        feature_info: channels and reduction of each stage's map.
        img_size: height and width of the images.
        left_out: beginnings of the names of the full model's parameters that this one does not have.

    Raises:
        ValueError: an `img_size` that is no multiple of 32, heads that do not divide the channels, or arguments per
            stage of a length other than four; from `forward`, an image of the wrong rank, channels or size.
    """

    def __init__(
        self,
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (3, 3, 16, 3),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        *,
        img_size: int | tuple[int, int] = 224,
        num_classes: int = 1000,
        in_chans: int = 3,
        features_only: bool = False,
        stem_channel: int = 32,
        fc_dim: int = 1280,
        mlp_ratios: Sequence[float] = (4.0, 4.0, 4.0, 4.0),
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        qk_ratio: int = 1,
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dp: float = 0.1,
        resize_relative_pos: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        per_stage = (embed_dims, depths, num_heads, mlp_ratios, sr_ratios)
        if any(len(values) != len(STAGES) for values in per_stage):
            raise ValueError(f"embed_dims: expected four stages in all arguments, got {[len(v) for v in per_stage]}")
        self.img_size = _image_size(img_size)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.sr_ratios = tuple(sr_ratios)
        self.resize_relative_pos = resize_relative_pos
        for index in (1, 2, 3):
            channels, stride = (in_chans, 2) if index == 1 else (stem_channel, 1)
            self.add_module(f"stem_conv{index}", DenseConv2d(channels, stem_channel, 3, stride, padding=1))
            self.add_module(f"stem_relu{index}", nn.GELU())
            self.add_module(f"stem_norm{index}", nn.BatchNorm2d(stem_channel))
        widths = (stem_channel, *embed_dims)
        for stage, letter in enumerate(STAGES):
            embedding = PatchEmbedding(2, widths[stage], widths[stage + 1], 2, 0)
            self.add_module(f"patch_embed_{letter}", embedding)
        for stage, letter in enumerate(STAGES):
            pixels = self.grid(stage)[0] * self.grid(stage)[1]
            table = torch.randn(num_heads[stage], pixels, pixels // sr_ratios[stage] ** 2)
            self.register_parameter(f"relative_pos_{letter}", nn.Parameter(table))
        self.pos_drop = nn.Dropout(drop_rate)
        drop_paths = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        for stage, letter in enumerate(STAGES):
            blocks = nn.ModuleList(
                Block(
                    embed_dims[stage],
                    num_heads[stage],
                    int(mlp_ratios[stage] * embed_dims[stage]),
                    drop_rate,
                    attn_drop_rate,
                    next(drop_paths),
                    qkv_bias=qkv_bias,
                    qk_scale=qk_scale,
                    qk_ratio=qk_ratio,
                    sr_ratio=sr_ratios[stage],
                )
                for _ in range(depths[stage])
            )
            self.add_module(f"blocks_{letter}", blocks)
        self.head: nn.Module | None = None
        if not features_only:
            self._fc = DenseConv2d(embed_dims[-1], fc_dim, 1)
            self._bn = nn.BatchNorm2d(fc_dim)
            self._swish = nn.SiLU()
            self._drop = nn.Dropout(dp)
            self.head = DenseLinear(fc_dim, num_classes) if num_classes > 0 else nn.Identity()
        self.left_out = ("_fc.", "_bn.", "head.") if features_only else ("head.",) if num_classes == 0 else ()
        self.feature_info = [FeatureInfo(channels, 4 << stage) for stage, channels in enumerate(embed_dims)]
        for module in self.modules():
            _initialise(module)
            if isinstance(module, (DenseConv2d, DenseLinear, IRFFN, LMHSA, LPU, PatchEmbedding)):
                module.backend = backend

    def grid(self, stage: int) -> tuple[int, int]:
        """Height and width of a stage's map."""
        return self.img_size[0] >> (2 + stage), self.img_size[1] >> (2 + stage)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Logits `[B, num_classes]`; pooled features or a list of feature maps if the model was built for them."""
        return self.repeat(self._forward, x)

    def _forward(self, x: Tensor) -> Tensor | list[Tensor]:
        if self.head is None:
            return self.forward_maps(x)
        return self.head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """The pooled features `[B, fc_dim]` in front of the classifier."""
        if self.head is None:
            raise ValueError("features_only: this model was built for feature maps, it ends behind its last stage")
        x = convolve(self._fc, self.forward_maps(x)[-1], bn=self._bn, act=self._swish)
        pooled: Tensor = self._drop(x.mean((2, 3)))
        return pooled

    def forward_maps(self, x: Tensor) -> list[Tensor]:
        """Every stage's map `[B, C, H, W]` in channels-last memory."""
        check_image(x, self.in_chans, 1)
        if tuple(x.shape[2:]) != self.img_size:
            height, width = self.img_size
            raise ValueError(f"x: this model takes {height} x {width} images, got {x.shape[2]} x {x.shape[3]}")
        # Only an image in NCHW memory is copied here; all maps behind it are channels-last already.
        x = x.contiguous(memory_format=torch.channels_last)
        for index in (1, 2, 3):
            modules: dict[str, Any] = self._modules
            conv, act, bn = (modules[f"stem_{name}{index}"] for name in ("conv", "relu", "norm"))
            x = convolve(conv, x, act=act, bn=bn, bn_after_activation=True)
        maps = []
        for letter in STAGES:
            x = self.get_submodule(f"patch_embed_{letter}")(x)
            h, w = x.shape[2:]
            # Not get_parameter: under torch.func a plain tensor stands in its place.
            table = getattr(self, f"relative_pos_{letter}")
            rows = self.pos_drop(_rows(x))
            blocks = self.get_submodule(f"blocks_{letter}")
            assert isinstance(blocks, nn.ModuleList)
            for block in blocks:
                rows = block(rows, h, w, table)
            x = _map(rows, h, w)
            maps.append(x)
        return maps

    @torch.no_grad()
    def pack_weights(self) -> None:
        """Where the model is prepared for inference, pack its weights now, not at the first call.

        Packing takes a call with the tables of relative positions, which belong to the one size of images.
        """
        blank = self.get_parameter("relative_pos_a").new_zeros(1, self.in_chans, *self.img_size)
        _ = self.forward_maps(blank) if self.head is None else self.forward_features(blank)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that training leaves out of weight decay, besides biases and norms."""
        return {f"relative_pos_{letter}" for letter in STAGES}

    def convert_checkpoint(self, state_dict: dict[str, Tensor]) -> Conversion:
        """Tables for other images are resized if the model was built for that; see `load_checkpoint`."""
        state = self.state_dict()
        if not self.resize_relative_pos:
            return Conversion("official", state_dict, check_tables(state_dict, state))
        grids = {f"relative_pos_{letter}": self.grid(stage) for stage, letter in enumerate(STAGES)}
        ratios = {f"relative_pos_{letter}": ratio for letter, ratio in zip(STAGES, self.sr_ratios, strict=True)}
        converted, notes = resize_tables(state_dict, state, grids, ratios)
        return Conversion("official", converted, notes)


def _image_size(img_size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    if height < 1 or width < 1 or height % _REDUCTION or width % _REDUCTION:
        raise ValueError(f"img_size: expected multiples of {_REDUCTION}, got {height} x {width}")
    return height, width


def _rows(maps: Tensor) -> Tensor:
    return maps.flatten(2).transpose(1, 2)


def _map(rows: Tensor, h: int, w: int) -> Tensor:
    return rows.transpose(1, 2).unflatten(2, (h, w))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def _build(defaults: dict[str, Any], overrides: dict[str, Any]) -> CMT:
    return CMT(**{**defaults, **overrides})


@register
def cmt_ti(**overrides: Any) -> CMT:
    """CMT-Ti: 9.5 M parameters, 0.6 G multiply-adds at 160 x 160."""
    sizes = {"embed_dims": (46, 92, 184, 368), "depths": (2, 2, 10, 2), "mlp_ratios": (3.6,) * 4}
    return _build({**sizes, "stem_channel": 16, "img_size": image_size("cmt_ti")}, overrides)


@register
def cmt_xs(**overrides: Any) -> CMT:
    """CMT-XS: 15.2 M parameters, 1.5 G multiply-adds at 192 x 192."""
    sizes = {"embed_dims": (52, 104, 208, 416), "depths": (3, 3, 12, 3), "mlp_ratios": (3.77,) * 4}
    return _build({**sizes, "stem_channel": 16, "img_size": image_size("cmt_xs")}, overrides)


@register
def cmt_s(**overrides: Any) -> CMT:
    """CMT-S: 26.3 M parameters, 4.0 G multiply-adds at 224 x 224."""
    return _build(
        {"embed_dims": (64, 128, 256, 512), "depths": (3, 3, 16, 3), "img_size": image_size("cmt_s")}, overrides
    )


@register
def cmt_b(**overrides: Any) -> CMT:
    """CMT-B: 45.7 M parameters, 9.3 G multiply-adds at 256 x 256."""
    sizes = {"embed_dims": (76, 152, 304, 608), "depths": (4, 4, 20, 4), "stem_channel": 38, "dp": 0.3}
    return _build({**sizes, "img_size": image_size("cmt_b")}, overrides)
