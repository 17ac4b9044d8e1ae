"""A run on a GPU, here on this CPU: the order, the budget, what is not repeated, and what a failure stops."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from dataclasses import replace
from pathlib import Path
from unittest import mock

import gpu_host
import pytest
import torch
from gpu_host import Broken, Host, Inline, Losing, find

import fastvit_kernels
from fastvit_kernels import models
from fastvit_kernels.bench import cli, machine
from fastvit_kernels.bench.gpu import cli as gpu_cli
from fastvit_kernels.bench.gpu import measure as measuring
from fastvit_kernels.bench.gpu import preferences, report
from fastvit_kernels.bench.gpu import rows as files
from fastvit_kernels.bench.gpu import run as running
from fastvit_kernels.bench.gpu.jobs import (
    FORWARD,
    GRAPH,
    MODELS,
    OPERATORS,
    OPERATORS_OF,
    STREAM,
    TRAINING,
    Job,
    all_jobs,
    core_jobs,
)
from fastvit_kernels.bench.gpu.measure import Plan, measure
from fastvit_kernels.bench.gpu.rows import TIMED_OUT, CheckRow, Conditions, Row
from fastvit_kernels.bench.gpu.run import Part, Request, run
from fastvit_kernels.bench.gpu.worker import Lost, TimedOut, Worker
from fastvit_kernels.bench.results import FAILED, OK, UNAVAILABLE
from fastvit_kernels.demo.errors import UserError
from fastvit_kernels.ops import library, tuning
from fastvit_kernels.ops.triton_configs import Config
from fastvit_kernels.ops.tuning import Launch, Preference
from fastvit_kernels.testing import device as checking
from fastvit_kernels.testing.device import Check, checks, run_check
from fastvit_kernels.testing.inputs import CASES, tagged
from fastvit_kernels.testing.numerics import NumericsError

PLAN = Plan(seconds=0.0, fewest=2, most=2)
JOBS = [Job("pointwise_mlp", "tiny", 2, FORWARD, peer, STREAM) for peer in ("fastvit", "eager")]
OTHERS = ["cuda", "sdpa"]
GOOD = Check("pointwise_mlp", "tiny", "float32", "cpu", "forward")
BAD = Check("pointwise_mlp", "no such case", "float32", "cpu", "forward")
CONDITIONS = Conditions(
    device="NVIDIA Test 1",
    capability="9.0",
    peak_tflops=800.0,
    copy_tbs=4.3,
    python="3.12.3",
    torch="2.11.0",
    triton="3.6.0",
    cuda="13.0",
    fastvit_kernels="0.1.0",
    sources="0123456789ab",
    tuning="",
    commit="",
    date="2026-01-02",
)
LAUNCH = Launch("linear", "sm_90", "half", 192, 768, Config(32, 128, 64, 8, 4), "NVIDIA Test 1", 0.05, 0.06)
TIMES = {"triton": 1.5, "cuda": 2.0}
PREFERENCE = Preference("depthwise_mlp", "NVIDIA Test 1", "9.0", "bfloat16", FORWARD, 64, TIMES, "nvidia-test-1.csv")


@pytest.fixture(autouse=True)
def forget():
    yield
    measuring._case.cache_clear()


def good_check() -> Check:
    return next(check for check in checks(["cpu"], ["float32"]) if check.operator == "pointwise_mlp")


def _request(folder: Path, jobs=JOBS, checks=(), **options) -> Request:
    return Request([Part(jobs, list(checks))], folder, plan=PLAN, find=find, **options)


def _run(request: Request, worker=None, **options):
    worker = worker or Inline()
    said: list[str] = []
    outcome = run(request, lambda: worker, said.append, **options)
    return outcome, worker, said


def _measured(worker: Inline) -> list[Job]:
    return [arguments[0] for task, arguments, _ in worker.tasks if task is measure]


def test_rows_are_written_and_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = good_check()
    outcome, worker, said = _run(_request(tmp_path, JOBS[:1], [check]))
    assert outcome.complete and (outcome.rows_done, outcome.checks_done, outcome.checks_failed) == (1, 1, 0)
    assert outcome.file == tmp_path / "test-gpu-1.csv" and _measured(worker) == JOBS[:1]
    assert any("x floor" in line for line in said)

    outcome, worker, _ = _run(_request(tmp_path, JOBS, [check]))
    assert outcome.complete and outcome.rows_done == 2 and _measured(worker) == JOBS[1:]
    assert not any(task is running._check_on for task, *_ in worker.tasks)
    (first, conditions), (second, _) = files.read(outcome.file)
    assert [first.peer, second.peer] == ["fastvit", "eager"] and first.status == second.status == OK
    assert first.tflops is not None and first.floor_multiple is not None and first.gflop == second.gflop
    assert conditions.device == "Test GPU 1" and conditions.peak_tflops == 0.1 and conditions.sources

    # Other code, other rows.
    monkeypatch.setattr(machine, "sources", lambda: "something else")
    outcome, worker, _ = _run(_request(tmp_path, JOBS, [check]))
    assert _measured(worker) == JOBS and any(task is running._check_on for task, *_ in worker.tasks)
    assert len(files.read(outcome.file)) == 4


def test_the_time_ends_the_run_and_the_next_goes_on(tmp_path: Path) -> None:
    """A row of 100 s each; nothing starts that is not expected to end in time."""
    jobs = [Job("pointwise_mlp", "tiny", batch, FORWARD, "eager", STREAM) for batch in (1, 2, 3)]

    class Slow(Inline):
        now = 0.0

        def run(self, task, *arguments, limit):
            if task is measure:
                assert limit <= 250 - self.now
                self.now += 100.0
            return super().run(task, *arguments, limit=limit)

    worker = Slow()
    # The third would not be done in time: its kind takes 100 s.
    outcome, _, said = _run(_request(tmp_path, jobs, minutes=250 / 60), worker, clock=lambda: worker.now)
    assert not outcome.complete and outcome.rows_done == 2 and _measured(worker) == jobs[:2]
    assert "the same command goes on" in str(outcome)
    outcome, worker, _ = _run(_request(tmp_path, jobs))
    assert outcome.complete and _measured(worker) == jobs[2:]


def test_kinds_of_rows_are_expected_to_take_what_they_took() -> None:
    now = [0.0]
    budget = running.Budget(100.0, lambda: now[0])
    compiled, quick = JOBS[0]._replace(peer="compile"), JOBS[0]
    assert budget.expected(compiled) > 20 > budget.expected(quick)
    budget.note(quick, 2.0)
    budget.note(quick, 1.0)
    assert budget.expected(quick) == 2.0 and budget.expected(quick._replace(suite="cvt_13")) != 2.0
    now[0] = 70.0
    assert budget.left == 30.0
    # One that took very long does not stop the others.
    before = budget.expected(compiled)
    budget.note(compiled, 300.0)
    assert budget.expected(compiled) == before
    for _ in range(2):
        budget.note(compiled, 200.0)
    assert budget.expected(compiled) == 200.0


def test_the_estimate_counts_checks_and_rows() -> None:
    compiled = JOBS[0]._replace(peer="compile")
    assert running.estimate([], 60, 2) == 60 * running._EXPECTED_CHECK / 2 / 60
    assert running.estimate([compiled], 0, 1) > running.estimate([JOBS[0]], 0, 1) > 0


def test_a_row_that_the_end_of_the_time_interrupts_is_left_for_the_next_run(tmp_path: Path) -> None:
    class Late(Inline):
        def run(self, task, *arguments, limit):
            if task is measure and self.short:
                raise TimedOut("no result within 30 s")
            return super().run(task, *arguments, limit=limit)

    worker = Late()
    worker.short = True
    outcome, *_ = _run(_request(tmp_path, minutes=0.5), worker)
    assert outcome.rows_done == 0 and not outcome.file.exists()
    # With all the time there is, it is the row's own fault.
    outcome, *_ = _run(_request(tmp_path, minutes=60), worker)
    assert [row.status for row, _ in files.read(outcome.file)] == [TIMED_OUT] * 2 and outcome.ours_failed == 1
    # Whoever's it was, it is repeated on request alone.
    worker.short = False
    assert _measured(_run(_request(tmp_path), worker)[1]) == []
    outcome, worker, _ = _run(_request(tmp_path, retry=True))
    assert _measured(worker) == JOBS and [row.status for row, _ in files.read(outcome.file)] == [OK] * 2


def test_failures_are_rows_and_the_run_goes_on(tmp_path: Path) -> None:
    jobs = [JOBS[0]._replace(case=case) for case in ("wrong", "error", "ends the process", "no memory", "right")]
    outcome, *_ = _run(_request(tmp_path, jobs), Losing("ends the process"))
    assert outcome.complete and outcome.ours_failed == 3
    found = {row.case: (row.status, row.reason) for row, _ in files.read(outcome.file)}
    assert [status for status, _ in found.values()] == [FAILED, FAILED, FAILED, UNAVAILABLE, OK]
    assert found["ends the process"][1] == "the process ended with exit code 7"
    # Asked to, the next run tries once more what failed.
    assert _measured(_run(_request(tmp_path, jobs))[1]) == []
    assert _measured(_run(_request(tmp_path, jobs[:2], retry=True))[1]) == jobs[:2]
    assert len(files.read(outcome.file)) == len(jobs)


def test_nothing_that_failed_its_check_gets_a_time(tmp_path: Path) -> None:
    jobs = [*JOBS, Job("global_attention", "tiny", 2, FORWARD, "fastvit", STREAM)]
    outcome, _, said = _run(_request(tmp_path, jobs, [good_check(), BAD]))
    assert outcome.complete and (outcome.checks_failed, outcome.ours_failed) == (1, 1)
    ours, eager, other = (row for row, _ in files.read(outcome.file))
    assert ours.status == FAILED and "pointwise_mlp:cpu: failed the checks" in ours.reason and ours.p50_ms is None
    assert eager.status == other.status == OK
    assert any("failed" in line and "no such case" in line for line in said)
    (good, _), (bad, _) = files.read_checks(files.checks_file(tmp_path, "Test GPU 1"))
    assert good.status == OK and bad.check == BAD and "StopIteration" in bad.reason


def test_a_check_that_took_too_long_is_no_success(tmp_path: Path) -> None:
    class Hanging(Inline):
        def run(self, task, *arguments, limit):
            if task is running._check_on:
                raise TimedOut("no result within 120 s")
            return super().run(task, *arguments, limit=limit)

    outcome, *_ = _run(_request(tmp_path, JOBS[:1], [good_check()]), Hanging())
    assert (outcome.checks_failed, outcome.ours_failed) == (1, 1)
    outcome, *_ = _run(_request(tmp_path, JOBS[:1], [good_check()], retry=True))
    assert (outcome.checks_failed, outcome.ours_failed) == (0, 0)


def test_nothing_is_timed_before_all_checks_are_done(tmp_path: Path) -> None:
    class Clock(Inline):
        now = 0.0

        def run(self, task, *arguments, limit):
            self.now += 40.0 if task is running._check_on else 0.0
            return super().run(task, *arguments, limit=limit)

    worker, listed = Clock(), checks(["cpu"], ["float32"])[:3]
    outcome, *_ = _run(_request(tmp_path, JOBS, listed, minutes=1), worker, clock=lambda: worker.now)
    assert outcome.checks_done == 2 and outcome.rows_done == 0 and not outcome.complete
    outcome, worker, _ = _run(_request(tmp_path, JOBS, listed))
    assert outcome.complete and sum(task is running._check_on for task, *_ in worker.tasks) == 1


def test_checks_share_the_device(tmp_path: Path) -> None:
    listed = checks(["cpu"], ["float32"])[:6]
    outcome, *_ = _run(_request(tmp_path, [], listed, processes=3))
    assert outcome.complete and outcome.checks_failed == 0
    assert {row.check for row, _ in files.read_checks(files.checks_file(tmp_path, "Test GPU 1"))} == set(listed)


def test_a_device_that_does_not_work_is_an_error(tmp_path: Path) -> None:
    class Dead(Inline):
        def run(self, task, *arguments, limit):
            raise Lost("RuntimeError: no CUDA-capable device")

    with pytest.raises(RuntimeError, match="the device does not work: .*no CUDA-capable device"):
        _run(_request(tmp_path), Dead())


def test_processes() -> None:
    """One process serves many tasks; one that ends, hangs or loses its device is followed by another."""
    worker = Worker(Broken)
    try:
        pid, name = worker.run(gpu_host.process, limit=60)
        assert pid != os.getpid() and name == "Test GPU 1"
        with pytest.raises(Lost, match="ValueError: the task's own error"):
            worker.run(gpu_host.fail, limit=60)
        row = worker.run(measure, JOBS[1], find, PLAN, limit=60)
        assert row.status == OK and worker.run(gpu_host.process, limit=60)[0] == pid
        with pytest.raises(Lost, match="the process ended with exit code 7"):
            worker.run(gpu_host.end_process, limit=60)
        second, _ = worker.run(gpu_host.process, limit=60)
        with pytest.raises(TimedOut, match="no result within 1 s"):
            worker.run(gpu_host.sleep, 600, limit=1)
        with pytest.raises(ProcessLookupError):
            os.kill(second, 0)
        with pytest.raises(Lost, match="illegal memory access"):
            worker.run(gpu_host.lose, limit=60)
        third, _ = worker.run(gpu_host.process, limit=60)
        # It answers, and another does what comes next.
        assert worker.run(gpu_host.spoil, limit=60) == third
        fourth, _ = worker.run(gpu_host.process, limit=60)
        assert len({pid, second, third, fourth}) == 4
    finally:
        worker.close()
    with pytest.raises(ProcessLookupError):
        os.kill(fourth, 0)


def test_checks_of_every_operator_and_backend() -> None:
    for backend in ("triton", "cuda"):
        found = checks([backend], ["bfloat16"])
        operators = {check.operator for check in found}
        assert {"local_attention", "depthwise_mlp", "conv_projection"} <= operators
        assert ("pointwise_mlp" in operators) is (backend == "triton")
        assert {check.operator for check in found if check.what == "graph"} == operators
    assert any(check.what == "gradients" for check in checks(["triton"], ["float32"]))
    # Triton computes those of the CUDA kernels, in graphs as well.
    trained = [check for check in checks(["cuda"], ["bfloat16-with-float32-parameters"]) if "gradients" in check.what]
    assert {check.what for check in trained} == set(checking.OF_TRAINING)
    assert {check.operator for check in trained} == {"local_attention", "depthwise_mlp", "conv_projection"}
    assert set(checking.problems(torch.device("cpu"))) == {"cuda"}


@pytest.mark.parametrize("what", ["forward", "gradients", "graph", "graph of gradients"])
def test_checks_find_what_is_wrong(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's kernels in its interpreter, then with a mistake."""
    smallest = str(tagged(CASES["pointwise_mlp"], "smallest")[0])
    precision = {"graph": "bfloat16", "graph of gradients": "bfloat16-with-float32-parameters"}.get(what, "float32")
    check = Check("pointwise_mlp", smallest, precision, "triton", what)
    assert check in checks(["triton"], [check.precision])
    device = Host()
    run_check(check, device.type, device.capture)
    backend = next(type(b) for b in library.operators["pointwise_mlp"].backends if b.name == "triton")
    changed = "run_backward" if "gradients" in what else "run"
    right, calls = getattr(backend, changed), []

    def wrong(self, *arguments):
        calls.append(1)
        # A graph is compared with the call in front of it.
        factor = 1.0 if what.startswith("graph") and len(calls) == 1 else 1.05
        return tuple(factor * y for y in right(self, *arguments))

    monkeypatch.setattr(backend, changed, wrong)
    with pytest.raises(NumericsError):
        run_check(check, device.type, device.capture)


