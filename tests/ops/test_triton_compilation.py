"""Every Triton kernel at published sizes, compiled for GPUs that need not be there."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, NamedTuple

import pytest
import torch

from fastvit_kernels.ops.conv_projection import triton as conv_projection
from fastvit_kernels.ops.conv_projection.reference import Static as ConvProjectionStatic
from fastvit_kernels.ops.depthwise_mlp import triton as depthwise_mlp
from fastvit_kernels.ops.depthwise_mlp.reference import Static as DepthwiseMLPStatic
from fastvit_kernels.ops.global_attention import triton as global_attention
from fastvit_kernels.ops.global_attention.reference import Static as GlobalAttentionStatic
from fastvit_kernels.ops.local_attention import triton as local_attention
from fastvit_kernels.ops.local_attention.reference import Static as LocalAttentionStatic
from fastvit_kernels.ops.patch_embedding import triton as patch_embedding
from fastvit_kernels.ops.patch_embedding.reference import Static as PatchEmbeddingStatic
from fastvit_kernels.ops.pointwise_mlp import triton as pointwise_mlp
from fastvit_kernels.ops.pointwise_mlp.reference import Static as PointwiseMLPStatic
from fastvit_kernels.testing.triton_aot import REGISTERS, SHARED_MEMORY, Compiled, compile_launches, compiling_process


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
PRECISIONS = {
    "float32": Precision(torch.float32, torch.float32, torch.float32),
    "bfloat16": Precision(torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "autocast-bfloat16": Precision(torch.float32, torch.float32, torch.bfloat16),
    "autocast-float16": Precision(torch.float32, torch.float32, torch.float16),
}


def make_conv_projection(stage: Stage, precision: Precision) -> Callable[[], object]:
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
    return lambda: conv_projection.launch(tensors, static)


def make_global_attention(stage: Stage, precision: Precision) -> Callable[[], object]:
    x, parameter = _makers(precision)
    channels, tokens = stage.channels, stage.prefix + stage.height * stage.width
    pooled = stage.prefix + -(-stage.height // 2) * -(-stage.width // 2)
    queries, keys = (
        torch.empty((stage.batch, n, channels), dtype=precision.products, device="meta") for n in (tokens, pooled)
    )
    residual = x(stage.batch, tokens, channels)
    tensors = [queries, keys, keys, parameter(channels, channels), parameter(channels), *[None] * 6, residual]
    static = GlobalAttentionStatic(stage.heads, channels**-0.5, "none", 0.0, False, False, precision.products)
    return lambda: global_attention.launch(tensors, static)


def make_query_attention(stage: Stage, precision: Precision) -> Callable[[], object]:
    """HAT-Net's second step: a norm by given statistics, 49 keys beside their values, a bias table, statistics."""
    x, parameter = _makers(precision)
    channels, tokens = stage.channels, stage.height * stage.width
    keys = torch.empty((stage.batch, 49, 2 * channels), dtype=precision.products, device="meta")
    queries, statistics = x(stage.batch, tokens, channels), torch.empty((stage.batch, 2), device="meta")
    linear = [parameter(channels, channels), parameter(channels)]
    weights = [*linear, parameter(channels), parameter(channels), *linear, parameter(stage.heads, tokens, 49)]
    tensors = [queries, keys, None, *weights, statistics, queries]
    static = GlobalAttentionStatic(stage.heads, 0.125, "group", 1e-6, True, True, precision.products)
    return lambda: global_attention.launch(tensors, static)


def make_local_attention(stage: Stage, precision: Precision) -> Callable[[], object]:
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
    return lambda: local_attention.launch(tensors, static)


