"""Triton's kernels in the interpreter: the numerics rule on every small case, training, and calls they refuse."""

from __future__ import annotations

import subprocess
import sys
import warnings
from unittest import mock

import pytest
import torch

from fastvit_kernels import BackendError, use_backend
from fastvit_kernels.ops import global_attention, library, pointwise_mlp, triton_support
from fastvit_kernels.ops.triton_configs import Config
from fastvit_kernels.testing import assert_within_rule
from fastvit_kernels.testing.calls import Call, as_list, differentiate
from fastvit_kernels.testing.inputs import BF16, BF16_FP32, CASES, FP16, FP32, FP64, Case, Precision, pointwise_mlp_case
from fastvit_kernels.testing.triton_interpreter import round_to_bfloat16

OPERATORS = (
    "conv_projection",
    "depthwise_conv",
    "depthwise_mlp",
    "global_attention",
    "head_tokens",
    "merge_head_tokens",
    "local_attention",
    "patch_embedding",
    "pointwise_mlp",
    "pooled_projection",
)
SMALL = {operator: [case for case in CASES[operator] if "published" not in case.tags] for operator in OPERATORS}


def check(*calls: Call) -> None:
    """Hold the results of these calls, each output stacked, to the numerics rule."""
    with use_backend("triton"), torch.no_grad():
        found = stacked([call.fresh()() for call in calls])
    with use_backend("reference"), torch.no_grad():
        exact, low = stacked([call.fp64()() for call in calls]), stacked([call.fresh()() for call in calls])
    assert_within_rule(found, (exact, low))


def stacked(results: list[object]) -> list[torch.Tensor]:
    return [torch.stack(outputs) for outputs in zip(*map(as_list, results), strict=True)]