@pytest.mark.parametrize(
    ("operator", "backend", "factor", "holds"),
    [
        ("global_attention", "sdpa", 1.0005, True),
        ("global_attention", "sdpa", 1.05, False),
        ("pointwise_mlp", "triton", 1.0005, False),
    ],
)
def test_only_gradients_of_sdpa_may_differ_from_replay_to_replay(
    operator: str, backend: str, factor: float, holds: bool
) -> None:
    def capture(run):
        made = run()
        return lambda: [result.copy_(factor * gradient) for result, gradient in zip(made, run(), strict=True)]

    smallest = str(tagged(CASES[operator], "smallest")[0])
    check = Check(operator, smallest, "bfloat16-with-float32-parameters", backend, "graph of gradients")
    assert check in checks([backend], [check.precision])
    with contextlib.nullcontext() if holds else pytest.raises(NumericsError):
        run_check(check, "cpu", capture)


def _row(peer: str, p50: float | None, **changes) -> Row:
    backends = {"fastvit": "global_attention:triton:64", "triton": "global_attention:triton:64"}
    backends |= {"cuda": "global_attention:cuda:64", "fastvit_sdpa": "global_attention:sdpa:64"}
    row = Row("global_attention", "s1", 64, FORWARD, peer, STREAM, "bf16", "cast", OK, backends=backends.get(peer, ""))
    row = replace(row, gflop=1.0, least_mb=2.0, floor_ms=0.5, error=1e-3, error_allowed=3e-3, calls=10)
    if p50 is not None:
        times = {"p20_ms": p50 - 0.1, "p50_ms": p50, "p80_ms": p50 + 0.1, "min_ms": p50 - 0.2}
        row = replace(row, **times, floor_multiple=p50 / 0.5, tflops=1 / p50, tbs=2 / p50, peak_mb=7.0)
    return replace(row, **changes)