def make_patch_embedding(stage: Stage, precision: Precision) -> Callable[[], object]:
    """To a stage of twice the channels, between two norms."""
    x, parameter = _makers(precision)
    channels, out = stage.channels, 2 * stage.channels
    weights = [parameter(out, channels, stage.kernel, stage.kernel), *(parameter(out) for _ in range(3))]
    tensors = [x(stage.batch, stage.height, stage.width, channels), *weights, parameter(channels), parameter(channels)]
    static = PatchEmbeddingStatic(1e-5, 1e-5, 2, stage.kernel // 2, precision.products, precision.activations)
    return lambda: patch_embedding.launch(tensors, static)


def make_stem(stage: Stage, precision: Precision) -> Callable[[], object]:
    """From an image, channels first, to the stage."""
    x, parameter = _makers(precision)
    image = x(stage.batch, 3, 4 * stage.height, 4 * stage.width).permute(0, 2, 3, 1)
    tensors = [image, parameter(stage.channels, 3, 7, 7), *(parameter(stage.channels) for _ in range(3)), None, None]
    static = PatchEmbeddingStatic(1e-5, None, 4, 2, precision.products, precision.activations)
    return lambda: patch_embedding.launch(tensors, static)


def make_pointwise_mlp(stage: Stage, precision: Precision) -> Callable[[], object]:
    x, parameter = _makers(precision)
    channels, hidden = stage.channels, int(stage.hidden_ratio * stage.channels)
    tokens = x(stage.batch, stage.prefix + stage.height * stage.width, channels)
    weights = [parameter(hidden, channels), parameter(hidden), parameter(channels, hidden), parameter(channels)]
    static = PointwiseMLPStatic(1e-5, "quick_gelu", precision.products)
    return lambda: pointwise_mlp.launch([tokens, parameter(channels), parameter(channels), *weights, tokens], static)


def make_depthwise_mlp(stage: Stage, precision: Precision) -> Callable[[], object]:
    """CMT's: three batch norms, two of them behind the activations, and an inner residual."""
    return _depthwise_mlp(stage, precision, "layer", "gelu", "gelu", "before_activation", True)


def make_daff(stage: Stage, precision: Precision) -> Callable[[], object]:
    """DHVT's: batch norms in front of the activations, the inner residual behind them, a mean over the pixels."""
    stage = stage._replace(prefix=1)
    return _depthwise_mlp(stage, precision, "layer", "gelu", "gelu", "after_activation", True, "mean")


def make_hat_mlp(stage: Stage, precision: Precision) -> Callable[[], object]:
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
) -> Callable[[], object]:
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
    return lambda: depthwise_mlp.launch(tensors, static)


def _makers(precision: Precision) -> tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]:
    def x(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=precision.activations, device="meta")

    def parameter(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=precision.parameters, device="meta")

    return x, parameter


OPERATORS = {
    "conv_projection": make_conv_projection,
    "depthwise_mlp": make_depthwise_mlp,
    "depthwise_mlp with a mean": make_daff,
    "depthwise_mlp between norms": make_hat_mlp,
    "global_attention": make_global_attention,
    "global_attention behind a norm": make_query_attention,
    "local_attention": make_local_attention,
    "patch_embedding": make_patch_embedding,
    "patch_embedding of images": make_stem,
    "pointwise_mlp": make_pointwise_mlp,
}

_OF_HAT_NET = ("depthwise_mlp between norms", "global_attention behind a norm", "local_attention")
STAGES = {operator: HAT_NET if operator in _OF_HAT_NET else CVT for operator in OPERATORS}
WITHOUT_PRODUCTS = ("prepare_kernel", "pack_kernel", "normalize_kernel", "moments_kernel", "merge_kernel")


def compile_for(operator: str, stage: Stage, precision: str, architecture: str) -> list[Compiled]:
    return compile_launches(OPERATORS[operator](stage, PRECISIONS[precision]), architecture)


def compile_with_tf32(*what: Any) -> list[Compiled]:
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        return compile_for(*what)
    finally:
        matmul.fp32_precision = before


@pytest.fixture(scope="module")
def process():
    with compiling_process() as pool:
        yield pool


