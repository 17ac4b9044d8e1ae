"""Every Triton kernel at published sizes, compiled for GPUs that need not be there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import pytest
import torch
from triton_calls import CVT, GRADIENTS_OF_OTHERS, OPERATORS, PRECISIONS, STAGES, Stage, make_pyramid_attention
from triton_fits import check_fits, check_products
from triton_specs import WITH_PRODUCTS

from fastvit_kernels.testing.triton_aot import Compiled, Launch, compile_launches, compiling_process, launches

LAUNCHERS = {"forward": "launch", "backward": "launch_backward", "statistics": "launch_statistics"}
# Those with kernels for their gradients.
TRAINED = [
    operator
    for operator, make in OPERATORS.items()
    if hasattr(make(CVT[0], PRECISIONS["float32"]).bridge, "launch_backward") and operator not in GRADIENTS_OF_OTHERS
]
WITH_STATISTICS = [
    operator
    for operator, make in OPERATORS.items()
    if hasattr(make(CVT[0], PRECISIONS["float32"]).bridge, "launch_statistics")
]


def compile_for(operator: str, stage: Stage, precision: str, architecture: str) -> list[Compiled]:
    return compile_launches(OPERATORS[operator](stage, PRECISIONS[precision]).forward, architecture)


def compile_backward(operator: str, stage: Stage, precision: str, architecture: str) -> list[Compiled]:
    return compile_launches(OPERATORS[operator](stage, PRECISIONS[precision]).backward, architecture)


def compile_statistics(operator: str, stage: Stage, precision: str, architecture: str) -> list[Compiled]:
    return compile_launches(OPERATORS[operator](stage, PRECISIONS[precision]).statistics, architecture)


def compile_pyramid_attention(stage: Stage, precision: str, keys: int, table: bool) -> list[Compiled]:
    return compile_launches(make_pyramid_attention(stage, PRECISIONS[precision], keys, table).forward, "sm_80")


def compile_with_tf32(*what: Any) -> list[Compiled]:
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        return compile_for(*what)
    finally:
        matmul.fp32_precision = before


def launches_by_size(
    part: str, stage: Stage, sizes: Sequence[tuple[int, int, int]], operators: Sequence[str] = tuple(OPERATORS)
) -> dict[str, list[set[Launch]]]:
    """What each operator with such a part launches at batches, heights and widths; nothing is compiled."""
    found: dict[str, list[set[Launch]]] = {}
    for operator in operators:
        make = OPERATORS[operator]
        for batch, height, width in sizes:
            call = make(stage._replace(batch=batch, height=height, width=width), PRECISIONS["bfloat16"])
            if hasattr(call.bridge, LAUNCHERS[part]):
                found.setdefault(operator, []).append(set(launches(getattr(call, part), "sm_90")))
    return found


@pytest.fixture(scope="module")
def process():
    """With `TEST_TRITON` all tests here are of the Triton in that folder."""
    folder = os.environ.get("TEST_TRITON")
    with compiling_process(folder=None if folder is None else Path(folder)) as pool:
        yield pool


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_published_sizes_fit_the_gpu(process: Executor, operator: str, precision: str, architecture: str) -> None:
    """No register is spilled, shared memory suffices, and tensor cores multiply bf16 and fp16."""
    # fp16 at one stage only: the specs of every kernel are compiled in it, too.
    for stage in STAGES[operator] if precision != "autocast-float16" else STAGES[operator][2:3]:
        for kernel in process.submit(compile_for, operator, stage, precision, architecture).result():
            check_fits(kernel, architecture)
            if precision != "float32":
                check_products(kernel, architecture)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("operator", TRAINED)
def test_gradients_fit_the_gpu(process: Executor, operator: str, architecture: str) -> None:
    """As `test_published_sizes_fit_the_gpu`, at the smallest stage and a middle one."""
    smallest, _, middle, *_ = STAGES[operator]
    calls = {
        "sm_80": [(smallest, "float32"), (smallest, "autocast-bfloat16"), (middle, "bfloat16")],
        "sm_90": [(smallest, "bfloat16")],
    }
    for stage, precision in calls[architecture]:
        for kernel in process.submit(compile_backward, operator, stage, precision, architecture).result():
            check_fits(kernel, architecture)
            if precision != "float32":
                check_products(kernel, architecture)


@pytest.mark.parametrize("operator", OPERATORS)
def test_awkward_widths_fit_the_gpu(process: Executor, operator: str) -> None:
    """Channels of CMT's smallest variant, which no vector load can read, and heads wider than 64."""
    stages = [Stage(46, 1, hidden_ratio=3.6)]
    if operator.endswith("_attention"):
        stages += [Stage(76, 1), Stage(128, 1), Stage(256, 1)]
    for stage in stages:
        for kernel in process.submit(compile_for, operator, stage, "bfloat16", "sm_80").result():
            check_fits(kernel, "sm_80")