def test_files_round_trip_and_the_last_row_holds(tmp_path: Path) -> None:
    path = files.rows_file(tmp_path, CONDITIONS.device)
    assert path.name == "nvidia-test-1.csv"
    first, second = _row("eager", None, status=FAILED, reason='no, "why"'), _row("cuda", 1.0, launch=GRAPH)
    for row in (first, second, again := _row("eager", 2.0)):
        files.append(path, row, CONDITIONS)
    assert files.read(path) == [(again, CONDITIONS), (second, CONDITIONS)]
    checked = CheckRow("a", "b", "float32", "cuda", "forward", FAILED, "why,\nnot")
    files.append(tmp_path / "checks.csv", checked, CONDITIONS)
    assert files.read_checks(tmp_path / "checks.csv") == [(checked, CONDITIONS)]
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"other\.csv: not a file of rows of a GPU"):
        files.read(tmp_path / "other.csv")


@pytest.mark.parametrize(
    ("change", "same"),
    [({"date": "2027-01-01", "copy_tbs": 4.2, "commit": "x"}, True), ({"sources": "x"}, False)]
    + [({name: "x"}, False) for name in ("device", "torch", "triton", "cuda", "tuning")],
)
def test_what_makes_a_measurement_another_one(change: dict[str, object], same: bool) -> None:
    assert CONDITIONS.repeats(replace(CONDITIONS, **change)) is same


