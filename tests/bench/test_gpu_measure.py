"""Rows of a GPU, measured on this CPU: the numbers first, in both modes and from a graph."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import gpu_host
import pytest
import torch
from gpu_host import Host, find

from fastvit_kernels.bench.cases import Case
from fastvit_kernels.bench.flops import Cost
from fastvit_kernels.bench.gpu import measure as measuring
from fastvit_kernels.bench.gpu import peers
from fastvit_kernels.bench.gpu.device import CaptureRefused, Gpu
from fastvit_kernels.bench.gpu.jobs import BATCHES, FORWARD, GRAPH, MODELS, OPERATORS, STREAM, TRAINING, Job, all_jobs
from fastvit_kernels.bench.gpu.jobs import find as find_published
from fastvit_kernels.bench.gpu.measure import Plan, measure, with_limits
from fastvit_kernels.bench.gpu.peers import OURS, PEERS
from fastvit_kernels.bench.gpu.rows import Row
from fastvit_kernels.bench.results import FAILED, OK, UNAVAILABLE
from fastvit_kernels.bench.roofline import Roofline
from fastvit_kernels.bench.suites import SUITES
from fastvit_kernels.bench.training import Training

PLAN = Plan(seconds=0.0, fewest=2, most=3)
TINY = ("cvt_13", "cmt_s", "dhvt_small_imagenet_patch16", "depthwise_mlp", "pointwise_mlp", "global_attention")


def _job(suite: str, mode: str = FORWARD, peer: str = "fastvit", launch: str = STREAM, case: str | None = None) -> Job:
    return Job(suite, case or (suite if suite in MODELS else "tiny"), 2, mode, peer, launch)


def _measured(job: Job, **options: object) -> Row:
    return measure(Host(), job, find, PLAN, **options)


@pytest.fixture(autouse=True)
def forget():
    yield
    measuring._case.cache_clear()


@pytest.mark.parametrize("mode", [FORWARD, TRAINING])
@pytest.mark.parametrize("suite", [*TINY, "conv_projection"])
def test_a_row_of_each_peer(suite: str, mode: str) -> None:
    of_attention = ["sdpa"] if find(suite, "", 2).attention else []
    of_attention += ["fastvit_sdpa"] if suite == "global_attention" else []
    for peer in ("fastvit", "eager", *of_attention):
        row = _measured(_job(suite, mode, peer))
        assert row.status == OK, row.reason
        assert row.job == _job(suite, mode, peer)
        assert row.variant == ("cast" if mode == FORWARD else "autocast")
        assert row.error is not None and row.error_allowed is not None and 0 < row.error <= row.error_allowed
        assert row.p20_ms is not None and row.p50_ms is not None and row.p80_ms is not None and row.min_ms is not None
        assert 0 < row.min_ms <= row.p20_ms <= row.p50_ms <= row.p80_ms
        assert 2 <= row.calls <= 3 and row.peak_mb == 3.0
        ran = {entry.split(":")[0] for entry in row.backends.split()}
        assert (suite in ran if suite in OPERATORS else len(ran) > 1) if peer in OURS else not ran
        assert peer != "fastvit_sdpa" or row.backends.split(":")[1] == "sdpa"


def test_training_runs_our_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is fused trains, and both compute gradients of the same leaves."""
    case = find("depthwise_mlp", "tiny", 2)
    ours, stock = (
        Training(module, case, "autocast").gradients()
        for module in (case.fuse(peers.stock(case, TRAINING, "autocast")), peers.stock(case, TRAINING, "autocast"))
    )
    assert [g.shape for g in ours] == [g.shape for g in stock]
    # 3 batch norms, LayerNorm, three layers with biases, and the input.
    assert len(ours) == 6 + 2 + 6 + 1
    assert not torch.equal(ours[0], torch.zeros_like(ours[0]))


