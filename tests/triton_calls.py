"""Calls of the operators at published sizes, on meta tensors: what the tests of Triton's compilation compile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch

from fastvit_kernels.ops import library
from fastvit_kernels.ops.conv_projection import triton as conv_projection
from fastvit_kernels.ops.conv_projection.reference import Static as ConvProjectionStatic
from fastvit_kernels.ops.depthwise_conv import triton as depthwise_conv
from fastvit_kernels.ops.depthwise_conv.reference import Static as DepthwiseConvStatic
from fastvit_kernels.ops.depthwise_mlp import triton as depthwise_mlp
from fastvit_kernels.ops.depthwise_mlp.reference import Static as DepthwiseMLPStatic
from fastvit_kernels.ops.global_attention import triton as global_attention
from fastvit_kernels.ops.global_attention.reference import Static as GlobalAttentionStatic
from fastvit_kernels.ops.head_tokens import triton as head_tokens
from fastvit_kernels.ops.head_tokens.reference import Static as HeadTokensStatic
from fastvit_kernels.ops.local_attention import triton as local_attention
from fastvit_kernels.ops.local_attention.reference import Static as LocalAttentionStatic
from fastvit_kernels.ops.merge_head_tokens import triton as merge_head_tokens
from fastvit_kernels.ops.merge_head_tokens.reference import Static as MergeHeadTokensStatic
from fastvit_kernels.ops.patch_embedding import triton as patch_embedding
from fastvit_kernels.ops.patch_embedding.reference import Static as PatchEmbeddingStatic
from fastvit_kernels.ops.pointwise_mlp import triton as pointwise_mlp
from fastvit_kernels.ops.pointwise_mlp.reference import Static as PointwiseMLPStatic
from fastvit_kernels.ops.pooled_projection import triton as pooled_projection
from fastvit_kernels.ops.pooled_projection.reference import Static as PooledProjectionStatic


class Stage(NamedTuple):
    """One stage of a model; the sides are the map's at 224 pixels."""

    channels: int
    heads: int
    prefix: int = 0
    height: int = 14
    width: int = 14
    batch: int = 8
    hidden_ratio: float = 4.0
    window: int = 7
    kernel: int = 3
    pad: str = "mask"


class Precision(NamedTuple):
    """Dtypes of the activations, the parameters and the products."""

    activations: torch.dtype
    parameters: torch.dtype
    products: torch.dtype


class Prepared(NamedTuple):
    """The tensors and static arguments of an operator, and the bridge to its Triton kernels."""

    bridge: ModuleType
    tensors: Sequence[torch.Tensor | None]
    static: Any

    def forward(self) -> object:
        return self.bridge.launch(self.tensors, self.static)

    def backward(self) -> object:
        """Every gradient that a model's training asks for: those of running statistics it does not."""
        name = self.bridge.__name__.split(".")[-2]
        grads = library.operators[name].fake(self.tensors, self.static)
        needs = [
            t is not None and index not in RUNNING_STATISTICS.get(name, ()) for index, t in enumerate(self.tensors)
        ]
        return self.bridge.launch_backward(grads, self.tensors, needs, self.static)

    def statistics(self) -> object:
        """Those of a batch, which its batch norms take in training."""
        return self.bridge.launch_statistics(self.tensors, self.static)