def test_sources_stand_for_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("a.py", "1"), ("sub/b.json", "2"), ("notes.txt", "3")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(fastvit_kernels, "__path__", [str(tmp_path)])
    before = machine.sources()
    (tmp_path / "notes.txt").write_text("4")
    assert machine.sources() == before
    (tmp_path / "sub/b.json").write_text("4")
    assert machine.sources() != before


def _tuned(folder: Path, launches=(), preferences=()) -> str:
    """What stands for a user's file with these entries."""
    path = folder / "tuning.json"
    tuning.write(path, tuning.Tuning(tuple(launches), tuple(preferences)))
    with tuning.using(tuning.read(path)):
        return machine.tuned()


def test_tuning_stands_for_what_it_decides(tmp_path: Path) -> None:
    assert _tuned(tmp_path) == ""
    faster = _tuned(tmp_path, [LAUNCH])
    assert faster not in ("", _tuned(tmp_path, [replace(LAUNCH, config=LAUNCH.config._replace(num_warps=4))]))
    assert _tuned(tmp_path, [replace(LAUNCH, milliseconds=0.04, device="another")]) == faster
    # It decides nothing.
    assert _tuned(tmp_path, [replace(LAUNCH, width=64, milliseconds=0.0, usual_milliseconds=0.0)]) == ""
    by_times = _tuned(tmp_path, preferences=[PREFERENCE])
    assert by_times == _tuned(tmp_path, preferences=[replace(PREFERENCE, milliseconds={"triton": 1.0, "cuda": 1.5})])
    others = [{"milliseconds": {"triton": 3.0, "cuda": 2.0}}, {"channels": 128}, {"mode": TRAINING}]
    assert all(by_times != _tuned(tmp_path, preferences=[replace(PREFERENCE, **other)]) for other in others)


