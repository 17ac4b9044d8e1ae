"""Wrong numbers get no time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastvit_kernels.bench import gate
from fastvit_kernels.bench.cases import Case, Outputs, inference
from fastvit_kernels.bench.measure import Plan
from fastvit_kernels.bench.peers import Peer, Runner, Unavailable
from fastvit_kernels.bench.results import FAILED, OK, UNAVAILABLE, Row
from fastvit_kernels.bench.run import run
from fastvit_kernels.bench.suites import SUITES
from fastvit_kernels.testing.numerics import NumericsError

PLAN = Plan(rounds=2, seconds=0.0, sample=0.0, settle=0.0)


def _nan(y: Tensor) -> Tensor:
    y = y.clone()
    y.view(-1)[0] = float("nan")
    return y


# What each planted mistake does to the results, and whether fp32 alone is precise enough to see it.
MISTAKES: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "scaled by 1e-4": (lambda y: y * 1.0001, True),
    "shifted": (lambda y: y + 0.1 * y.std(), False),
    "zero": (torch.zeros_like, False),
    "one NaN": (_nan, False),
    "other order": (lambda y: y.flip(0), False),
    "other shape": (lambda y: y[..., :-1], False),
}


def _peer(name: str, mistake: Callable[[Tensor], Tensor], ours: bool = False) -> Peer:
    def prepare(case: Case, variant: str, threads: int) -> Runner:
        module, inputs = case.stock(variant), case.inputs(variant)

        def runner() -> Outputs:
            with inference(variant):
                return (mistake(module(*inputs)),)

        return runner

    return Peer(name, ("fp32", "autocast", "cast"), prepare, ours)


def _rows(case: Case, dtype: str, *peers: Peer) -> list[Row]:
    return run([case], dtype, peers, 1, PLAN, lambda text: None)[0]


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_wrong_peer_gets_a_failure_and_no_time(tiny: Case, dtype: str, ours: bool) -> None:
    planted = [_peer(name, mistake, ours) for name, (mistake, fp32) in MISTAKES.items() if dtype == "fp32" or not fp32]
    rows = _rows(tiny, dtype, _peer("right", lambda y: y, ours), *planted)
    for row in rows:
        if row.peer == "right":
            assert row.status == OK and row.p50_ms is not None and row.error is not None
            assert row.error_allowed is not None and row.error <= row.error_allowed
        else:
            assert row.status == FAILED and row.reason, row
            assert row.p20_ms is row.p50_ms is row.p80_ms is row.min_ms is row.floor_multiple is None


def test_the_error_is_judged_before_anything_is_timed(tiny: Case) -> None:
    runs: list[int] = []

    def count(y: Tensor) -> Tensor:
        runs.append(1)
        return y * 1.01

    assert _rows(tiny, "fp32", _peer("wrong", count))[0].status == FAILED
    assert len(runs) == 1


def test_fp32_models_have_the_end_to_end_bound(tiny: Case) -> None:
    exact = tiny.exact[0]
    gate.check(tiny, "fp32", ((exact * (1 + 0.9e-5)).float(),), ours=True)
    with pytest.raises(NumericsError, match="allowed 1.00e-05"):
        gate.check(tiny, "fp32", ((exact * (1 + 1.1e-5)).float(),), ours=True)


def test_operators_have_the_numerics_rule() -> None:
    case = SUITES["pointwise_mlp"](1)[2]
    exact, low = case.exact[0], case.low("fp32")[0]
    verdict = gate.check(case, "fp32", (low,), ours=True)
    assert verdict.error < verdict.allowed < 1e-6
    # The error of fp32 doubled is still within the rule, four times it is not.
    gate.check(case, "fp32", ((exact + 2 * (low.double() - exact)).float(),), ours=True)
    with pytest.raises(NumericsError):
        gate.check(case, "fp32", ((exact + 4 * (low.double() - exact)).float(),), ours=False)


def test_one_bad_element_counts_against_ours() -> None:
    case = SUITES["pointwise_mlp"](1)[2]
    exact, low = case.exact[0], case.low("fp32")[0].clone()
    flat, largest = low.view(-1), (low.double() - exact).abs().max()
    flat[0] = (exact.view(-1)[0] + 3 * largest + 1e-5).float()
    gate.check(case, "fp32", (low,), ours=False)
    with pytest.raises(NumericsError, match="largest error"):
        gate.check(case, "fp32", (low,), ours=True)


def test_the_number_of_results_is_checked(tiny: Case) -> None:
    result = tiny.low("fp32")[0]
    for outputs in ((), (result, result)):
        with pytest.raises(NumericsError, match="expected 1"):
            gate.check(tiny, "fp32", outputs, ours=False)


def test_a_peer_that_cannot_run_is_listed_with_its_reason(tiny: Case) -> None:
    def absent(case: Case, variant: str, threads: int) -> Runner:
        raise Unavailable("no such runtime")

    def broken(case: Case, variant: str, threads: int) -> Runner:
        raise OSError("lost its library\nsecond line")

    peers = [Peer("absent", ("fp32",), absent), Peer("broken", ("fp32",), broken), Peer("x", ("fp32",), broken, True)]
    found = [(row.status, row.reason, row.p50_ms) for row in _rows(tiny, "fp32", *peers)]
    assert found == [
        (UNAVAILABLE, "no such runtime", None),
        (UNAVAILABLE, "OSError: lost its library", None),
        (FAILED, "OSError: lost its library", None),
    ]


def test_the_results_depend_on_the_input(tiny: Case) -> None:
    # Otherwise a peer that ignores half of its input would pass.
    exact = tiny.exact[0]
    assert (exact - exact.mean(0)).norm() > 0.2 * exact.norm()
