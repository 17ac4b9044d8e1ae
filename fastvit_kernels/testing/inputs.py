"""Seeded inputs for every operator: small, odd and awkward, and one case each at CvT's published size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastvit_kernels import ops
from fastvit_kernels.ops import BatchNorm, Projection
from fastvit_kernels.ops.normalization import group_statistics
from fastvit_kernels.testing.calls import Call


@dataclass(frozen=True)
class Precision:
    """Dtypes of a call's activations and of its parameters."""

    activations: torch.dtype
    parameters: torch.dtype

    def __str__(self) -> str:
        names = [str(dtype).removeprefix("torch.") for dtype in (self.activations, self.parameters)]
        return names[0] if names[0] == names[1] else f"{names[0]}-with-{names[1]}-parameters"


FP64 = Precision(torch.float64, torch.float64)
FP32 = Precision(torch.float32, torch.float32)
BF16 = Precision(torch.bfloat16, torch.bfloat16)
BF16_FP32 = Precision(torch.bfloat16, torch.float32)
FP16 = Precision(torch.float16, torch.float16)


class Maker:
    """Draws the tensors of one call. The values are those of a seed, rounded to the call's precision."""

    def __init__(self, precision: Precision, seed: int) -> None:
        self.precision = precision
        self.generator = torch.Generator().manual_seed(seed)

    def activation(self, *shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        return self._normal(shape, scale, shift, self.precision.activations)

    def residual(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        if self.precision.activations == torch.float64:
            dtype = None
        return self._normal(shape, 1.0, 0.0, dtype or self.precision.activations)

    def weight(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Scaled by the square root of its fan-in, so that layers keep the size of their input."""
        fan_in = max(1, torch.Size(shape[1:]).numel())
        return self._normal(shape, scale * fan_in**-0.5, 0.0, self.precision.parameters)

    def vector(self, *shape: int, scale: float = 0.3, shift: float = 0.0) -> Tensor:
        return self._normal(shape, scale, shift, self.precision.parameters)

    def positive(self, *shape: int) -> Tensor:
        uniform = torch.rand(shape, generator=self.generator, dtype=torch.float64)
        return (uniform + 0.5).to(self.precision.parameters)

    def statistics(self, batch: int) -> Tensor:
        """Mean and variance of each sample, as an operator returns them."""
        dtype = torch.promote_types(self.precision.activations, torch.float32)
        return torch.stack([self._normal((batch,), 0.2, 0.0, dtype), self.positive(batch).to(dtype)], 1)

    def _normal(self, shape: tuple[int, ...], scale: float, shift: float, dtype: torch.dtype) -> Tensor:
        return (torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale + shift).to(dtype)


@dataclass(frozen=True)
class Case:
    """One call of one operator or module.

    Attributes:
        name: its test id.
        make: builds the call.
        tags: `smallest` for the few cases that slow checks (compilation, interpreted Triton) take, `inductor` for the
            one that is compiled to C++, `empty` where there is nothing to compute, `map` for NCHW input, `published`
            for a shape at a model's real size.
        vanishing: leaves whose exact gradient is zero, where only rounding noise can be compared.
    """

    name: str
    make: Callable[[Maker], Call]
    tags: frozenset[str] = field(default_factory=frozenset)
    vanishing: frozenset[str] = field(default_factory=frozenset)

    def __str__(self) -> str:
        return self.name

    def call(self, precision: Precision = FP32, seed: int = 0) -> Call:
        return self.make(Maker(precision, seed))


def _conv_projection(
    maker: Maker,
    *,
    batch: int = 2,
    grid: tuple[int, int] = (5, 7),
    channels: int = 24,
    out: tuple[int, int, int] | None = None,
    prefix: int = 0,
    kernel: tuple[int, int, int] = (3, 3, 3),
    stride: tuple[int, int, int] = (1, 2, 2),
    padding: tuple[int, int, int] = (1, 1, 1),
    bias: bool = True,
    bn: bool = True,
    bn_affine: bool = True,
    bn_training: bool = False,
    bn_track: bool = True,
    norm: bool = True,
    norm_affine: bool = True,
    as_map: torch.memory_format | None = None,
) -> Call:
    height, width = grid
    if as_map is None:
        x = maker.activation(batch, prefix + height * width, channels, scale=1.5, shift=0.5)
        arguments: dict[str, Any] = {"x": x, "grid": grid, "num_prefix_tokens": prefix}
    else:
        x = maker.activation(batch, channels, height, width, scale=1.5, shift=0.5).to(memory_format=as_map)
        arguments = {"x": x}
    for index, name in enumerate(("query", "key", "value")):
        k = kernel[index]
        conv_weight = maker.weight(channels, 1, k, k)
        norm_statistics = None
        if bn:
            norm_statistics = BatchNorm(
                weight=maker.positive(channels) if bn_affine else None,
                bias=maker.vector(channels) if bn_affine else None,
                running_mean=maker.vector(channels) if bn_track else None,
                running_var=maker.positive(channels) if bn_track else None,
                eps=1e-5 * (index + 1),
                training=bn_training,
                momentum=0.1,
            )
        width_out = channels if out is None else out[index]
        weight = maker.weight(width_out, channels)
        linear_bias = maker.vector(width_out) if bias else None
        arguments[name] = Projection(conv_weight, weight, linear_bias, norm_statistics, stride[index], padding[index])
    if norm:
        arguments["norm_eps"] = 1e-5
        if norm_affine:
            arguments |= {"norm_weight": maker.positive(channels), "norm_bias": maker.vector(channels)}
    return Call(ops.conv_projection, arguments)


def conv_projection_case(name: str, *tags: str, **options: Any) -> Case:
    """A call of `conv_projection` with these options of `_conv_projection`."""
    return Case(name, lambda maker: _conv_projection(maker, **options), frozenset(tags))


CONV_PROJECTION = [
    conv_projection_case("plain", "smallest", "inductor", prefix=1, channels=16),
    conv_projection_case("map_channels_last", "map", channels=16, as_map=torch.channels_last),
    conv_projection_case("map_contiguous", "map", batch=1, channels=10, as_map=torch.contiguous_format),
    conv_projection_case("no_prefix", batch=1),
    conv_projection_case("two_prefix_tokens", prefix=2, grid=(6, 4)),
    conv_projection_case("empty_batch", "empty", batch=0, grid=(4, 4), channels=8, prefix=1),
    conv_projection_case("odd_channels", grid=(3, 5), channels=13, prefix=1),
    conv_projection_case("one_channel", grid=(3, 4), channels=1, norm=False),
    conv_projection_case("one_pixel", batch=1, grid=(1, 1), channels=8, prefix=1),
    conv_projection_case("one_row", grid=(1, 9), channels=8),
    conv_projection_case("one_column", grid=(9, 1), channels=8, prefix=1),
    conv_projection_case("strided_query", grid=(7, 6), prefix=1, stride=(2, 2, 2)),
    conv_projection_case("three_strides", grid=(7, 8), stride=(3, 1, 2)),
    conv_projection_case("kernel_1", prefix=1, kernel=(1, 1, 1), padding=(0, 0, 0)),
    conv_projection_case("kernel_5", grid=(9, 4), kernel=(5, 5, 5), padding=(2, 2, 2)),
    conv_projection_case("three_kernels", prefix=1, kernel=(3, 5, 1), padding=(1, 2, 0)),
    conv_projection_case("no_padding", grid=(5, 6), prefix=1, padding=(0, 0, 0)),
    conv_projection_case("wide_padding", grid=(4, 3), prefix=1, padding=(2, 2, 2)),
    conv_projection_case("other_widths", prefix=1, out=(40, 16, 9)),
    conv_projection_case("no_bias", prefix=1, bias=False),
    conv_projection_case("no_bn", prefix=1, bn=False),
    conv_projection_case("bn_without_affine", bn_affine=False),
    conv_projection_case("no_norm", prefix=1, norm=False),
    conv_projection_case("norm_without_affine", prefix=1, norm_affine=False),
    conv_projection_case("bare", norm=False, bn=False, bias=False),
    conv_projection_case("bn_training", "smallest", prefix=1, channels=12, bn_training=True),
    conv_projection_case("bn_training_untracked", bn_training=True, bn_track=False, stride=(2, 1, 2)),
    conv_projection_case("bn_training_many_rows", batch=1, grid=(28, 17), channels=32, bn_training=True),
    conv_projection_case("many_rows", batch=3, grid=(14, 13), channels=32, prefix=1),
    conv_projection_case("many_channels", batch=1, grid=(6, 6), channels=136, out=(136, 72, 200)),
    conv_projection_case("cvt_13_stage_1", "published", batch=1, grid=(56, 56), channels=64),
    conv_projection_case("cvt_13_stage_3", "published", batch=1, grid=(14, 14), channels=384, prefix=1),
]


def _global_attention(
    maker: Maker,
    *,
    batch: int = 2,
    queries: int = 9,
    keys: int = 5,
    heads: int = 2,
    width: int = 8,
    value_width: int | None = None,
    out: int | None = None,
    proj: bool = True,
    bias: bool = True,
    residual: bool = True,
    residual_dtype: torch.dtype | None = None,
    score_scale: float = 2.0,
    norm: str | None = None,
    statistics: bool = False,
    query_in: int | None = None,
    packed_keys: bool = False,
    attn_bias: bool = False,
    add_query_input: bool = False,
    return_statistics: bool = False,
) -> Call:
    channels, value_channels = heads * width, heads * (value_width or width)
    in_channels = query_in or channels
    arguments: dict[str, Any] = {
        "q": maker.activation(batch, queries, in_channels, scale=score_scale),
        "k": maker.activation(batch, keys, 2 * channels if packed_keys else channels),
        "v": None if packed_keys else maker.activation(batch, keys, value_channels, shift=0.5),
        "num_heads": heads,
        "scale": width**-0.5,
    }
    out = value_channels if out is None or not proj else out
    if proj:
        arguments["proj_weight"] = maker.weight(out, value_channels)
        if bias:
            arguments["proj_bias"] = maker.vector(out)
    if norm:
        arguments |= {"norm": norm, "norm_eps": 1e-3}
        arguments["norm_weight"], arguments["norm_bias"] = (
            maker.vector(in_channels, shift=1.0),
            maker.vector(in_channels),
        )
    if statistics:
        arguments["norm_statistics"] = maker.statistics(batch)
    if query_in:
        arguments["query_weight"], arguments["query_bias"] = maker.weight(channels, query_in), maker.vector(channels)
    if attn_bias:
        arguments["attn_bias"] = maker.weight(heads, queries, keys)
    arguments |= {"add_query_input": add_query_input, "return_statistics": return_statistics}
    if residual:
        arguments["residual"] = maker.residual(batch, queries, out, dtype=residual_dtype)
    return Call(ops.global_attention, arguments)


def global_attention_case(name: str, *tags: str, **options: Any) -> Case:
    """A call of `global_attention` with these options of `_global_attention`."""
    return Case(name, lambda maker: _global_attention(maker, **options), frozenset(tags))


GLOBAL_ATTENTION = [
    global_attention_case("plain", "smallest", "inductor"),
    global_attention_case("no_projection", "smallest", proj=False, residual=False, heads=1, width=16),
    global_attention_case("empty_batch", "empty", batch=0),
    global_attention_case("no_queries", "empty", queries=0),
    global_attention_case("one_key", keys=1),
    global_attention_case("one_query", batch=1, queries=1, keys=11),
    global_attention_case("long_keys", batch=1, queries=70, keys=100, heads=1, width=16),
    global_attention_case("longer_keys", batch=1, queries=260, keys=130, heads=2, width=32),
    *(global_attention_case(f"width_{d}", queries=17, keys=9, width=d) for d in (46, 48, 52, 64, 76)),
    *(global_attention_case(f"heads_{h}", keys=7, heads=h, width=12) for h in range(1, 7)),
    global_attention_case("odd_width", heads=3, width=5),
    global_attention_case("other_value_width", heads=2, width=8, value_width=20),
    global_attention_case("other_out_width", out=23),
    global_attention_case("projection_only", bias=False, residual=False),
    global_attention_case("residual_only", proj=False),
    global_attention_case("no_bias", bias=False),
    global_attention_case("no_residual", residual=False),
    global_attention_case("fp32_residual", residual_dtype=torch.float32),
    global_attention_case("fp32_residual_only", proj=False, residual_dtype=torch.float32),
    global_attention_case("large_scores", queries=20, keys=33, score_scale=60.0),
    global_attention_case("packed_keys", packed_keys=True),
    global_attention_case("layer_norm", norm="layer", query_in=19),
    global_attention_case("group_norm", norm="group", query_in=16, add_query_input=True, return_statistics=True),
    global_attention_case("given_statistics", "smallest", norm="group", statistics=True, query_in=16),
    global_attention_case("odd_query_input", norm="group", query_in=15, heads=1, width=15, add_query_input=True),
    global_attention_case("rows_without_norm", query_in=16, add_query_input=True),
    global_attention_case("statistics_without_projection", proj=False, return_statistics=True),
    *(
        global_attention_case(
            f"few_keys_{heads}_heads",
            batch=1,
            queries=70,
            keys=49,
            heads=heads,
            width=32,
            packed_keys=True,
            norm="group",
            query_in=heads * 32,
            add_query_input=True,
            return_statistics=True,
        )
        for heads in (2, 5)
    ),
    global_attention_case("table", queries=40, keys=9, attn_bias=True),
    global_attention_case("long_table", queries=35, keys=300, heads=1, attn_bias=True),
    global_attention_case("cvt_13_stage_2", "published", batch=1, queries=784, keys=196, heads=3, width=64),
    global_attention_case("cvt_13_stage_3", "published", batch=1, queries=197, keys=50, heads=6, width=64),
]


def _local_attention(
    maker: Maker,
    *,
    batch: int = 2,
    grid: tuple[int, int] = (4, 6),
    window: int = 2,
    heads: int = 2,
    width: int = 8,
    value_width: int | None = None,
    form: str = "projected",
    channels: int = 20,
    norm: str | None = None,
    norm_affine: bool = True,
    statistics: bool = False,
    qkv_bias: bool = True,
    attn_bias: bool = False,
    out: int | None = None,
    proj: bool = True,
    proj_bias: bool = True,
    residual: bool = True,
    residual_dtype: torch.dtype | None = None,
    pad: str = "none",
    return_statistics: bool = False,
    score_scale: float = 2.0,
) -> Call:
    inner, inner_out, rows = heads * width, heads * (value_width or width), grid[0] * grid[1]
    arguments: dict[str, Any] = {
        "grid": grid,
        "window_size": window,
        "num_heads": heads,
        "scale": score_scale * width**-0.5,
        "pad": pad,
        "return_statistics": return_statistics,
    }
    if form == "projected":
        arguments["x"] = maker.activation(batch, rows, channels, scale=1.5, shift=0.5)
        arguments["qkv_weight"] = maker.weight(3 * inner, channels)
        arguments["qkv_bias"] = maker.vector(3 * inner) if qkv_bias else None
    elif form == "packed":
        arguments["x"] = maker.activation(batch, rows, 3 * inner, shift=0.2)
    else:
        arguments["x"] = maker.activation(batch, rows, inner)
        arguments["k"] = maker.activation(batch, rows, inner)
        arguments["v"] = maker.activation(batch, rows, inner_out, shift=0.5)
    if norm is not None:
        arguments |= {"norm": norm, "norm_eps": 1e-5}
        if norm_affine:
            arguments |= {"norm_weight": maker.positive(channels), "norm_bias": maker.vector(channels)}
        if statistics:
            arguments["norm_statistics"] = group_statistics(arguments["x"])
    if attn_bias:
        arguments["attn_bias"] = maker.vector(heads, window**2, window**2, scale=1.0)
    out = inner_out if out is None or not proj else out
    if proj:
        arguments["proj_weight"] = maker.weight(out, inner_out)
        arguments["proj_bias"] = maker.vector(out) if proj_bias else None
    if residual:
        arguments["residual"] = maker.residual(batch, rows, out, dtype=residual_dtype)
    return Call(ops.local_attention, arguments)


def local_attention_case(name: str, *tags: str, **options: Any) -> Case:
    """A call of `local_attention` with these options of `_local_attention`."""
    return Case(name, lambda maker: _local_attention(maker, **options), frozenset(tags))


_BARE = {"proj": False, "residual": False}

LOCAL_ATTENTION = [
    local_attention_case(
        "plain",
        "smallest",
        "inductor",
        grid=(5, 6),
        window=4,
        norm="group",
        statistics=True,
        attn_bias=True,
        pad="mask",
        return_statistics=True,
    ),
    local_attention_case("packed", "smallest", form="packed", proj=False),
    local_attention_case("packed_alone", form="packed", **_BARE),
    local_attention_case("separate", "smallest", form="separate", grid=(4, 3), window=4, pad="zero", value_width=12),
    local_attention_case("layer_norm", norm="layer"),
    local_attention_case("group_norm", norm="group"),
    local_attention_case("group_norm_without_affine", norm="group", norm_affine=False, statistics=True),
    local_attention_case("empty_batch", "empty", batch=0, norm="group", return_statistics=True),
    local_attention_case("one_sample", batch=1, return_statistics=True),
    local_attention_case("one_window", grid=(4, 4), window=4),
    local_attention_case("window_larger_than_the_map", grid=(2, 3), window=5, pad="mask", attn_bias=True),
    local_attention_case("one_row", grid=(1, 9), window=4, pad="mask"),
    local_attention_case("one_column", grid=(9, 1), window=4, pad="zero"),
    local_attention_case("mask_that_pads_nothing", pad="mask"),
    local_attention_case("zero_that_pads_nothing", pad="zero"),
    local_attention_case("masked", grid=(6, 5), window=4, pad="mask"),
    local_attention_case("masked_packed", grid=(6, 5), window=4, form="packed", pad="mask", attn_bias=True, **_BARE),
    local_attention_case("masked_separate", grid=(9, 8), window=4, form="separate", pad="mask"),
    local_attention_case("zero_padded", grid=(6, 5), window=4, norm="layer", pad="zero", attn_bias=True),
    local_attention_case("zero_padded_without_bias", grid=(6, 5), window=4, qkv_bias=False, pad="zero"),
    local_attention_case("zero_padded_packed", grid=(8, 5), window=4, form="packed", pad="zero"),
    *(local_attention_case(f"window_{g}", batch=1, grid=(g, 2 * g), window=g, width=16) for g in (4, 7, 8)),
    local_attention_case("window_16", batch=1, grid=(16, 16), window=16, heads=1, width=16, attn_bias=True),
    local_attention_case("window_11", batch=1, grid=(11, 13), window=11, heads=1, width=16, pad="mask", form="packed"),
    *(
        local_attention_case(
            f"window_{g}",
            batch=1,
            grid=(g, g + 2),
            window=g,
            heads=1,
            form="packed",
            pad="mask" if g % 2 else "zero",
        )
        for g in (5, 6, 9, 10, 12, 13, 14, 15)
    ),
    *(local_attention_case(f"width_{d}", grid=(4, 4), window=4, width=d) for d in (32, 46, 48, 52, 64, 76, 96)),
    *(
        local_attention_case(f"width_{d}_{pad}", batch=1, grid=(3, 5), window=4, width=d, pad=pad)
        for d in (46, 52, 76)
        for pad in ("mask", "zero")
    ),
    *(local_attention_case(f"heads_{h}", grid=(4, 4), heads=h, width=12, form="packed") for h in (1, 3, 5, 6)),
    local_attention_case("odd_width", heads=3, width=5, channels=13, norm="group"),
    local_attention_case("other_value_width", form="separate", value_width=20),
    local_attention_case("other_out_width", out=23, norm="layer"),
    local_attention_case("projection_only", form="packed", proj_bias=False, residual=False),
    local_attention_case("residual_only", form="packed", proj=False, return_statistics=True),
    local_attention_case("no_biases", qkv_bias=False, proj_bias=False),
    local_attention_case("no_projection", norm="group", attn_bias=True, **_BARE),
    local_attention_case(
        "statistics_without_projection",
        grid=(5, 6),
        window=4,
        norm="group",
        pad="mask",
        proj=False,
        return_statistics=True,
    ),
    local_attention_case(
        "statistics_of_a_window_cut_off",
        grid=(3, 18),
        window=16,
        heads=1,
        pad="mask",
        proj=False,
        return_statistics=True,
    ),
    local_attention_case("fp32_residual", residual_dtype=torch.float32, return_statistics=True),
    local_attention_case("fp32_residual_only", form="packed", proj=False, residual_dtype=torch.float32),
    local_attention_case("large_scores", form="packed", grid=(8, 4), window=4, score_scale=60.0),
    local_attention_case("many_windows", batch=1, grid=(28, 21), window=7, heads=1, width=32, form="packed", **_BARE),
    local_attention_case(
        "hat_net_small_stage_2",
        "published",
        batch=1,
        grid=(28, 28),
        window=7,
        heads=2,
        width=64,
        channels=128,
        norm="group",
        statistics=True,
        proj=False,
        return_statistics=True,
    ),
]


def _pointwise_mlp(
    maker: Maker,
    *,
    leading: tuple[int, ...] = (2, 9),
    channels: int = 16,
    hidden: int = 40,
    out: int | None = None,
    activation: str = "gelu",
    bias: bool = True,
    norm: bool = True,
    norm_affine: bool = True,
    residual: bool = True,
    residual_dtype: torch.dtype | None = None,
    spread: float = 2.0,
) -> Call:
    out = channels if out is None else out
    arguments: dict[str, Any] = {
        "x": maker.activation(*leading, channels, scale=1.5, shift=0.5),
        "weight1": maker.weight(hidden, channels, scale=spread),
        "bias1": maker.vector(hidden) if bias else None,
        "weight2": maker.weight(out, hidden),
        "bias2": maker.vector(out) if bias else None,
        "activation": activation,
    }
    if norm:
        arguments["norm_eps"] = 1e-5
        if norm_affine:
            arguments |= {"norm_weight": maker.positive(channels), "norm_bias": maker.vector(channels)}
    if residual:
        arguments["residual"] = maker.residual(*leading, out, dtype=residual_dtype)
    return Call(ops.pointwise_mlp, arguments)


def pointwise_mlp_case(name: str, *tags: str, **options: Any) -> Case:
    """A call of `pointwise_mlp` with these options of `_pointwise_mlp`."""
    return Case(name, lambda maker: _pointwise_mlp(maker, **options), frozenset(tags))


POINTWISE_MLP = [
    pointwise_mlp_case("gelu", "smallest"),
    pointwise_mlp_case("quick_gelu", "smallest", "inductor", activation="quick_gelu"),
    pointwise_mlp_case("empty_batch", "empty", leading=(0, 9)),
    pointwise_mlp_case("one_vector", leading=()),
    pointwise_mlp_case("one_row", leading=(1,), activation="quick_gelu"),
    pointwise_mlp_case("map", leading=(2, 3, 5)),
    pointwise_mlp_case("odd_hidden", channels=46, hidden=165),
    pointwise_mlp_case("odd_channels", channels=13, hidden=7, activation="quick_gelu"),
    pointwise_mlp_case("one_channel", channels=1, hidden=1, norm=False),
    pointwise_mlp_case("wide", leading=(3,), channels=80, hidden=328, out=200),
    pointwise_mlp_case("many_rows", leading=(2, 151), channels=32, hidden=64, activation="quick_gelu"),
    pointwise_mlp_case("other_out_width", out=23),
    pointwise_mlp_case("no_bias", bias=False),
    pointwise_mlp_case("no_norm", norm=False),
    pointwise_mlp_case("norm_without_affine", norm_affine=False, activation="quick_gelu"),
    pointwise_mlp_case("no_residual", residual=False),
    pointwise_mlp_case("bare", norm=False, bias=False, residual=False, activation="quick_gelu"),
    pointwise_mlp_case("fp32_residual", residual_dtype=torch.float32),
    pointwise_mlp_case("gelu_tails", channels=8, hidden=64, spread=30.0),
    pointwise_mlp_case("quick_gelu_tails", channels=8, hidden=64, spread=30.0, activation="quick_gelu"),
    pointwise_mlp_case("cvt_13_stage_3", "published", leading=(1, 197), channels=384, hidden=1536),
]


def _depthwise_mlp(
    maker: Maker,
    *,
    batch: int = 2,
    grid: tuple[int, int] = (5, 7),
    channels: int = 16,
    hidden: int = 40,
    out: int | None = None,
    kernel: int = 3,
    prefix: int = 0,
    activation: str = "gelu",
    hidden_activation: str | None = None,
    inner_residual: str | None = None,
    norm: str | None = "layer",
    norm_affine: bool = True,
    statistics: bool = False,
    bn: str = "",
    bn_after_activation: bool = False,
    bn_training: bool = False,
    bn_track: bool = True,
    bn_affine: bool = True,
    bias: bool = True,
    out_norm: bool = False,
    residual: bool = True,
    residual_dtype: torch.dtype | None = None,
    return_statistics: bool = False,
    return_mean: bool = False,
) -> Call:
    """`bn` names the batch norms that are there by their digits."""
    out = out or channels
    tokens = prefix + grid[0] * grid[1]
    arguments: dict[str, Any] = {
        "x": maker.activation(batch, tokens, channels, scale=1.5, shift=0.5),
        "fc1_weight": maker.weight(hidden, channels, scale=1.5),
        "fc1_bias": maker.vector(hidden) if bias else None,
        "dw_weight": maker.weight(hidden, 1, kernel, kernel),
        "dw_bias": maker.vector(hidden) if bias else None,
        "fc2_weight": maker.weight(out, hidden),
        "fc2_bias": maker.vector(out) if bias else None,
        "grid": grid,
        "activation": activation,
        "hidden_activation": hidden_activation,
        "inner_residual": inner_residual,
        "num_prefix_tokens": prefix,
        "bn_after_activation": bn_after_activation,
        "return_statistics": return_statistics,
        "return_mean": return_mean,
    }
    if norm:
        arguments |= {"norm": norm, "norm_eps": 1e-3}
        if norm_affine:
            arguments |= {"norm_weight": maker.positive(channels), "norm_bias": maker.vector(channels)}
    if statistics:
        arguments["norm_statistics"] = maker.statistics(batch)
    for digit in bn:
        width = out if digit == "3" else hidden
        arguments[f"bn{digit}"] = BatchNorm(
            maker.positive(width) if bn_affine else None,
            maker.vector(width) if bn_affine else None,
            maker.vector(width) if bn_track else None,
            maker.positive(width) if bn_track else None,
            training=bn_training,
        )
    if out_norm:
        arguments |= {"out_norm_weight": maker.positive(out), "out_norm_bias": maker.vector(out), "out_norm_eps": 1e-3}
    if residual:
        arguments["residual"] = maker.residual(batch, tokens, out, dtype=residual_dtype)
    return Call(ops.depthwise_mlp, arguments)


def depthwise_mlp_case(name: str, *tags: str, vanishing: Sequence[str] = (), **options: Any) -> Case:
    """A call of `depthwise_mlp` with these options of `_depthwise_mlp`."""
    return Case(name, lambda maker: _depthwise_mlp(maker, **options), frozenset(tags), frozenset(vanishing))


_IRFFN: dict[str, Any] = {
    "hidden_activation": "gelu",
    "inner_residual": "before_activation",
    "bn": "123",
    "bn_after_activation": True,
}
_DAFF: dict[str, Any] = {
    "hidden_activation": "gelu",
    "inner_residual": "after_activation",
    "bn": "123",
    "prefix": 1,
    "return_mean": True,
}
_HAT: dict[str, Any] = {
    "activation": "silu",
    "hidden_activation": "silu",
    "norm": "group",
    "bias": False,
    "out_norm": True,
}

DEPTHWISE_MLP = [
    depthwise_mlp_case("mix_ffn", "smallest", "inductor"),
    depthwise_mlp_case("mix_ffn_relu", hidden_activation="relu"),
    depthwise_mlp_case("irffn", "smallest", **_IRFFN),
    depthwise_mlp_case("daff", **_DAFF),
    depthwise_mlp_case("hat", return_statistics=True, **_HAT),
    depthwise_mlp_case("hat_given_statistics", statistics=True, kernel=5, **_HAT),
    depthwise_mlp_case("mbconv", norm=None, hidden_activation="gelu", bn="123"),
    depthwise_mlp_case("empty_batch", "empty", batch=0),
    depthwise_mlp_case("one_image", batch=1),
    depthwise_mlp_case("one_pixel", batch=1, grid=(1, 1)),
    depthwise_mlp_case("one_row", grid=(1, 9)),
    depthwise_mlp_case("one_column", grid=(9, 1)),
    depthwise_mlp_case("odd_hidden", hidden=165, channels=23, **_IRFFN),
    depthwise_mlp_case("odder_hidden", hidden=331, grid=(3, 3)),
    # One small map with many hidden channels: the CPU kernels share those out.
    depthwise_mlp_case("shared_channels", batch=1, grid=(3, 4), hidden=260, **_DAFF),
    depthwise_mlp_case("shared_between_norms", batch=1, grid=(3, 4), hidden=256, return_statistics=True, **_HAT),
    depthwise_mlp_case("wide_filter", kernel=5, grid=(6, 4)),
    depthwise_mlp_case("wider_filter", kernel=7, grid=(5, 5), hidden_activation="quick_gelu"),
    depthwise_mlp_case("pointwise_filter", kernel=1, activation="relu"),
    depthwise_mlp_case("prefix", prefix=2, return_statistics=True, norm="group"),
    depthwise_mlp_case("prefix_without_residual", prefix=1, residual=False),
    depthwise_mlp_case("other_out_width", out=9, residual=False, return_mean=True),
    depthwise_mlp_case("bare", norm=None, bias=False, residual=False, activation="quick_gelu"),
    depthwise_mlp_case("norm_without_affine", norm_affine=False),
    depthwise_mlp_case("bn_without_affine", bn="12", bn_affine=False),
    depthwise_mlp_case("bn_between", bn="2", inner_residual="before_activation"),
    depthwise_mlp_case("mean_behind_norm", out_norm=True, return_mean=True),
    depthwise_mlp_case("fp32_residual", residual_dtype=torch.float32),
    depthwise_mlp_case("pvt_v2_b2_stage_3", "published", batch=1, grid=(14, 14), channels=320, hidden=1280),
    depthwise_mlp_case("dhvt_small", "published", batch=1, grid=(14, 14), channels=384, hidden=1536, **_DAFF),
    depthwise_mlp_case("hat_net_large", "published", batch=1, grid=(7, 7), channels=640, hidden=2560, **_HAT),
]


# A bias right in front of batch statistics has no effect.
DEPTHWISE_MLP_TRAINING = [
    depthwise_mlp_case(
        *("irffn_training", "smallest", "inductor"),
        vanishing=["fc2_bias", "bn2.bias"],
        bn_training=True,
        **_IRFFN,
    ),
    depthwise_mlp_case(
        "daff_training",
        vanishing=["norm_bias", "fc1_bias", "dw_bias", "fc2_bias"],
        bn_training=True,
        bn_track=False,
        **_DAFF,
    ),
]


def _depthwise_conv(
    maker: Maker,
    *,
    batch: int = 2,
    grid: tuple[int, int] = (5, 7),
    channels: int = 24,
    kernel: int = 3,
    stride: int = 1,
    padding: int = 1,
    bias: bool = True,
    norm: bool = False,
    norm_affine: bool = True,
    bn: bool = False,
    bn_affine: bool = True,
    bn_training: bool = False,
    bn_track: bool = True,
    residual: bool = False,
    residual_dtype: torch.dtype | None = None,
) -> Call:
    arguments: dict[str, Any] = {
        "x": maker.activation(batch, grid[0] * grid[1], channels, scale=1.5, shift=0.5),
        "weight": maker.weight(channels, 1, kernel, kernel),
        "bias": maker.vector(channels) if bias else None,
        "grid": grid,
        "stride": stride,
        "padding": padding,
    }
    if norm:
        arguments["norm_eps"] = 1e-3
        if norm_affine:
            arguments |= {"norm_weight": maker.positive(channels), "norm_bias": maker.vector(channels)}
    if bn:
        arguments["bn"] = BatchNorm(
            maker.positive(channels) if bn_affine else None,
            maker.vector(channels) if bn_affine else None,
            maker.vector(channels) if bn_track else None,
            maker.positive(channels) if bn_track else None,
            training=bn_training,
        )
    if residual:
        height, width = ((size + 2 * padding - kernel) // stride + 1 for size in grid)
        arguments["residual"] = maker.residual(batch, height * width, channels, dtype=residual_dtype)
    return Call(ops.depthwise_conv, arguments)


def depthwise_conv_case(name: str, *tags: str, vanishing: Sequence[str] = (), **options: Any) -> Case:
    """A call of `depthwise_conv` with these options of `_depthwise_conv`."""
    return Case(name, lambda maker: _depthwise_conv(maker, **options), frozenset(tags), frozenset(vanishing))


_REDUCTION: dict[str, Any] = {"kernel": 2, "stride": 2, "padding": 0, "norm": True, "bn": True}

DEPTHWISE_CONV = [
    depthwise_conv_case("local_perception", "smallest", "inductor", residual=True),
    depthwise_conv_case("reduction", "smallest", **_REDUCTION),
    depthwise_conv_case("plain"),
    depthwise_conv_case("everything", norm=True, bn=True, residual=True),
    depthwise_conv_case("empty_batch", "empty", batch=0, norm=True, residual=True),
    depthwise_conv_case("one_image", batch=1, residual=True),
    depthwise_conv_case("one_pixel", batch=1, grid=(1, 1), norm=True, residual=True),
    depthwise_conv_case("one_row", grid=(1, 9), norm=True),
    depthwise_conv_case("one_column", grid=(9, 1), residual=True),
    depthwise_conv_case("one_channel", channels=1, bn=True),
    depthwise_conv_case("few_channels", channels=3, residual=True),
    depthwise_conv_case("odd_channels", channels=46, norm=True, residual=True),
    depthwise_conv_case("odder_channels", channels=37, bn=True),
    depthwise_conv_case("many_rows", batch=3, grid=(30, 17), channels=17, residual=True),
    depthwise_conv_case("many_channels", batch=1, grid=(7, 6), channels=136, norm=True),
    depthwise_conv_case("kernel_1", kernel=1, padding=0, norm=True),
    depthwise_conv_case("kernel_5", kernel=5, padding=2, grid=(9, 4), residual=True),
    depthwise_conv_case("kernel_7", kernel=7, padding=3, grid=(6, 9), norm=True),
    depthwise_conv_case("kernel_beyond_the_map", kernel=7, padding=3, grid=(2, 3), residual=True),
    depthwise_conv_case(
        "reduction_by_8", kernel=8, stride=8, padding=0, grid=(16, 24), channels=20, norm=True, bn=True
    ),
    depthwise_conv_case("unread_border", kernel=4, stride=4, padding=0, grid=(9, 11), norm=True),
    depthwise_conv_case("skipped_pixels", kernel=2, stride=3, padding=0, grid=(9, 8), residual=True),
    depthwise_conv_case("strided_overlap", stride=2, grid=(8, 9), norm=True, bn=True),
    depthwise_conv_case("no_padding", padding=0, residual=True),
    depthwise_conv_case("wide_padding", padding=4, grid=(3, 4), norm=True, bn=True),
    depthwise_conv_case("far_beyond", batch=1, grid=(2, 3), stride=70, padding=70, residual=True),
    depthwise_conv_case("no_bias", bias=False, residual=True),
    depthwise_conv_case("norm_without_affine", norm=True, norm_affine=False),
    depthwise_conv_case("bn_without_affine", bn=True, bn_affine=False),
    depthwise_conv_case("fp32_residual", residual=True, residual_dtype=torch.float32),
    depthwise_conv_case("cmt_s_stage_1_reduction", "published", batch=1, grid=(56, 56), channels=64, **_REDUCTION),
    depthwise_conv_case("cmt_s_stage_3", "published", batch=1, grid=(14, 14), channels=256, residual=True),
]

# Batch statistics undo what a bias in front of them does, and without padding the norm's weight and bias as well.
DEPTHWISE_CONV_TRAINING = [
    depthwise_conv_case(
        "reduction_training",
        "smallest",
        "inductor",
        vanishing=["bias"],
        bn_training=True,
        **{**_REDUCTION, "norm": False},
    ),
    depthwise_conv_case("training_untracked", vanishing=["bias"], bn=True, bn_training=True, bn_track=False, norm=True),
    depthwise_conv_case("training_beside_a_residual", vanishing=["bias"], bn=True, bn_training=True, residual=True),
]


def _patch_embedding(
    maker: Maker,
    *,
    batch: int = 2,
    size: tuple[int, int] = (9, 11),
    channels: int = 6,
    out: int = 16,
    kernel: int = 3,
    stride: int = 2,
    padding: int = 1,
    bias: bool = True,
    norm: bool = True,
    norm_affine: bool = True,
    in_norm: bool = False,
    activation: str | None = None,
    bn: bool = False,
    bn_after_activation: bool = False,
    bn_affine: bool = True,
    bn_training: bool = False,
    scales: Sequence[str] = (),
    layout: torch.memory_format = torch.channels_last,
) -> Call:
    arguments: dict[str, Any] = {
        "x": maker.activation(batch, channels, *size, scale=1.5, shift=0.5).to(memory_format=layout),
        "weight": maker.weight(out, channels, kernel, kernel),
        "bias": maker.vector(out) if bias else None,
        "stride": stride,
        "padding": padding,
    }
    if norm:
        arguments["norm_eps"] = 1e-5
        if norm_affine:
            arguments |= {"norm_weight": maker.positive(out), "norm_bias": maker.vector(out)}
    if in_norm:
        arguments["in_norm_eps"] = 1e-3
        if norm_affine:
            arguments |= {"in_norm_weight": maker.positive(channels), "in_norm_bias": maker.vector(channels)}
    if activation:
        arguments["activation"] = activation
    if bn:
        arguments["bn_after_activation"] = bn_after_activation
        arguments["bn"] = BatchNorm(
            maker.positive(out) if bn_affine else None,
            maker.vector(out) if bn_affine else None,
            maker.vector(out),
            maker.positive(out),
            training=bn_training,
        )
    for name in scales:
        width = channels if name.startswith("in_") else out
        arguments[name] = maker.positive(width) if name.endswith("scale") else maker.vector(width)
    return Call(ops.patch_embedding, arguments)


def patch_embedding_case(name: str, *tags: str, vanishing: Sequence[str] = (), **options: Any) -> Case:
    """A call of `patch_embedding` with these options of `_patch_embedding`."""
    return Case(name, lambda maker: _patch_embedding(maker, **options), frozenset(tags), frozenset(vanishing))


_CMT_STEM: dict[str, Any] = {"activation": "gelu", "bn": True, "bn_after_activation": True, "norm": False}
_SCALES = ("in_scale", "in_shift", "out_scale", "out_shift")
_DHVT_STEM: dict[str, Any] = {"activation": "gelu", "bn": True, "bias": False, "norm": False}


PATCH_EMBEDDING = [
    patch_embedding_case("plain", "smallest", "inductor", "map"),
    patch_embedding_case("stem", "smallest", channels=3, kernel=7, stride=4, padding=2),
    patch_embedding_case("contiguous", "map", layout=torch.contiguous_format),
    patch_embedding_case("empty_batch", "empty", batch=0),
    patch_embedding_case("one_pixel", batch=1, size=(1, 1)),
    patch_embedding_case("one_row", size=(1, 9)),
    patch_embedding_case("one_column", size=(9, 1)),
    patch_embedding_case("odd_channels", channels=5, out=13),
    patch_embedding_case("one_channel", channels=1, out=1, norm=False),
    patch_embedding_case("many_channels", batch=1, size=(7, 6), channels=72, out=136),
    patch_embedding_case("many_pixels", size=(33, 30), channels=3, out=24),
    patch_embedding_case("patches", kernel=2, stride=2, padding=0, size=(8, 10)),
    patch_embedding_case("unread_border", kernel=2, stride=3, padding=0),
    patch_embedding_case("stride_1", kernel=5, stride=1, padding=2),
    patch_embedding_case("wide_padding", kernel=3, padding=2),
    patch_embedding_case("whole_panels", batch=1, size=(16, 8), channels=32, out=9, kernel=8, stride=8, padding=0),
    patch_embedding_case("linear", kernel=1, stride=1, padding=0),
    patch_embedding_case("padding_beyond_the_filter", kernel=1, stride=16, padding=16, channels=64, out=8),
    patch_embedding_case("far_beyond", batch=1, size=(2, 3), kernel=3, stride=70, padding=70),
    patch_embedding_case("no_bias", bias=False),
    patch_embedding_case("no_norm", norm=False),
    patch_embedding_case("norm_without_affine", norm_affine=False),
    patch_embedding_case("bare", norm=False, bias=False),
    patch_embedding_case("both_norms", "smallest", in_norm=True, kernel=2, stride=2, padding=0),
    patch_embedding_case("padded_norm", in_norm=True, norm=False, padding=2),
    patch_embedding_case("in_norm_without_affine", in_norm=True, norm_affine=False, channels=17),
    patch_embedding_case("bn_behind_the_activation", "smallest", **_CMT_STEM),
    patch_embedding_case("bn_in_front_of_the_activation", "smallest", **_DHVT_STEM),
    patch_embedding_case("bn_alone", bn=True, norm=False, channels=5, out=13),
    patch_embedding_case("bn_without_affine", bn=True, bn_affine=False, activation="relu", out=37),
    patch_embedding_case("activation_alone", activation="silu", norm=False, out=3, kernel=5, padding=2),
    patch_embedding_case("all_norms", activation="quick_gelu", bn=True, in_norm=True, out=40),
    patch_embedding_case("scales_around", "smallest", channels=3, scales=_SCALES, **_DHVT_STEM),
    patch_embedding_case("scales_in_place_of_norms", scales=_SCALES, norm=False, size=(9, 21), channels=17, out=37),
    patch_embedding_case("scales_of_a_linear", scales=_SCALES, norm=False, kernel=1, stride=1, padding=0),
    patch_embedding_case("scale_alone", scales=["in_scale"], channels=5),
    patch_embedding_case("shift_alone", scales=["in_shift", "out_shift"], norm=False, kernel=2, padding=0),
    patch_embedding_case("scale_behind_a_bn", scales=["out_scale", "out_shift"], out=13, **_CMT_STEM),
    patch_embedding_case("overlapping_in_norm", in_norm=True, batch=3, size=(13, 10), channels=20, padding=2),
    patch_embedding_case("many_rows", channels=3, out=5, size=(31, 24), kernel=7, stride=4, padding=3, norm=False),
    patch_embedding_case("filter_within_its_stride", channels=3, kernel=2, stride=5, size=(21, 22), in_norm=True),
    patch_embedding_case(
        "cvt_13_stage_1", "published", batch=1, size=(224, 224), channels=3, out=64, kernel=7, stride=4, padding=2
    ),
    patch_embedding_case("cvt_13_stage_3", "published", batch=1, size=(28, 28), channels=192, out=384),
]


def _head_tokens(
    maker: Maker,
    *,
    batch: int = 2,
    tokens: int = 7,
    channels: int = 24,
    heads: int = 3,
    bias: bool = True,
    norm: bool = True,
    norm_affine: bool = True,
    head_norm_affine: bool = True,
) -> Call:
    width = channels // heads
    arguments: dict[str, Any] = {
        "x": maker.activation(batch, tokens, channels, scale=1.5, shift=0.5),
        "weight": maker.weight(channels, width, scale=2.0),
        "bias": maker.vector(channels) if bias else None,
        "pos_embed": maker.vector(heads, channels),
        "num_heads": heads,
        "head_norm_eps": 1e-3,
    }
    if norm:
        arguments["norm_eps"] = 1e-5
        if norm_affine:
            arguments |= {"norm_weight": maker.positive(channels), "norm_bias": maker.vector(channels)}
    if head_norm_affine:
        arguments |= {"head_norm_weight": maker.positive(width), "head_norm_bias": maker.vector(width)}
    return Call(ops.head_tokens, arguments)


def head_tokens_case(name: str, *tags: str, vanishing: Sequence[str] = (), **options: Any) -> Case:
    """A call of `head_tokens` with these options of `_head_tokens`."""
    return Case(name, lambda maker: _head_tokens(maker, **options), frozenset(tags), frozenset(vanishing))


HEAD_TOKENS = [
    head_tokens_case("plain", "smallest", "inductor"),
    head_tokens_case("no_norm", "smallest", norm=False),
    head_tokens_case("empty_batch", "empty", batch=0),
    head_tokens_case("one_token", batch=1, tokens=1),
    head_tokens_case("many_tokens", batch=1, tokens=83),
    head_tokens_case("one_head", heads=1),
    head_tokens_case("odd_width", channels=39, heads=3),
    head_tokens_case("narrow_heads", channels=22, heads=11, head_norm_affine=False),
    head_tokens_case("no_bias", bias=False),
    head_tokens_case("norms_without_affine", norm_affine=False, head_norm_affine=False),
    head_tokens_case("dhvt_tiny_cifar", "published", batch=1, tokens=65, channels=192, heads=4),
]


def _merge_head_tokens(
    maker: Maker,
    *,
    batch: int = 2,
    tokens: int = 7,
    channels: int = 24,
    heads: int = 3,
    residual: bool = True,
    residual_dtype: torch.dtype | None = None,
) -> Call:
    arguments: dict[str, Any] = {"x": maker.activation(batch, tokens + heads, channels), "num_heads": heads}
    if residual:
        arguments["residual"] = maker.residual(batch, tokens, channels, dtype=residual_dtype)
    return Call(ops.merge_head_tokens, arguments)


def merge_head_tokens_case(name: str, *tags: str, **options: Any) -> Case:
    """A call of `merge_head_tokens` with these options of `_merge_head_tokens`."""
    return Case(name, lambda maker: _merge_head_tokens(maker, **options), frozenset(tags))


MERGE_HEAD_TOKENS = [
    merge_head_tokens_case("plain", "smallest", "inductor"),
    merge_head_tokens_case("no_residual", residual=False),
    merge_head_tokens_case("empty_batch", "empty", batch=0),
    merge_head_tokens_case("one_token", batch=1, tokens=1),
    merge_head_tokens_case("many_tokens", batch=1, tokens=83, channels=21),
    merge_head_tokens_case("one_head", heads=1),
    merge_head_tokens_case("fp32_residual", residual_dtype=torch.float32),
    merge_head_tokens_case("dhvt_tiny_cifar", "published", batch=1, tokens=65, channels=192, heads=4),
]


def _pooled_projection(
    maker: Maker,
    *,
    batch: int = 2,
    grid: tuple[int, int] = (6, 8),
    channels: int = 24,
    out: int = 40,
    kernel: int = 2,
    ceil_mode: bool = False,
    bias: bool = True,
    in_norm: bool = True,
    norm: bool = True,
    norm_affine: bool = True,
    statistics: bool = True,
) -> Call:
    arguments: dict[str, Any] = {
        "x": maker.activation(batch, grid[0] * grid[1], channels, scale=1.5, shift=0.5),
        "weight": maker.weight(out, channels),
        "bias": maker.vector(out) if bias else None,
        "grid": grid,
        "kernel_size": kernel,
        "ceil_mode": ceil_mode,
    }
    for name, wanted, eps in (("in_norm", in_norm, 1e-3), ("norm", norm, 1e-5)):
        if wanted:
            arguments[f"{name}_eps"] = eps
            if norm_affine:
                arguments |= {f"{name}_weight": maker.positive(channels), f"{name}_bias": maker.vector(channels)}
    if in_norm and statistics:
        arguments["in_norm_statistics"] = maker.statistics(batch)
    return Call(ops.pooled_projection, arguments)


def pooled_projection_case(name: str, *tags: str, **options: Any) -> Case:
    """A call of `pooled_projection` with these options of `_pooled_projection`."""
    return Case(name, lambda maker: _pooled_projection(maker, **options), frozenset(tags))


POOLED_PROJECTION = [
    pooled_projection_case("plain", "smallest", "inductor"),
    pooled_projection_case("own_statistics", "smallest", statistics=False),
    pooled_projection_case("empty_batch", "empty", batch=0),
    pooled_projection_case("one_square", batch=1, grid=(3, 3), kernel=3),
    pooled_projection_case("one_pixel", batch=1, grid=(1, 1), kernel=1, norm=False),
    pooled_projection_case("unread_border", grid=(7, 9), kernel=4),
    pooled_projection_case("ceil_mode", "smallest", grid=(7, 9), kernel=4, ceil_mode=True),
    pooled_projection_case("larger_than_the_map", grid=(3, 5), kernel=8, ceil_mode=True),
    pooled_projection_case("no_pooling", kernel=1),
    pooled_projection_case("odd_channels", channels=13, out=7),
    pooled_projection_case("one_channel", channels=1, out=1, norm=False),
    pooled_projection_case("many_channels", batch=1, grid=(4, 6), channels=165, out=331),
    pooled_projection_case("many_squares", grid=(34, 30), kernel=2, channels=8, out=16),
    pooled_projection_case("no_bias", bias=False),
    pooled_projection_case("no_in_norm", in_norm=False),
    pooled_projection_case("no_norm", norm=False),
    pooled_projection_case("norms_without_affine", norm_affine=False, statistics=False),
    pooled_projection_case("bare", in_norm=False, norm=False, bias=False),
    pooled_projection_case(
        "hat_net_small_stage_2", "published", batch=1, grid=(28, 28), channels=128, out=256, kernel=4
    ),
]

# A bias right in front of batch statistics has no effect.
PATCH_EMBEDDING_TRAINING = [
    patch_embedding_case("cmt_stem_training", "smallest", "inductor", bn_training=True, **_CMT_STEM),
    patch_embedding_case("dhvt_stem_training", bn_training=True, **_DHVT_STEM),
    patch_embedding_case("bn_alone_training", vanishing=["bias"], bn=True, norm=False, bn_training=True),
]


def _batch_norm_act(
    maker: Maker,
    *,
    batch: int = 2,
    tokens: int = 35,
    channels: int = 24,
    activation: str | None = "gelu",
    after: bool = False,
    affine: bool = True,
    training: bool = False,
    track: bool = True,
) -> Call:
    bn = BatchNorm(
        maker.positive(channels) if affine else None,
        maker.vector(channels) if affine else None,
        maker.vector(channels) if track else None,
        maker.positive(channels) if track else None,
        training=training,
    )
    x = maker.activation(batch, tokens, channels, scale=1.5, shift=0.5)
    return Call(ops.batch_norm_act, {"x": x, "bn": bn, "activation": activation, "bn_after_activation": after})


def batch_norm_act_case(name: str, *tags: str, **options: Any) -> Case:
    """A call of `batch_norm_act` with these options of `_batch_norm_act`."""
    return Case(name, lambda maker: _batch_norm_act(maker, **options), frozenset(tags))


BATCH_NORM_ACT = [
    batch_norm_act_case("norm_first", "smallest", "inductor"),
    batch_norm_act_case("activation_first", "smallest", after=True),
    batch_norm_act_case("norm_alone", activation=None),
    batch_norm_act_case("empty_batch", "empty", batch=0),
    batch_norm_act_case("one_row", batch=1, tokens=1, channels=37, activation="silu"),
    batch_norm_act_case("many_rows", batch=3, tokens=271, channels=5, activation="relu"),
    batch_norm_act_case("odd_channels", channels=46, activation="quick_gelu", after=True),
    batch_norm_act_case("without_affine", channels=1, affine=False, activation="silu", after=True),
    batch_norm_act_case("dhvt_tiny_stem", "published", batch=1, tokens=56 * 56, channels=48),
]
BATCH_NORM_ACT_TRAINING = [
    batch_norm_act_case("norm_first_training", "smallest", "inductor", training=True),
    batch_norm_act_case("activation_first_training", "smallest", training=True, after=True),
    batch_norm_act_case("norm_alone_training", activation=None, training=True, channels=37),
    batch_norm_act_case("untracked", training=True, track=False, activation="silu", after=True, channels=5),
    batch_norm_act_case("many_rows_training", batch=3, tokens=271, channels=17, training=True, affine=False),
    batch_norm_act_case("relu_training", batch=1, tokens=512, training=True, activation="relu"),
]

CASES = {
    "batch_norm_act": BATCH_NORM_ACT,
    "conv_projection": CONV_PROJECTION,
    "depthwise_conv": DEPTHWISE_CONV,
    "depthwise_mlp": DEPTHWISE_MLP,
    "global_attention": GLOBAL_ATTENTION,
    "head_tokens": HEAD_TOKENS,
    "local_attention": LOCAL_ATTENTION,
    "merge_head_tokens": MERGE_HEAD_TOKENS,
    "patch_embedding": PATCH_EMBEDDING,
    "pointwise_mlp": POINTWISE_MLP,
    "pooled_projection": POOLED_PROJECTION,
}


def tagged(cases: Sequence[Case], *tags: str) -> list[Case]:
    """The cases that carry one of these tags."""
    return [case for case in cases if case.tags.intersection(tags)]


def _slice(t: Tensor) -> Tensor:
    """Every second element of a larger tensor's last axis."""
    larger = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"))
    larger[..., ::2] = t
    return larger[..., ::2]


def _rows(t: Tensor) -> Tensor:
    """A slice of longer rows: the last axis is dense, the rows are not."""
    larger = t.new_full((*t.shape[:-1], t.shape[-1] + 3), float("nan"))
    larger[..., 1:-2] = t
    return larger[..., 1:-2]


def _transpose(t: Tensor) -> Tensor:
    """The axes stored in reverse order."""
    order = list(range(t.ndim))[::-1]
    return t.permute(order).contiguous().permute(order)


def _offset(t: Tensor) -> Tensor:
    """Dense, but starting where no vector load expects it."""
    larger = t.new_full((t.numel() + 1,), float("nan"))
    larger[1:] = t.flatten()
    return larger[1:].view(t.shape)


def _expand(t: Tensor) -> Tensor:
    """The first sample or filter, repeated with stride 0.

    Vectors and matrices stay as they are: with equal rows a whole result would hang on one rounding.
    """
    return t[:1].expand(t.shape) if t.ndim > 2 else t


def _negative(t: Tensor) -> Tensor:
    """The opposite in memory, and a note that the sign is to be changed on reading, as `z.conj().imag` has it."""
    return torch._neg_view(-t)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "slice": _slice,
    "rows": _rows,
    "transpose": _transpose,
    "offset": _offset,
    "expand": _expand,
    "negative": _negative,
}
# Row-major where the tensor was.
DENSE_LAYOUTS = ("offset", "negative")