@pytest.mark.parametrize("operator", TRAINED)
def test_awkward_gradients_fit_the_gpu(process: Executor, operator: str) -> None:
    stages = [Stage(46, 1, hidden_ratio=3.6)]
    if operator.endswith("_attention"):
        stages += [Stage(76, 1), Stage(256, 1)]
    for stage in stages:
        for kernel in process.submit(compile_backward, operator, stage, "bfloat16", "sm_80").result():
            check_fits(kernel, "sm_80")


@pytest.mark.parametrize("operator", WITH_STATISTICS)
def test_statistics_fit_the_gpu(process: Executor, operator: str) -> None:
    for channels, architecture in ((192, "sm_80"), (46, "sm_80"), (64, "sm_90")):
        stage = Stage(channels, 1)
        for kernel in process.submit(compile_statistics, operator, stage, "bfloat16", architecture).result():
            check_fits(kernel, architecture)


@pytest.mark.parametrize(
    ("stage", "keys", "table"),
    [(Stage(64, 1), 49, False), (Stage(512, 8), 49, False), (Stage(512, 8), 49, True), (Stage(384, 8), 265, False)],
)
def test_projected_queries_fit_the_gpu(process: Executor, stage: Stage, keys: int, table: bool) -> None:
    """Those of PVTv2, CMT and DHVT."""
    for precision in ("float32", "bfloat16"):
        for kernel in process.submit(compile_pyramid_attention, stage, precision, keys, table).result():
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


def test_fp32_products_are_exact(process: Executor) -> None:
    for kernel in process.submit(compile_for, "pointwise_mlp", CVT[0], "float32", "sm_80").result():
        assert "mma.sync" not in kernel.assembly


@pytest.mark.parametrize("operator", OPERATORS)
def test_tf32_is_used_where_pytorch_may_use_it(process: Executor, operator: str) -> None:
    for kernel in process.submit(compile_with_tf32, operator, STAGES[operator][0], "float32", "sm_80").result():
        check_fits(kernel, "sm_80")
        assert "m16n8k8.row.col.f32.tf32" in kernel.assembly or kernel.name not in WITH_PRODUCTS


@pytest.mark.parametrize("channels", [192, 46, 76])
@pytest.mark.parametrize("part", ["forward", "backward", "statistics"])
def test_one_compilation_serves_all_sizes(process: Executor, part: str, channels: int) -> None:
    """Neither the batch nor the resolution makes Triton compile a kernel again, for as many keys as no block holds."""
    sizes = [(2, 28, 28), (16, 32, 48), (3, 31, 24), (4, 35, 17), (5, 56, 56), (8, 19, 21), (64, 20, 20)]
    found = process.submit(launches_by_size, part, Stage(channels, 1, hidden_ratio=3.6), sizes).result()
    assert set(found) >= {"conv_projection", "depthwise_mlp"}
    for operator, by_size in found.items():
        together = set().union(*by_size)
        for size, launched in zip(sizes, by_size, strict=True):
            # The smaller a call, the fewer of its sums are shared out.
            missing = {launch for launch in together - launched if launch.name != "sum_parts_kernel"}
            assert not missing, (operator, size, missing)


def test_few_rows_have_the_tiles_of_many(process: Executor) -> None:
    """The gradients of an attention of 9 queries or 4 keys are compiled like those of any."""
    sizes = [(64, 28, 28), (64, 6, 6), (64, 3, 3)]
    only = ("global_attention",)
    found = process.submit(launches_by_size, "backward", Stage(64, 1), sizes, only).result()["global_attention"]
    # Those of keys are shared out among programs where there are many queries.
    names = {"attention_saved_kernel", "query_gradient_kernel"}
    many, *few = [{launch for launch in launched if launch.name in names} for launched in found]
    assert {launch.name for launch in many} == names and all(launched == many for launched in few)


def test_an_interpreting_process_refuses() -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET: expected it to be unset"):
        compile_for("pointwise_mlp", CVT[0], "float32", "sm_80")
