"""Training steps on a CPU: gradients judged first, then time and memory, each checked by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gpu_host
import pytest
import torch
from torch import Tensor, nn

from fastvit_kernels.bench import cli, memory, report, results, step_memory, suites, training
from fastvit_kernels.bench.cases import Case
from fastvit_kernels.bench.flops import Cost
from fastvit_kernels.bench.modes import TRAINING
from fastvit_kernels.bench.peers import Peer
from fastvit_kernels.bench.results import OK
from fastvit_kernels.bench.training import EXACT, Training
from fastvit_kernels.demo.errors import UserError
from fastvit_kernels.testing.numerics import NumericsError

KIB = 1024


class Steps(nn.Module):
    """Keeps two maps of the input's size for the backward, besides the input itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(256))

    def forward(self, x: Tensor) -> Tensor:
        y = (x * self.weight).exp()
        return y.sin()


def _steps(batch: int = 1024) -> Case:
    def inputs() -> tuple[Tensor, ...]:
        return (torch.randn(batch, 256) / 16,)

    return Case("steps", "steps", batch, lambda: Cost(10, 10, 10), Steps, inputs, lambda module: module)


def test_a_step_does_what_a_script_does() -> None:
    case = gpu_host.find("depthwise_mlp", "tiny", 2)
    step = Training(training.stock(case, "fp32"), case, "fp32")
    first, again, listed = step.step(), step.step(), step.gradients()
    assert len(first) == len(step.leaves)
    for a, b, c in zip(first, again, listed, strict=True):
        # Not added up: every step begins without gradients.
        assert torch.equal(a, b) and torch.equal(a, c)


def test_memory_of_a_step_by_hand() -> None:
    case = _steps()
    step = Training(training.stock(case, "fp32"), case, "fp32")
    step.step()
    found = step_memory.of_step(step)
    mapped = 1024 * 256 * 4
    # exp keeps its result, which sin keeps as well; the product keeps the input and the weight.
    assert found.saved == mapped
    # Two of the input's size at least, and no more than the backward's few beside them; no gradient is left.
    assert 2 * mapped <= found.allocated <= 5 * mapped
    assert all(leaf.grad is None for leaf in step.leaves)
    # The system counts by pages and, of what is not written yet, in larger pieces.
    assert found.resident is None or found.resident < 16 * mapped


def test_allocations_by_hand() -> None:
    def run() -> None:
        first = torch.empty(1000 * KIB, dtype=torch.uint8)
        second = torch.empty(500 * KIB, dtype=torch.uint8)
        del first
        third = torch.empty(700 * KIB, dtype=torch.uint8)
        assert second.nbytes < third.nbytes

    assert step_memory.allocated_peak(run) == 1500 * KIB


def test_resident_memory_is_what_is_written() -> None:
    def run() -> None:
        torch.ones(64 * KIB * KIB, dtype=torch.uint8)

    found = step_memory.resident_peak(run)
    if Path("/proc/self/clear_refs").exists():
        assert found is not None and 60 * KIB * KIB < found < 80 * KIB * KIB
    else:
        assert found is None


def test_memory_is_expected_from_shapes() -> None:
    case = _steps()
    mapped = 1024 * 256 * 4
    expected = memory.training_bytes(case)
    # The input, what is kept, its gradients on their way.
    assert 3 * mapped <= expected <= 7 * mapped
    assert expected > memory.stock_bytes(case)
    assert TRAINING.shortage(case) is None


def test_wrong_gradients_are_refused() -> None:
    case = gpu_host.find("pointwise_mlp", "tiny", 2)
    for variant in ("fp32", "autocast"):
        right = Training(case.fuse(training.stock(case, variant)), case, variant).step()
        verdict = training.check(case, variant, right)
        assert 0 < verdict.error <= verdict.allowed
        nan = torch.full_like(right[0], float("nan"))
        for wrong in (tuple(1.05 * g for g in right), right[1:], (nan, *right[1:])):
            with pytest.raises(NumericsError, match="gradients"):
                training.check(case, variant, wrong)


def test_exact_gradients_are_in_fp64() -> None:
    case = gpu_host.find("pointwise_mlp", "tiny", 2)
    assert {x.dtype for x in Training(training.stock(case, "fp32").double(), case, EXACT).inputs} == {torch.float64}
    assert {g.dtype for g in training._exact_gradients(case)} == {torch.float64}