def test_rows_are_measured_again_once_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark, tuning, the benchmark: neither the old times nor both in one table."""
    _run(_request(tmp_path))
    path = tmp_path / "tuning.json"
    tuning.write(path, tuning.Tuning((LAUNCH,)))
    monkeypatch.setenv(tuning.VARIABLE, str(path))
    monkeypatch.setattr(tuning, "_chosen", None)
    outcome, worker, _ = _run(_request(tmp_path))
    assert _measured(worker) == JOBS
    records = files.read(outcome.file)
    before, after = report.groups(records)
    assert {c.tuning for c in before.conditions} == {""} and {c.tuning for c in after.conditions} == {machine.tuned()}
    assert [len(group.rows) for group in (before, after)] == [2, 2]
    assert f"tuning {machine.tuned()}" in report.markdown(records)
    _, worker, _ = _run(_request(tmp_path))
    assert _measured(worker) == []


def test_a_run_that_went_on_another_day_is_in_the_same_table() -> None:
    later = replace(CONDITIONS, date="2026-01-03", commit="x", peak_tflops=810.0, copy_tbs=4.4)
    records = [(_row("eager", 4.0), CONDITIONS), (_row("fastvit", 1.0), CONDITIONS), (_row("compile", 2.0), later)]
    (group,) = report.groups(records)
    assert [row.peer for row in group.ranked] == ["fastvit", "compile", "eager"]
    text = report.markdown(records)
    assert (
        text.count("| peer |") == 1
        and "| compile | 2 | 1.9 - 2.1 | 4.00 | 0.5 | 1 | 7 | 2.00 | 1.00 | 1.0e-03 |" in text
    )
    # Where and when each was measured.
    assert "800 TFLOP/s bf16, 4.3 TB/s" in text and "810 TFLOP/s bf16, 4.4 TB/s" in text and "2026-01-03" in text
    assert report._described([group]).splitlines() == [report.describe(CONDITIONS), report.describe(later)]


def test_tables_and_pictures(tmp_path: Path) -> None:
    model = {"suite": "cvt_13", "case": "cvt_13", "backends": ""}
    rows = [_row("eager", 4.0), _row("fastvit", 1.0), _row("compile", None, status=UNAVAILABLE, reason="out of memory")]
    rows += [_row("eager", 3.0, mode=TRAINING), _row("fastvit", 1.5, mode=TRAINING, peak_mb=None)]
    rows += [_row("eager", 40.0, **model, peak_mb=28.0), _row("fastvit", 10.0, **model), _row("compile", 15.0, **model)]
    rows += [_row("eager", 9.0, **model, launch=GRAPH)]
    called = {"case": "s2", "launch": GRAPH, "variant": "cast" + measuring.UNCAPTURED, "reason": "not from a graph: no"}
    rows += [_row("fastvit", 2.0, **called), _row("cuda", 3.0, case="s2", launch=GRAPH)]
    records = [(row, CONDITIONS) for row in rows]
    path = tmp_path / "gpu.csv"
    tables, of_models, of_operators = report.write(records, path)
    text = tables.read_text()
    summary, first, *_ = text.split("\n\n")
    assert summary.splitlines()[2:] == [
        "| cvt_13, batch 64, forward | 10 | 20.00 | 4.00 | 1.50 |  | 0.25 |",
        "| global_attention s1, batch 64, forward | 1 | 2.00 | 4.00 |  |  | 1.00 |",
        "| global_attention s1, batch 64, training | 1.5 | 3.00 | 2.00 |  |  |  |",
        "| global_attention s2, batch 64, forward, in a graph, uncaptured | 2 | 4.00 |  |  |  |  |",
    ]
    assert first == "**cvt_13, batch 64, forward**" and "| cuda | 3 |" in text.replace("*", "")
    assert (
        "| **fastvit** | **1** | **0.9 - 1.1** | **2.00** | **1** | **2** | **7** | **4.00** |  | **1.0e-03** |" in text
    )
    assert "| **fastvit, uncaptured** | **2** |" in text and "- fastvit, uncaptured: not from a graph: no" in text
    assert "- compile unavailable: out of memory" in text and "800 TFLOP/s bf16, 4.3 TB/s, measured" in text
    assert of_models.name == "gpu-models.png" and of_operators.name == "gpu-operators.png"
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in (of_models, of_operators))


def test_tables_are_made_again_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a run that was ended from outside, before it came to them."""
    path = files.rows_file(tmp_path, CONDITIONS.device)
    for peer in ("fastvit", "cuda"):
        files.append(path, _row(peer, 1.0, launch=GRAPH), CONDITIONS)
    chosen = tmp_path / "tuning.json"
    assert cli.main(["--device", "cuda", "--report", str(path), "--preferences", str(chosen)]) == 0
    written = [path.with_suffix(".md"), path.with_name(f"{path.stem}-operators.png"), chosen]
    assert capsys.readouterr().out.splitlines() == list(map(str, written))
    assert tuning.read(chosen).preferences and "global_attention s1" in written[0].read_text()
    chosen.rename(other := tmp_path / "other.csv")
    for wrong in (tmp_path / "none.csv", other):
        with pytest.raises(UserError, match=wrong.name):
            cli.main(["--device", "cuda", "--report", str(wrong)])


