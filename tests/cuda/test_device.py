"""The kernels for GPUs on one: the numerics rule, CUDA graphs, whole models. Needs a GPU, Triton and the CUDA part."""

from __future__ import annotations

import pytest
import torch

from fastvit_kernels.bench.gpu.device import Gpu
from fastvit_kernels.bench.gpu.jobs import FORWARD, GRAPH, MODELS, STREAM, TRAINING, Job, find
from fastvit_kernels.bench.gpu.measure import Plan, measure
from fastvit_kernels.bench.results import OK
from fastvit_kernels.ops import triton_support
from fastvit_kernels.testing.device import checks, run_check

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
if triton_support.interpreting():
    raise RuntimeError("TRITON_INTERPRET: expected 0, as `make test-gpu` has it; nothing would run on the GPU")


@pytest.mark.parametrize("check", checks(), ids=str)
def test_check(check):
    run_check(check, "cuda", Gpu().capture)


@pytest.mark.parametrize("launch", [STREAM, GRAPH])
@pytest.mark.parametrize("mode", [FORWARD, TRAINING])
@pytest.mark.parametrize("model", MODELS)
def test_models_keep_the_rule_and_can_be_captured(model, mode, launch):
    row = measure(Gpu(), Job(model, model, 1, mode, "fastvit", launch), find, Plan(seconds=0.0, fewest=2))
    assert row.status == OK, row.reason
    # Every operator of these models has kernels for all of its calls.
    assert {entry.split(":")[1] for entry in row.backends.split()} <= {"triton", "cuda"}


def test_the_clock_and_the_limits():
    device = Gpu()
    limits = device.limits()
    # No GPU that this is for is slower or twice as fast as the fastest so far.
    assert 500 < limits.copy_gbs < 20_000 and 10_000 < limits.bf16_gflops < 5_000_000
    x = torch.empty(2**28, device="cuda")
    seconds = device.times(lambda: x.add_(1), 5, cold=True)
    assert len(seconds) == 5 and all(2 * x.nbytes / s / 1e9 < 1.1 * limits.copy_gbs for s in seconds)
    assert device.peak_bytes(lambda: torch.empty(2**20, device="cuda")) == 2**22