# Stages 1 to 3 of CvT-13 and CvT-21, then those of W24 that differ.
CVT = [
    Stage(64, 1, 0, 56, 56),
    Stage(192, 3, 0, 28, 28),
    Stage(384, 6, 1),
    Stage(768, 12, 0, 28, 28),
    Stage(1024, 16, 1),
]
# Stages 1 to 3 of HAT-Net-Tiny and of the larger variants.
HAT_NET = [
    Stage(48, 1, 0, 56, 56, window=8),
    Stage(64, 1, 0, 56, 56, window=8),
    Stage(96, 2, 0, 28, 28),
    Stage(128, 2, 0, 28, 28),
    Stage(240, 5),
    Stage(320, 5),
]
# Where running statistics stand in the tensor lists.
RUNNING_STATISTICS = {
    "conv_projection": (6, 7, 13, 14, 20, 21),
    "depthwise_conv": (7, 8),
    "depthwise_mlp": (8, 9, 14, 15, 20, 21),
    "patch_embedding": (9, 10),
}
PRECISIONS = {
    "float32": Precision(torch.float32, torch.float32, torch.float32),
    "bfloat16": Precision(torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "autocast-bfloat16": Precision(torch.float32, torch.float32, torch.bfloat16),
    "autocast-float16": Precision(torch.float32, torch.float32, torch.float16),
}


def make_conv_projection(stage: Stage, precision: Precision) -> Prepared:
    x, parameter = _makers(precision)
    channels = stage.channels
    branch = [parameter(channels, 1, 3, 3), *(parameter(channels) for _ in range(4))]
    branch += [parameter(channels, channels), parameter(channels)]
    tokens = x(stage.batch, stage.prefix + stage.height * stage.width, channels)
    static = ConvProjectionStatic(
        norm_eps=1e-5,
        bn_eps=[1e-5] * 3,
        bn_training=False,
        height=stage.height,
        width=stage.width,
        num_prefix_tokens=stage.prefix,
        stride=[1, 2, 2],
        padding=[1, 1, 1],
        dtype=precision.products,
    )
    tensors = [tokens, parameter(channels), parameter(channels), *branch, *branch, *branch]
    return Prepared(conv_projection, tensors, static)


def make_global_attention(stage: Stage, precision: Precision) -> Prepared:
    x, parameter = _makers(precision)
    channels, tokens = stage.channels, stage.prefix + stage.height * stage.width
    pooled = stage.prefix + -(-stage.height // 2) * -(-stage.width // 2)
    queries, keys = (
        torch.empty((stage.batch, n, channels), dtype=precision.products, device="meta") for n in (tokens, pooled)
    )
    residual = x(stage.batch, tokens, channels)
    tensors = [queries, keys, keys, parameter(channels, channels), parameter(channels), *[None] * 6, residual]
    static = GlobalAttentionStatic(stage.heads, channels**-0.5, "none", 0.0, False, False, precision.products)
    return Prepared(global_attention, tensors, static)


def make_query_attention(stage: Stage, precision: Precision) -> Prepared:
    """HAT-Net's second step: a norm by given statistics, 49 keys beside their values, a bias table, statistics."""
    x, parameter = _makers(precision)
    channels, tokens = stage.channels, stage.height * stage.width
    keys = torch.empty((stage.batch, 49, 2 * channels), dtype=precision.products, device="meta")
    queries, statistics = x(stage.batch, tokens, channels), torch.empty((stage.batch, 2), device="meta")
    linear = [parameter(channels, channels), parameter(channels)]
    weights = [*linear, parameter(channels), parameter(channels), *linear, parameter(stage.heads, tokens, 49)]
    tensors = [queries, keys, None, *weights, statistics, queries]
    static = GlobalAttentionStatic(stage.heads, 0.125, "group", 1e-6, True, True, precision.products)
    return Prepared(global_attention, tensors, static)


def make_short_attention(stage: Stage, precision: Precision) -> Prepared:
    """The same without the table, as HAT-Net has it."""
    bridge, tensors, static = make_query_attention(stage, precision)
    return Prepared(bridge, [*tensors[:9], None, *tensors[10:]], static)


def make_pyramid_attention(stage: Stage, precision: Precision, keys: int, table: bool) -> Prepared:
    """PVTv2's behind its LayerNorm, or with a table CMT's; with many keys DHVT's."""
    bridge, tensors, static = make_query_attention(stage, precision)
    rows = torch.empty((stage.batch, keys, 2 * stage.channels), dtype=precision.products, device="meta")
    bias = torch.empty((stage.heads, stage.height * stage.width, keys), dtype=precision.parameters, device="meta")
    tensors = [tensors[0], rows, *tensors[2:9], bias if table else None, None, tensors[11]]
    static = static._replace(norm="layer", add_query_input=False, return_statistics=False)
    return Prepared(bridge, tensors, static)


def make_head_tokens(stage: Stage, precision: Precision) -> Prepared:
    x, parameter = _makers(precision)
    channels, heads = stage.channels, stage.heads
    width = channels // heads
    tokens = x(stage.batch, 1 + stage.height * stage.width, channels)
    weights = [*(parameter(channels) for _ in range(2)), parameter(channels, width), parameter(channels)]
    tensors = [tokens, *weights, parameter(width), parameter(width), parameter(heads, channels)]
    return Prepared(head_tokens, tensors, HeadTokensStatic(heads, 1e-6, 1e-5, precision.products))


def make_merge_head_tokens(stage: Stage, precision: Precision) -> Prepared:
    x, _ = _makers(precision)
    tokens = 1 + stage.height * stage.width
    tensors = [x(stage.batch, tokens + stage.heads, stage.channels), x(stage.batch, tokens, stage.channels)]
    return Prepared(merge_head_tokens, tensors, MergeHeadTokensStatic(stage.heads, precision.products))


def make_local_attention(stage: Stage, precision: Precision) -> Prepared:
    x, parameter = _makers(precision)
    channels, pixels = stage.channels, stage.window**2
    tokens = x(stage.batch, stage.height * stage.width, channels)
    qkv = [parameter(channels), parameter(channels), None, parameter(3 * channels, channels), parameter(3 * channels)]
    bias = parameter(stage.heads, pixels, pixels)
    tensors = [tokens, None, None, *qkv, bias, parameter(channels, channels), parameter(channels), tokens]
    static = LocalAttentionStatic(
        norm="group",
        norm_eps=1e-6,
        height=stage.height,
        width=stage.width,
        window_size=stage.window,
        num_heads=stage.heads,
        scale=0.125,
        pad=stage.pad,
        return_statistics=True,
        dtype=precision.products,
    )
    return Prepared(local_attention, tensors, static)


def make_window_mixing(stage: Stage, precision: Precision) -> Prepared:
    """HAT-Net's first step: the rows in front of the norm are added, statistics of that."""
    bridge, tensors, static = make_local_attention(stage, precision)
    return Prepared(
        bridge,
        [*tensors[:5], torch.empty((stage.batch, 2), device="meta"), *tensors[6:8], None, None, None, tensors[11]],
        static,
    )


def make_patch_embedding(stage: Stage, precision: Precision) -> Prepared:
    """To a stage of twice the channels, between two norms."""
    x, parameter = _makers(precision)
    channels, out = stage.channels, 2 * stage.channels
    weights = [parameter(out, channels, stage.kernel, stage.kernel), *(parameter(out) for _ in range(3))]
    tensors = [x(stage.batch, stage.height, stage.width, channels), *weights, parameter(channels), parameter(channels)]
    dtypes = precision.products, precision.activations
    static = PatchEmbeddingStatic(1e-5, 1e-5, 2, stage.kernel // 2, "none", False, 0.0, False, *dtypes)
    tensors += [None] * 4
    return Prepared(patch_embedding, tensors, static)


def make_stem(stage: Stage, precision: Precision) -> Prepared:
    """From an image, channels first, to the stage, with an activation and a batch norm behind it."""
    x, parameter = _makers(precision)
    image = x(stage.batch, 3, 4 * stage.height, 4 * stage.width).permute(0, 2, 3, 1)
    tensors = [image, parameter(stage.channels, 3, 7, 7), *(parameter(stage.channels) for _ in range(3)), None, None]
    tensors += [parameter(stage.channels) for _ in range(4)]
    static = PatchEmbeddingStatic(
        1e-5, None, 4, 2, "gelu", True, 1e-5, False, precision.products, precision.activations
    )
    return Prepared(patch_embedding, tensors, static)


def make_depthwise_conv(stage: Stage, precision: Precision) -> Prepared:
    """A reduction between two norms."""
    x, parameter = _makers(precision)
    channels = stage.channels
    tokens = x(stage.batch, stage.height * stage.width, channels)
    tensors = [tokens, parameter(channels, 1, 2, 2), *(parameter(channels) for _ in range(7)), None]
    static = DepthwiseConvStatic(1e-6, 1e-5, False, stage.height, stage.width, 2, 0, precision.products)
    return Prepared(depthwise_conv, tensors, static)


def make_pointwise_mlp(stage: Stage, precision: Precision) -> Prepared:
    x, parameter = _makers(precision)
    channels, hidden = stage.channels, int(stage.hidden_ratio * stage.channels)
    tokens = x(stage.batch, stage.prefix + stage.height * stage.width, channels)
    weights = [parameter(hidden, channels), parameter(hidden), parameter(channels, hidden), parameter(channels)]
    static = PointwiseMLPStatic(1e-5, "quick_gelu", precision.products)
    return Prepared(pointwise_mlp, [tokens, parameter(channels), parameter(channels), *weights, tokens], static)


def make_pooled_projection(stage: Stage, precision: Precision) -> Prepared:
    """HAT-Net's keys and values: 49 of them."""
    x, parameter = _makers(precision)
    channels = stage.channels
    tokens, statistics = (
        x(stage.batch, stage.height * stage.width, channels),
        torch.empty(stage.batch, 2, device="meta"),
    )
    norms = [parameter(channels), parameter(channels), statistics, parameter(channels), parameter(channels)]
    tensors = [tokens, *norms, parameter(2 * channels, channels), parameter(2 * channels)]
    static = PooledProjectionStatic(1e-6, 1e-6, stage.height, stage.width, stage.height // 7, False, precision.products)
    return Prepared(pooled_projection, tensors, static)


def make_depthwise_mlp(stage: Stage, precision: Precision) -> Prepared:
    """CMT's: three batch norms, two of them behind the activations, and an inner residual."""
    return _depthwise_mlp(stage, precision, "layer", "gelu", "gelu", "before_activation", True)


def make_daff(stage: Stage, precision: Precision) -> Prepared:
    """DHVT's: batch norms in front of the activations, the inner residual behind them, a mean over the pixels."""
    stage = stage._replace(prefix=1)
    return _depthwise_mlp(stage, precision, "layer", "gelu", "gelu", "after_activation", True, "mean")


def make_hat_mlp(stage: Stage, precision: Precision) -> Prepared:
    """HAT-Net's: GroupNorms in front and behind, statistics of the result."""
    return _depthwise_mlp(stage, precision, "group", "silu", "silu", "none", False, "statistics")


def _depthwise_mlp(
    stage: Stage,
    precision: Precision,
    norm: str,
    hidden_activation: str,
    activation: str,
    inner_residual: str,
    batch_norms: bool,
    summary: str = "none",
) -> Prepared:
    x, parameter = _makers(precision)
    channels, hidden = stage.channels, int(stage.hidden_ratio * stage.channels)
    tokens = x(stage.batch, stage.prefix + stage.height * stage.width, channels)

    def batch_norm(width: int) -> list[torch.Tensor | None]:
        return [parameter(width) for _ in range(4)] if batch_norms else [None] * 4

    tensors = [
        *(tokens, parameter(channels), parameter(channels), None, parameter(hidden, channels), parameter(hidden)),
        *(*batch_norm(hidden), parameter(hidden, 1, stage.kernel, stage.kernel), parameter(hidden)),
        *(*batch_norm(hidden), parameter(channels, hidden), parameter(channels)),
        *(*batch_norm(channels), parameter(channels), parameter(channels), tokens),
    ]
    static = DepthwiseMLPStatic(
        norm=norm,
        norm_eps=1e-6,
        hidden_activation=hidden_activation,
        activation=activation,
        inner_residual=inner_residual,
        bn_after_activation=inner_residual == "before_activation",
        bn_eps=[1e-5] * 3,
        training=False,
        out_norm_eps=None if batch_norms else 1e-6,
        height=stage.height,
        width=stage.width,
        num_prefix_tokens=stage.prefix,
        summary=summary,
        dtype=precision.products,
    )
    return Prepared(depthwise_mlp, tensors, static)


def _makers(precision: Precision) -> tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]:
    def x(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=precision.activations, device="meta")

    def parameter(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=precision.parameters, device="meta")

    return x, parameter


OPERATORS = {
    "conv_projection": make_conv_projection,
    "depthwise_conv": make_depthwise_conv,
    "depthwise_mlp": make_depthwise_mlp,
    "depthwise_mlp with a mean": make_daff,
    "depthwise_mlp between norms": make_hat_mlp,
    "global_attention": make_global_attention,
    "global_attention behind a norm": make_query_attention,
    "global_attention to few keys": make_short_attention,
    "head_tokens": make_head_tokens,
    "local_attention": make_local_attention,
    "local_attention of rows that are added": make_window_mixing,
    "merge_head_tokens": make_merge_head_tokens,
    "patch_embedding": make_patch_embedding,
    "patch_embedding of images": make_stem,
    "pointwise_mlp": make_pointwise_mlp,
    "pooled_projection": make_pooled_projection,
}

_OF_HAT_NET = (
    *("depthwise_mlp between norms", "global_attention behind a norm", "global_attention to few keys"),
    *("local_attention", "local_attention of rows that are added", "pooled_projection"),
)
# Others have the same gradients.
GRADIENTS_OF_OTHERS = ("global_attention to few keys", "local_attention of rows that are added")
STAGES = {operator: HAT_NET if operator in _OF_HAT_NET else CVT for operator in OPERATORS}