def test_a_step_costs_three_forwards() -> None:
    assert training.cost(Cost(macs=5, weights=7, activations=9)) == Cost(15, 14, 18)


@pytest.fixture
def tiny_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    case = gpu_host.find("depthwise_mlp", "tiny", 2)
    monkeypatch.setitem(suites.SUITES, "tiny", lambda batch: [replace(case, suite="tiny")])


ARGUMENTS = ["--mode", "training", "--suite", "tiny", "--threads", "1", "--rounds", "2", "--seconds", "0"]


def test_run_command(tiny_suite: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*ARGUMENTS, "--peers", "eager", "sdpa", "fastvit", "--output", str(tmp_path)]) == 0
    fp32, bf16 = sorted(tmp_path.glob("tiny-train-*.csv"), key=lambda path: "bf16" in path.name)
    records = results.read(fp32) + results.read(bf16)
    rows = {(row.peer, row.variant): row for row, _ in records}
    assert set(rows) == {(peer, variant) for peer in ("eager", "sdpa", "fastvit") for variant in ("fp32", "autocast")}
    assert "no attention" in rows["sdpa", "fp32"].reason
    for peer in ("eager", "fastvit"):
        for variant in ("fp32", "autocast"):
            row = rows[peer, variant]
            assert row.status == OK and row.mode == "training" and row.p50_ms and row.error and row.floor_multiple
            assert row.peak_mb and row.saved_mb and row.saved_mb <= row.peak_mb
    # What the fused operator is for.
    assert rows["fastvit", "fp32"].saved_mb < 0.5 * rows["eager", "fp32"].saved_mb
    (group, *_) = report.groups(records)
    assert "training step, fp32" in group.title
    assert "| peak MB | saved MB | error |" in report.markdown([group])
    # In a terminal of 80 columns.
    (line, *_) = (line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["fastvit"])
    assert line.split()[-3] == f"{rows['fastvit', 'fp32'].peak_mb:.4g}"


def test_every_peer_of_training_runs_a_step() -> None:
    for peer in TRAINING.peers.values():
        case = gpu_host.find("global_attention" if peer.name == "sdpa" else "pointwise_mlp", "tiny", 2)
        runner = peer.prepare(case, "fp32", 1)
        verdict = TRAINING.judge(case, "fp32", runner(), peer.ours)
        assert verdict.error <= verdict.allowed, peer.name


def test_ours_with_wrong_gradients_gets_no_time(
    tiny_suite: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = TRAINING.peers["fastvit"]

    def wrong(case: Case, variant: str, threads: int):
        run = real.prepare(case, variant, threads)
        return lambda: tuple(1.01 * g for g in run())

    monkeypatch.setitem(TRAINING.peers, "fastvit", Peer("fastvit", real.variants, wrong, ours=True))
    assert cli.main([*ARGUMENTS, "--dtype", "fp32", "--peers", "fastvit", "--output", str(tmp_path)]) == 1
    assert "fastvit failed: gradients: relative L2 error" in " ".join(capsys.readouterr().out.split())


def test_peers_that_only_infer_are_refused(tiny_suite: None) -> None:
    with pytest.raises(UserError, match="nobody runs training by openvino; eager, sdpa, compile, fastvit do"):
        cli.main([*ARGUMENTS, "--peers", "openvino"])


class _Unused(nn.Module):
    """With a parameter in vain, which has a gradient of zero where `connected`."""

    def __init__(self, connected: bool = False) -> None:
        super().__init__()
        self.used, self.unused = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(3))
        self.connected = connected

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.used
        return y + 0 * self.unused.sum() if self.connected else y


def test_no_gradient_counts_as_zero() -> None:
    def fused(module: nn.Module) -> nn.Module:
        module.connected = True
        return module

    case = Case("unused", "unused", 2, lambda: Cost(1, 1, 1), _Unused, lambda: (torch.randn(2, 4),), fused)
    plain, ours = (
        Training(module, case, "fp32").step()
        for module in (training.stock(case, "fp32"), case.fuse(training.stock(case, "fp32")))
    )
    assert [tuple(g.shape) for g in plain] == [tuple(g.shape) for g in ours] == [(2, 4), (3,), (4,)]
    training.check(case, "fp32", ours)
    training.check(case, "fp32", plain)