def test_preferences_come_from_rows_that_can_be_compared(tmp_path: Path) -> None:
    rows = [_row("fastvit", 1.0), _row("triton", 1.0), _row("cuda", 4.0), _row("eager", 9.0), _row("sdpa", 2.0)]
    rows += [_row("fastvit", 4.0, batch=1), _row("triton", 4.0, batch=1), _row("cuda", 1.0, batch=1)]
    rows += [_row("fastvit_sdpa", 3.0), _row("fastvit_sdpa", 12.0, batch=1)]
    # No times of the others at batch 1 but eager's; failures do not count.
    rows += [_row("eager", 16.0, batch=1)]
    rows += [_row("triton", 1.0, mode=TRAINING), _row("eager", None, mode=TRAINING, status=FAILED)]
    rows += [_row("eager", 5.0, case="s2"), _row("compile", 0.1)]
    rows = [replace(row, launch=GRAPH) for row in rows]
    # The host's time, or something else's.
    rows += [_row("cuda", 0.01), _row("cuda", 0.01, case="s3"), _row("triton", 0.01, case="s3")]
    rows += [_row(p, 0.01, case="s4", launch=GRAPH, variant="cast-uncaptured") for p in ("cuda", "triton")]
    old = replace(CONDITIONS, sources="old")
    records = [(_row("cuda", 0.001, launch=GRAPH), old), *((row, CONDITIONS) for row in rows)]
    (found,) = preferences.preferences(records, "gpu.csv")
    assert (found.operator, found.device, found.capability) == ("global_attention", "NVIDIA Test 1", "9.0")
    assert (found.dtype, found.mode, found.channels, found.results) == ("bfloat16", "forward", 64, "gpu.csv")
    assert found.milliseconds == pytest.approx({"triton": 2.0, "cuda": 2.0, "sdpa": 6.0, "reference": 12.0})

    path = tmp_path / "tuning.json"
    other = replace(found, channels=128)
    tuning.write(path, tuning.Tuning((), (replace(found, milliseconds={"cuda": 1.0, "triton": 2.0}), other)))
    preferences.write(records, "gpu.csv", path)
    written = tuning.read(path).preferences
    assert written == (replace(found, milliseconds=written[0].milliseconds), other)
    assert written[0].milliseconds == pytest.approx(found.milliseconds)
    assert preferences.preferences([], "gpu.csv") == []