def check_fits(kernel: Compiled, architecture: str) -> None:
    assert kernel.spilled == 0, kernel.name
    # Within what the smaller GPUs of the same generations have, too.
    assert kernel.shared <= min(SHARED_MEMORY[architecture], SHARED_MEMORY["sm_89"]), kernel.name
    assert kernel.registers * kernel.threads <= REGISTERS, kernel.name


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_published_sizes_fit_the_gpu(process: Executor, operator: str, precision: str, architecture: str) -> None:
    """No register is spilled, shared memory suffices, and tensor cores multiply bf16 and fp16."""
    # What fp16 and bf16 compile to differs in the names of instructions.
    for stage in STAGES[operator] if precision != "autocast-float16" else STAGES[operator][2:3]:
        for kernel in process.submit(compile_for, operator, stage, precision, architecture).result():
            check_fits(kernel, architecture)
            if precision != "float32" and kernel.name not in WITHOUT_PRODUCTS:
                instruction = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async"}[architecture]
                assert instruction in kernel.assembly, kernel.name


@pytest.mark.parametrize("operator", OPERATORS)
def test_awkward_widths_fit_the_gpu(process: Executor, operator: str) -> None:
    """Channels of CMT's smallest variant, which no vector load can read, and heads wider than 64."""
    stages = [Stage(46, 1, hidden_ratio=3.6)]
    if operator.endswith("_attention"):
        stages += [Stage(76, 1), Stage(128, 1), Stage(256, 1)]
    for stage in stages:
        for kernel in process.submit(compile_for, operator, stage, "bfloat16", "sm_80").result():
            check_fits(kernel, "sm_80")


@pytest.mark.parametrize("kernel", [5, 7])
def test_large_filters_fit_the_gpu(process: Executor, kernel: int) -> None:
    for precision in ("float32", "bfloat16"):
        stage = Stage(64, 1, kernel=kernel)
        for result in process.submit(compile_for, "depthwise_mlp", stage, precision, "sm_80").result():
            check_fits(result, "sm_80")


@pytest.mark.parametrize("pad", ["none", "mask", "zero"])
@pytest.mark.parametrize("window", [4, 7, 8, 14, 16])
def test_windows_fit_the_gpu(process: Executor, window: int, pad: str) -> None:
    for channels in (32, 46, 52, 64, 76, 96):
        stage = Stage(channels, 1, window=window, pad=pad)
        for precision in ("float32", "bfloat16"):
            for kernel in process.submit(compile_for, "local_attention", stage, precision, "sm_80").result():
                check_fits(kernel, "sm_80")


@pytest.mark.parametrize("operator", OPERATORS)
def test_one_compilation_serves_all_sizes(process: Executor, operator: str) -> None:
    """Neither the batch nor the resolution makes Triton compile again."""
    stage = Stage(192, 3)
    keys = {
        tuple(kernel.key for kernel in process.submit(compile_for, operator, size, "bfloat16", "sm_90").result())
        for size in (
            stage._replace(batch=1, height=28, width=28),
            stage._replace(batch=16, height=32, width=48),
            stage._replace(batch=3, height=31, width=24),
        )
    }
    assert len(keys) == 1


@pytest.mark.parametrize("operator", OPERATORS)
def test_compiles_for_amd(process: Executor, operator: str) -> None:
    for kernel in process.submit(compile_for, operator, STAGES[operator][2], "bfloat16", "gfx942").result():
        assert kernel.spilled == 0 and kernel.shared <= SHARED_MEMORY["gfx942"], kernel.name
        assert "v_mfma" in kernel.assembly or kernel.name in WITHOUT_PRODUCTS


def test_fp32_products_are_exact(process: Executor) -> None:
    for kernel in process.submit(compile_for, "pointwise_mlp", CVT[0], "float32", "sm_80").result():
        assert "mma.sync" not in kernel.assembly


@pytest.mark.parametrize("operator", OPERATORS)
def test_tf32_is_used_where_pytorch_may_use_it(process: Executor, operator: str) -> None:
    for kernel in process.submit(compile_with_tf32, operator, STAGES[operator][0], "float32", "sm_80").result():
        check_fits(kernel, "sm_80")
        assert "m16n8k8.row.col.f32.tf32" in kernel.assembly or kernel.name in WITHOUT_PRODUCTS


def test_an_interpreting_process_refuses() -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET: expected it to be unset"):
        compile_for("pointwise_mlp", CVT[0], "float32", "sm_80")
