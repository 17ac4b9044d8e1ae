"""Batch 64 is offered, and whatever does not fit is not tried."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from fastvit_kernels.bench import cases, cli, memory, test_suites
from fastvit_kernels.bench.cases import Case
from fastvit_kernels.bench.flops import Cost
from fastvit_kernels.bench.measure import Plan
from fastvit_kernels.bench.modes import INFERENCE
from fastvit_kernels.bench.peers import PEERS
from fastvit_kernels.bench.results import UNAVAILABLE
from fastvit_kernels.bench.run import run
from fastvit_kernels.bench.suites import BATCHES, SUITES, pvt_v2

GIB = 2**30
# Suites and cases of batch 64 that 24 GiB cannot hold beside their peers.
TOO_LARGE = {
    ("global_attention", "cvt_w24-384-stage2"),
    *((name, name) for name in pvt_v2.MODELS if name.startswith("segformer")),
    ("global_attention", "cvt_13-384-stage1"),
    ("global_attention", "cvt_w24-384-stage1"),
}


def test_all_batch_sizes_are_offered() -> None:
    assert BATCHES == (1, 8, 64)
    text = " ".join(cli._run_parser().format_help().split())
    assert "default for inference: 1 8; training: 8." in text and "1 8 64" in text


@pytest.mark.parametrize("suite", SUITES)
def test_what_fits_into_24_gib(suite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "machine_bytes", lambda: 24 * GIB)
    for case in SUITES[suite](64):
        assert (memory.shortage(case) is not None) == ((suite, case.name) in TOO_LARGE), case.name


def test_hat_net_at_batch_64_needs_a_twelfth_of_24_gib() -> None:
    (model,) = SUITES["hat_net_large"](64)
    assert memory.stock_bytes(model) < 2 * GIB


class Steps(nn.Module):
    """Three maps of 1000 values in a row; two of them at a time, and the input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + 1
        x = x.view(-1) * 2
        return x.view(10, 100) - 3


def _steps(batch: int = 10) -> Case:
    return Case("steps", "steps", batch, lambda: Cost(1, 1, 1), Steps, lambda: (torch.zeros(10, 100),), lambda m: m)


def test_memory_by_hand() -> None:
    assert memory.stock_bytes(_steps()) == 4 * (10 + 3 * 1000)


def test_a_case_without_room_is_listed_and_not_run() -> None:
    case = replace(_steps(), build=_never, count=lambda: Cost(1, 1, 1))
    full = replace(INFERENCE, shortage=lambda case: "needs more")
    rows, _ = run([case], "bf16", [PEERS["eager"]], 1, Plan(), lambda text: None, full)
    assert {(row.status, row.reason, row.p50_ms) for row in rows} == {(UNAVAILABLE, "needs more", None)}
    assert len(rows) == 2


def _never() -> nn.Module:
    raise AssertionError("built")


def test_the_message_says_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory.shortage(_steps()) is None
    monkeypatch.setattr(memory, "machine_bytes", lambda: 1000)
    assert "this machine has 0.0" in str(memory.shortage(_steps()))
    assert memory.machine_bytes() == 1000


def test_exact_results_do_not_depend_on_the_slices(tiny: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    sliced = cases.IMAGES_IN_FP64
    monkeypatch.setattr(cases, "IMAGES_IN_FP64", 1)
    (one_by_one,) = replace(tiny).exact
    monkeypatch.setattr(cases, "IMAGES_IN_FP64", sliced)
    (whole,) = replace(tiny).exact
    assert one_by_one.shape == whole.shape and len(whole) == 2
    torch.testing.assert_close(one_by_one, whole, rtol=1e-12, atol=1e-12)


def test_pytests_suites_have_every_batch_size() -> None:
    assert {parameter.values[2] for parameter in test_suites.PARAMETERS} == set(BATCHES)