def test_preferences_are_by_dtype() -> None:
    times = {"bf16": (1.0, 2.0), "fp32": (4.0, 3.0), "fp16": (1.5, 2.5)}
    rows = [
        _row(peer, time, dtype=dtype, launch=GRAPH)
        for dtype, both in times.items()
        for peer, time in zip(("triton", "cuda"), both, strict=True)
    ]
    found = preferences.preferences([(row, CONDITIONS) for row in rows], "gpu.csv")
    assert {p.dtype: p.order for p in found} == {
        "bfloat16": ("triton", "cuda"),
        "float16": ("triton", "cuda"),
        "float32": ("cuda", "triton"),
    }


def test_the_command_lists_its_rows(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cuda", "--list", "--suite", "cvt_13", "--batch", "64", "--mode", "forward"]
    assert cli.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:-1] == [f"cvt_13, batch 64, forward, {peer}" for peer in ("fastvit", "eager", "compile", "sdpa")]
    assert re.fullmatch(r"\d+ checks and 4 rows: about \d+ minutes, by guess", lines[-1])
    assert cli.main([*arguments, "--peers", "eager", "--dtype", "fp32", "fp16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:-1] == [f"cvt_13, batch 64, forward, {dtype}, eager" for dtype in ("fp32", "fp16")]


def test_the_core_comes_first_and_takes_an_hour() -> None:
    core = core_jobs()
    assert all_jobs()[: len(core)] == core
    assert {job.suite for job in core} == {*MODELS, *OPERATORS} and {job.batch for job in core} == {1, 64}
    stages = {job.case.partition("-stage")[2][:1] for job in core if "-stage" in job.case}
    assert stages == {"1", "2"} and {job.mode for job in core} == {FORWARD, TRAINING}
    # With the processes of a machine that has a GPU.
    assert 30 < running.estimate(core, len(_checks_of(core, [])), 14) < 60
    compiled = {(job.suite, job.batch, job.mode, job.launch) for job in core if job.peer == "compile"}
    forward, training, graph = (64, FORWARD, STREAM), (64, TRAINING, STREAM), (1, FORWARD, GRAPH)
    assert compiled == {(model, *kind) for model in MODELS for kind in (forward, training, graph)}


def _checks_of(jobs: list[Job], without: list[str]) -> set[Check]:
    return {check for part in gpu_cli._parts(jobs, without) for check in part.checks}


def test_nine_minutes_compare_a_model_and_the_next_nine_go_on(tmp_path: Path) -> None:
    """By the guesses of what checks and rows take, with the processes of a machine that has a GPU."""

    class Guessed(Inline):
        now = 0.0

        def run(self, task, *arguments, limit):
            self.tasks.append((task, arguments, limit))
            if task is running._check_on:
                self.now += running._EXPECTED_CHECK / 14
                return CheckRow(*arguments[0], OK)
            if task is measure:
                self.now += running._EXPECTED[running._kind(arguments[0])]
                return Row(*arguments[0], variant="", status=UNAVAILABLE)
            return task(self.device, *arguments)

    core = core_jobs()
    request = Request(gpu_cli._parts(core, []), tmp_path, minutes=9, find=lambda *case: gpu_host.find("cvt_13", "", 1))
    slices = []
    for _ in range(2):
        worker = Guessed()
        _run(request, worker, clock=lambda worker=worker: worker.now)
        assert any(task is running._check_on for task, *_ in worker.tasks)
        slices.append(_measured(worker))
    # Three models are compared with everybody in the first, all of them and operators after the second.
    assert slices[0][:12] == core[:12]
    done = {*slices[0], *slices[1]}
    assert set(core[: 4 * len(MODELS)]) <= done and sum(job.suite in OPERATORS for job in done) > 50


def test_a_part_waits_for_its_own_checks_alone(tmp_path: Path) -> None:
    first, second, third = (check for check in checks(["cpu"], ["float32"])[:3])
    parts = [Part(JOBS[:1], [first, second]), Part(JOBS[1:], [second, third])]
    outcome, worker, _ = _run(Request(parts, tmp_path, plan=PLAN, find=find))
    done = [arguments[0] for task, arguments, _ in worker.tasks if task in (measure, running._check_on)]
    assert done == [first, second, JOBS[0], third, JOBS[1]] and outcome.complete
    assert (outcome.checks, outcome.checks_done, outcome.rows) == (3, 3, 2)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_models_call_the_operators_that_are_checked_before_them(model: str, training: bool) -> None:
    called = set()

    def call(operator, tensors, static, **options):
        called.add(operator.name)
        return operator.fake(tensors, static)

    with (
        torch.device("meta"),
        torch.no_grad(),
        mock.patch.object(library, "call", call),
        mock.patch.object(library, "statistics_by_kernels", lambda *arguments: None),
    ):
        models.create_model(model).train(training)(torch.empty(2, 3, 224, 224))
    assert called == set(OPERATORS_OF[model])


def test_checks_are_of_what_is_measured() -> None:
    (of_operator,) = {check.operator for check in _checks_of(JOBS[:1], OTHERS)}
    assert of_operator == "pointwise_mlp"
    for mode, kinds, precision in (
        (FORWARD, {"forward", "graph"}, "bfloat16"),
        (TRAINING, {"gradients", "graph of gradients"}, "bfloat16-with-float32-parameters"),
    ):
        found = _checks_of([JOBS[0]._replace(mode=mode)], OTHERS)
        assert {check.what for check in found} == kinds and {check.precision for check in found} == {precision}
        of_model = _checks_of([Job("cvt_13", "cvt_13", 64, mode, "fastvit", STREAM)], OTHERS)
        assert {check.operator for check in of_model} == set(OPERATORS_OF["cvt_13"]) and found < of_model
        queries = _checks_of([JOBS[0]._replace(suite="query_attention", mode=mode)], OTHERS)
        assert {check.operator for check in queries} == {"global_attention"}


def test_checks_are_in_the_dtypes_that_are_measured() -> None:
    jobs = [JOBS[0], JOBS[0]._replace(dtype="fp16", mode=TRAINING), JOBS[0]._replace(dtype="fp32")]
    found = {(check.precision, check.what) for check in _checks_of(jobs, OTHERS)}
    expected = {("bfloat16", "forward"), ("bfloat16", "graph"), ("float16", "gradients"), ("float32", "forward")}
    assert found == expected


def test_the_command_needs_a_gpu() -> None:
    with pytest.raises(UserError, match="--device cuda: torch sees no GPU"):
        cli.main(["--device=cuda", "--suite", "cvt_13"])
    for arguments, message in (
        (["--case", "nothing*", "--suite", "cvt_13"], r"^--suite cvt_13 --case nothing\*: no such row$"),
        (["--suite", "cvt_13", "--peers", "triton"], r"^--suite cvt_13 --peers triton: no such row$"),
        (
            ["--suite", "cvt_13", "--batch", "256"],
            r"^--suite cvt_13 --batch 256: no such row without --all, which has 8$",
        ),
        (["--all", "--suite", "cvt_13", "--peers", "cuda"], r"^--suite cvt_13 --peers cuda: no such row$"),
    ):
        with pytest.raises(UserError, match=message):
            cli.main(["--device", "cuda", *arguments])


@pytest.mark.parametrize("arguments", [["--minutes", "0"], ["--suite", "x"], ["--batch", "3"], ["--peers", "openvino"]])
def test_bad_options_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--device", "cuda", *arguments])
    assert stopped.value.code == 2


def test_the_command_runs_on_a_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of it but the GPU itself."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(checking, "problems", lambda device: {"cuda": "not built: for this test"})
    monkeypatch.setattr(gpu_cli, "_parts", lambda jobs, without: [Part(jobs, checks(["cpu"], ["float32"])[:1])])
    monkeypatch.setattr(gpu_cli, "Worker", lambda device: Inline())
    monkeypatch.setattr(gpu_cli, "Request", functools.partial(Request, plan=PLAN, find=find))
    wanted = [job._replace(launch=GRAPH) for job in (*JOBS, JOBS[0]._replace(peer="cuda"))]
    monkeypatch.setattr(gpu_cli, "core_jobs", lambda: wanted)
    chosen = tmp_path / "tuning.json"
    arguments = ["--device", "cuda", "--output", str(tmp_path), "--preferences", str(chosen)]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "without cuda: not built: for this test" in out and "1 of 1 checks, 0 failed; 2 of 2 rows" in out
    (preference,) = tuning.read(chosen).preferences
    assert preference.operator == "pointwise_mlp" and set(preference.milliseconds) == {"cpu", "reference"}
    assert (tmp_path / "test-gpu-1.md").exists() and (tmp_path / "test-gpu-1-operators.png").exists()
    assert len(all_jobs()) > 1000