@pytest.mark.parametrize("mode", [FORWARD, TRAINING])
def test_a_row_from_a_graph(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    captured = []
    capture = Host.capture
    monkeypatch.setattr(Host, "capture", lambda self, run: captured.append(1) or capture(self, run))
    row = _measured(_job("pointwise_mlp", mode, launch=GRAPH))
    assert row.status == OK and row.launch == GRAPH and captured == [1] and row.peak_mb == 3.0, row.reason


@pytest.mark.parametrize(("mode", "judged"), [(FORWARD, 8), (TRAINING, 8), (TRAINING, 1)])
def test_a_graph_with_other_results_gets_no_time(mode: str, judged: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of more images than are judged are compared with those of the call."""
    monkeypatch.setattr(measuring, "JUDGED", judged)
    assert _measured(_job("pointwise_mlp", mode, launch=GRAPH)).status == OK
    monkeypatch.setattr(Host, "capture", lambda self, run: lambda: tuple(1.1 * y for y in run()))
    row = _measured(_job("pointwise_mlp", mode, launch=GRAPH))
    assert row.status == FAILED and row.p50_ms is None
    assert ("difference" if judged == 1 else "error") in row.reason


def test_what_no_graph_holds_is_timed_without_one_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Host, run: object) -> None:
        raise CaptureRefused("RuntimeError: operation not permitted when stream is capturing")

    monkeypatch.setattr(Host, "capture", refuse)
    row = _measured(_job("pointwise_mlp", launch=GRAPH))
    assert row.status == OK and row.p50_ms is not None and row.job == _job("pointwise_mlp", launch=GRAPH)
    assert row.variant == "cast-uncaptured" and "not from a graph: RuntimeError: operation not perm" in row.reason
    # Models have rows without graphs anyway.
    row = _measured(_job("cvt_13", launch=GRAPH))
    assert row.status == FAILED and row.p50_ms is None and "CaptureRefused" in row.reason


def test_a_refused_capture_names_its_cause_and_spoils_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    usual, streams = mock.MagicMock(), []

    @contextlib.contextmanager
    def graph(recorded: object) -> Iterator[None]:
        try:
            yield
        finally:
            raise RuntimeError("the end of the capture")

    calls = []

    def run() -> None:
        calls.append(1)
        if len(calls) > 3:
            raise ValueError("not while capturing")

    for name, value in {
        "Stream": mock.MagicMock,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda: usual,
        "set_stream": streams.append,
        "CUDAGraph": mock.MagicMock,
        "graph": graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    device = Gpu()
    assert not device.spoiled
    with pytest.raises(CaptureRefused, match="^ValueError: not while capturing$"):
        device.capture(run)
    assert device.spoiled and streams == [usual]


def test_compiled_row() -> None:
    row = _measured(_job("pointwise_mlp", peer="compile"))
    assert row.status == OK, row.reason


@pytest.mark.parametrize("mode", [FORWARD, TRAINING])
def test_what_is_compiled_has_one_size_and_is_compiled_once(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are judged on fewer images: a second compilation, of fixed sizes as well."""
    sizes = []
    compile = torch.compile

    def backend(graph, inputs):
        sizes.append([size for x in inputs for size in (x.shape if isinstance(x, torch.Tensor) else [x])])
        return graph

    def recording(module, *, mode, **options):
        return compile(module, backend=backend, **options)

    torch._dynamo.reset()
    # Even where the compiler remembers other sizes.
    monkeypatch.setattr(torch._dynamo, "reset", lambda: None)
    monkeypatch.setattr(torch, "compile", recording)
    monkeypatch.setattr(measuring, "JUDGED", 2)
    row = _measured(_job("pointwise_mlp", mode, peer="compile")._replace(batch=3))
    assert row.status == OK, row.reason
    assert all(type(size) is int for found in sizes for size in found)
    batches = [next(n for n in found if n in (2, 3)) for found in sizes]
    assert batches == ([3] if mode == FORWARD else [2, 3])


def test_replays_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled function whose first calls are right and whose others are not."""
    calls = []

    def prepare(job: Job, case: Case):
        step = peers.prepare(job._replace(peer="eager"), case)
        return lambda: tuple((1.0 if calls.append(1) or len(calls) < 3 else 1.1) * y for y in step())

    monkeypatch.setattr(measuring, "prepare", prepare)
    row = _measured(_job("pointwise_mlp", peer="compile"))
    assert row.status == FAILED and row.p50_ms is None


def test_memory_of_graphs_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """7 bytes beside a graph whose pool of 40 has 3 more of results in it after the call."""
    active = iter([10, 13])
    allocator = {
        "synchronize": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 100,
        "max_memory_allocated": lambda: 110,
        "memory_snapshot": lambda: [
            {"segment_pool_id": (0, 0), "active_size": 1000, "total_size": 2000},
            {"segment_pool_id": (0, 1), "active_size": next(active, 13), "total_size": 40},
        ],
    }
    for name, function in allocator.items():
        monkeypatch.setattr(torch.cuda, name, function)
    assert Gpu().peak_bytes(lambda: None) == 7 + 40


@pytest.mark.parametrize("mode", [FORWARD, TRAINING])
@pytest.mark.parametrize(
    ("case", "status", "reason"),
    [
        ("right", OK, ""),
        ("wrong", FAILED, "error"),
        ("error", FAILED, "RuntimeError: no kernel image"),
        ("no memory", UNAVAILABLE, "out of memory"),
    ],
)
def test_one_that_fails_is_a_row(case: str, status: str, reason: str, mode: str) -> None:
    row = _measured(_job("pointwise_mlp", mode, case=case))
    assert row.status == status and reason in row.reason
    assert (row.p50_ms is None) == (status != OK)


def test_a_foreign_failure_is_no_fault_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **options: object) -> None:
        raise RuntimeError("the compiler\nbroke")

    monkeypatch.setattr(torch, "compile", broken)
    row = _measured(_job("pointwise_mlp", peer="compile"))
    assert (row.status, row.reason) == (UNAVAILABLE, "RuntimeError: the compiler broke")


def test_backends_that_cannot_run_are_named() -> None:
    row = _measured(_job("pointwise_mlp", peer="cuda"))
    assert row.status == UNAVAILABLE and "backend 'cuda' cannot run this call" in row.reason


@pytest.mark.parametrize("suite", ["pointwise_mlp", "cvt_13"])
def test_what_failed_its_checks_gets_no_time(suite: str) -> None:
    row = _measured(_job(suite), distrusted=["pointwise_mlp:cpu"])
    assert row.status == FAILED and row.p50_ms is None
    assert row.reason == "pointwise_mlp:cpu: failed the checks of correctness on this device"
    for other in (_job(suite, peer="eager"), _job("global_attention")):
        assert _measured(other, distrusted=["pointwise_mlp:cpu"]).status == OK


@pytest.mark.parametrize("mode", [FORWARD, TRAINING])
@pytest.mark.parametrize(("dtype", "eps"), [("fp32", 1e-6), ("fp16", 1e-3)])
def test_other_dtypes(mode: str, dtype: str, eps: float) -> None:
    row = _measured(_job("pointwise_mlp", mode, peer="eager")._replace(dtype=dtype))
    assert (row.status, row.dtype) == (OK, dtype) and row.job.dtype == dtype
    assert eps / 100 < row.error < 3 * eps


def test_wrong_gradients_get_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(job: Job, case: Case):
        step = peers.prepare(job, case)
        return lambda: tuple(1.05 * g for g in step())

    monkeypatch.setattr(measuring, "prepare", prepare)
    row = _measured(_job("pointwise_mlp", TRAINING))
    assert row.status == FAILED and "gradients: relative L2 error" in row.reason and row.p50_ms is None


def test_gradients_are_judged_on_few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = []

    def counted(suite: str, case: str, batch: int):
        batches.append(batch)
        return find(suite, case, batch)

    monkeypatch.setattr(measuring, "JUDGED", 1)
    row = measure(Host(), _job("pointwise_mlp", TRAINING), counted, PLAN)
    assert row.status == OK and batches == [2, 1]


def test_limits_by_hand() -> None:
    limits = Roofline(fp32_gflops=50.0, bf16_gflops=100.0, copy_gbs=10.0)
    row = Row(*_job("pointwise_mlp"), "cast", OK, p50_ms=4.0)
    # 2e8 operations at 100e9 a second take 2 ms, 1e7 bytes at 10e9 a second 1 ms.
    cost = Cost(macs=10**8, weights=10**6, activations=4 * 10**6)
    found = with_limits(row, cost, limits)
    assert (found.gflop, found.least_mb) == (pytest.approx(0.2), pytest.approx(10.0))
    assert (found.floor_ms, found.floor_multiple) == (pytest.approx(2.0), pytest.approx(2.0))
    assert (found.tflops, found.tbs) == (pytest.approx(0.05), pytest.approx(0.0025))
    trained = with_limits(replace(row, mode=TRAINING), cost, limits)
    assert (trained.gflop, trained.least_mb) == (pytest.approx(0.6), pytest.approx(20.0))
    assert trained.floor_ms == pytest.approx(6.0)
    failed = with_limits(replace(row, p50_ms=None, status=FAILED), cost, limits)
    assert failed.floor_ms == pytest.approx(2.0) and failed.tflops is None and failed.floor_multiple is None


def test_calls_fill_the_time() -> None:
    class Clock(Host):
        def times(self, run, calls, cold):
            self.asked = calls, cold
            return [0.01] * calls

    device = Clock()
    for seconds, calls in ((0.3, 30), (0.001, 10), (100.0, 200)):
        assert len(measuring.repeated(device, lambda: None, Plan(seconds), cold=True)) == calls
        assert device.asked == (calls, True)


def test_operators_start_cold_and_models_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = set()
    times = Host.times
    monkeypatch.setattr(Host, "times", lambda self, run, calls, cold: asked.add(cold) or times(self, run, calls, cold))
    _measured(_job("pointwise_mlp"))
    assert asked == {True}
    asked.clear()
    _measured(_job("cvt_13"))
    assert asked == {False}


def test_everything_asked_for_is_a_job() -> None:
    jobs = all_jobs()
    assert len(set(jobs)) == len(jobs)
    kinds = {(job.suite, job.batch, job.mode, job.launch) for job in jobs}
    for mode in (FORWARD, TRAINING):
        for suite in MODELS:
            assert {(suite, batch, mode, STREAM) for batch in BATCHES} <= kinds
            assert (suite, 1, mode, GRAPH) in kinds and (suite, 64, mode, GRAPH) not in kinds
        for suite in OPERATORS:
            assert {(suite, batch, mode, GRAPH) for batch in BATCHES} <= kinds
            assert (suite, 64, mode, STREAM) not in kinds
    cases = {(job.suite, job.case) for job in jobs}
    assert cases == {(name, case.name) for name in (*MODELS, *OPERATORS) for case in SUITES[name](1)}
    assert {job.peer for job in jobs} == set(PEERS)
    # Those that the goals are about come first.
    first = [job[:5] for job in jobs[: 4 * len(MODELS)]]
    compared = ("fastvit", "eager", "compile", "sdpa")
    assert first == [(name, name, 64, FORWARD, peer) for name in MODELS for peer in compared]
    assert all(job.peer in OURS for job in jobs if job.peer in ("triton", "cuda"))
    two = {job.suite for job in jobs if job.peer == "cuda"}
    assert two == {"conv_projection", "depthwise_mlp", "local_attention"}


def test_published_cases_are_found_by_name() -> None:
    case = find_published("depthwise_mlp", "cmt_s-stage3", 64)
    assert (case.suite, case.name, case.batch) == ("depthwise_mlp", "cmt_s-stage3", 64)
    case.remember("something", lambda: 1)
    assert find_published("depthwise_mlp", "cmt_s-stage3", 64).remember("something", lambda: 2) == 2


def test_cases_are_made_on_their_device() -> None:
    case = replace(gpu_host.find("conv_projection", "tiny", 2), device="meta")
    assert {t.device.type for t in (*case.stock("cast").parameters(), *case.inputs("cast"))} == {"meta"}