# QuickGELU's sigmoid far below zero: the exponential overflows to infinity, the quotient is the right zero.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
@pytest.mark.parametrize("precision", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize(
    "case", [pytest.param(case, id=f"{operator}-{case}") for operator in OPERATORS for case in SMALL[operator]]
)
def test_forward(case: Case, precision: Precision) -> None:
    check(case.call(precision))


@pytest.mark.parametrize("precision", [FP32, BF16], ids=str)
@pytest.mark.parametrize(
    ("operator", "name"),
    [
        ("conv_projection", "plain"),
        ("depthwise_mlp", "hat"),
        ("depthwise_mlp", "odd_hidden"),
        ("global_attention", "longer_keys"),
        ("local_attention", "plain"),
        ("local_attention", "window_16"),
        ("patch_embedding", "contiguous"),
        ("patch_embedding", "many_channels"),
        ("pointwise_mlp", "many_rows"),
    ],
)
def test_the_tiles_of_a_gpu(operator: str, name: str, precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter has small tiles of its own; here it gets those of sm_90."""

    def config(kernel: str, arithmetic: triton_support.Arithmetic, *widths: int) -> Config:
        found = own(kernel, arithmetic._replace(architecture="sm_90"), *widths)
        assert found != own(kernel, arithmetic, *widths)
        return found

    own = triton_support.config
    monkeypatch.setattr(triton_support, "config", config)
    check(next(case for case in SMALL[operator] if case.name == name).call(precision))


@pytest.mark.parametrize("operator", OPERATORS)
def test_low_precision_activations_with_fp32_parameters(operator: str) -> None:
    check(SMALL[operator][0].call(BF16_FP32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("operator", OPERATORS)
def test_autocast(operator: str, dtype: torch.dtype) -> None:
    """Over several draws: the few statistics of one call hang on how its roundings happen to add up."""
    with torch.autocast("cpu", dtype):
        check(*(SMALL[operator][0].call(FP32, seed) for seed in range(4)))


@pytest.mark.parametrize("name", ["contiguous", "plain"])
def test_maps_are_read_where_they_lie(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither channels first nor channels last is copied into the other layout."""
    call = next(case for case in SMALL["patch_embedding"] if case.name == name).call(FP32)
    read = []

    def submit(kernel: object, grid: object, args: tuple[object, ...], options: object) -> None:
        read.extend(a.data_ptr() for a in args if isinstance(a, torch.Tensor))
        own(kernel, grid, args, options)

    own = triton_support.submit
    monkeypatch.setattr(triton_support, "submit", submit)
    with use_backend("triton"), torch.no_grad():
        call()
    assert call.arguments["x"].data_ptr() in read


def test_rows_far_from_zero() -> None:
    """The LayerNorm's variance survives a mean a thousand times the deviation."""
    call = pointwise_mlp_case("far", channels=90, hidden=16).call(FP32)
    call.arguments["x"] += 1000.0
    check(call)


@pytest.mark.parametrize("operator", ["conv_projection", "patch_embedding"])
def test_gradients_are_the_references(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where kernels refuse them the backward pass recomputes through the reference, from the same inputs: same bits."""
    backend = next(type(b) for b in library.operators[operator].backends if b.name == "triton")
    monkeypatch.setattr(backend, "supports_backward", lambda *arguments: ["for this test"])
    call = SMALL[operator][0].call(FP32)
    with use_backend("reference"):
        wanted = differentiate(call).gradients
    with use_backend("triton"):
        found = differentiate(call).gradients
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert gradient is not None and torch.equal(found[name], gradient), name


@pytest.mark.parametrize("operator", OPERATORS)
def test_compiled_whole(operator: str) -> None:
    call = SMALL[operator][0].call(FP32)
    with use_backend("triton"), torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", "Dynamo detected")
        wanted = as_list(call())
        found = as_list(torch.compile(call.function, fullgraph=True, backend="aot_eager")(**call.arguments))
    assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))


def mlp_arguments() -> dict[str, object]:
    return pointwise_mlp_case("any").call(FP32).arguments


@pytest.mark.parametrize("operator", OPERATORS)
def test_refuses_fp64(operator: str) -> None:
    with use_backend("triton"), pytest.raises(BackendError, match="triton: .*float64: the Triton kernels take float32"):
        SMALL[operator][0].call(FP64)()


def test_refuses_heads_wider_than_256() -> None:
    q = torch.randn(1, 3, 320)
    with pytest.raises(BackendError, match="triton: heads of 320 channels: the Triton kernels take up to 256"):
        global_attention(q, q, q, num_heads=1, scale=0.1, backend="triton")


@pytest.fixture
def forgetting():
    """What was found out about Triton and the machine is found out again in the test, and again after it."""
    remembered = (triton_support.machine_problem, triton_support.interpreting)
    for function in remembered:
        function.cache_clear()
    yield
    for function in remembered:
        function.cache_clear()


@pytest.mark.usefixtures("forgetting")
def test_refuses_the_cpu_outside_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_support, "interpreting", lambda: False)
    with pytest.raises(BackendError, match="triton: tensors are on cpu, where it takes TRITON_INTERPRET=1"):
        pointwise_mlp(**mlp_arguments(), backend="triton")


@pytest.mark.usefixtures("forgetting")
@pytest.mark.parametrize(("capability", "refused"), [((7, 5), True), ((8, 0), False)])
def test_refuses_old_gpus(capability: tuple[int, int], refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_support, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    problem = triton_support.machine_problem(torch.device("cuda", 0))
    assert problem == ("the GPU's compute capability is 7.5, expected 8.0 or newer" if refused else None)


@pytest.mark.usefixtures("forgetting")
@pytest.mark.parametrize(
    ("error", "said"),
    [(ModuleNotFoundError("No module named 'triton'"), "not installed"), (ImportError("GLIBC"), "cannot be imported")],
)
def test_says_why_triton_is_missing(error: ImportError, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_support, "interpreting", mock.Mock(side_effect=error))
    with pytest.raises(BackendError, match=f"triton: {said}: {error}"):
        pointwise_mlp(**mlp_arguments(), backend="triton")


def test_the_package_does_without_triton() -> None:
    """Importing and running it neither needs Triton nor imports it."""
    program = """
import sys
sys.modules["triton"] = None
import torch
from fastvit_kernels import ops
x = torch.ones(2, 16)
assert ops.pointwise_mlp(x, torch.ones(8, 16), None, torch.ones(16, 8), None, activation="gelu").shape == x.shape
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_interpreted_bf16_is_rounded_like_pytorchs() -> None:
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    ties = torch.arange(0, 2**16, dtype=torch.int32) * 2**16 + 0x8000
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.4e38, -3.4e38, 1e-45])
    values = torch.cat([bits.view(torch.float32), ties.view(torch.float32), special])
    found = torch.from_numpy(round_to_bfloat16(values.numpy()).view("int16").copy()).view(torch.bfloat16)
    wanted = values.to(torch.bfloat16)
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found.nan_to_num(), wanted.nan_to_num())
