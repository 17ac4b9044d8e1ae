"""A run on a GPU: correctness first, then row after row as long as the time allows; the next run goes on from there."""

from __future__ import annotations

import datetime
import math
import platform
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median_low
from typing import NamedTuple, TypeVar

import torch

from fastvit_kernels.bench import machine
from fastvit_kernels.bench.gpu import rows as files
from fastvit_kernels.bench.gpu.device import Device
from fastvit_kernels.bench.gpu.jobs import MODELS, Find, Job, find
from fastvit_kernels.bench.gpu.measure import Plan, measure, with_limits
from fastvit_kernels.bench.gpu.peers import OURS, VARIANTS
from fastvit_kernels.bench.gpu.rows import TIMED_OUT, CheckRow, Conditions, Row
from fastvit_kernels.bench.gpu.worker import Lost, TimedOut, Worker
from fastvit_kernels.bench.results import FAILED, OK, UNAVAILABLE
from fastvit_kernels.bench.roofline import Roofline
from fastvit_kernels.testing.device import Check, run_check
from fastvit_kernels.testing.numerics import NumericsError

Say = Callable[[str], None]
MakeWorker = Callable[[], Worker]
Kind = TypeVar("Kind", Row, CheckRow)

_START, _CHECK = 120.0, 120.0
# What a row may take at most; and what one of its kind is expected to take, compiled or not, of a model or of an
# operator, before any has been measured: guesses, as no GPU has run any of this yet.
_LIMITS = {"compile": 300.0, "others": 120.0}
_EXPECTED = {("compile", True): 60.0, ("compile", False): 30.0, ("others", True): 8.0, ("others", False): 3.0}
_EXPECTED_CHECK = 3.0
# What is repeated on request, and a defect where it is a check or a row of ours.
_LOST = (FAILED, TIMED_OUT)


@dataclass(frozen=True)
class Request:
    """What is wanted.

    Attributes:
        jobs: the rows, the most important first.
        checks: of correctness, before any row.
        output: folder of the files.
        minutes: nothing is started that would end after them.
        processes: that share the device while nothing is timed.
        plan: for every row.
        retry: repeat what failed or took too long.
        find: makes the jobs' cases.
    """

    jobs: Sequence[Job]
    checks: Sequence[Check]
    output: Path
    minutes: float = 30.0
    processes: int = 1
    plan: Plan = field(default_factory=Plan)
    retry: bool = False
    find: Find = find


class Outcome(NamedTuple):
    """What there is after a run: counts of checks and rows, wanted and done, and the file of the rows."""

    checks: int
    checks_done: int
    checks_failed: int
    rows: int
    rows_done: int
    ours_failed: int
    file: Path

    @property
    def complete(self) -> bool:
        return self.checks_done == self.checks and self.rows_done == self.rows

    def __str__(self) -> str:
        text = f"{self.checks_done} of {self.checks} checks, {self.checks_failed} failed; "
        text += f"{self.rows_done} of {self.rows} rows, {self.ours_failed} of ours failed"
        return text if self.complete else f"{text}; the same command goes on from here"


class Budget:
    """What is left of the time, and how long a row of some kind may be expected to take."""

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self._clock, self._end = clock, clock() + seconds
        self._taken: dict[tuple[str, bool], list[float]] = {}

    @property
    def left(self) -> float:
        return self._end - self._clock()

    def expected(self, job: Job) -> float:
        """The median of what rows of its kind took and of what the first was expected to: one slow row says little."""
        kind = _kind(job)
        return median_low([_EXPECTED[kind], *self._taken.get(kind, [])])

    def note(self, job: Job, seconds: float) -> None:
        self._taken.setdefault(_kind(job), []).append(seconds)


def estimate(jobs: Iterable[Job], checks: int, processes: int) -> float:
    """Minutes that so many checks and these rows are expected to take, before anything has been measured."""
    seconds = checks * _EXPECTED_CHECK / processes + sum(_EXPECTED[_kind(job)] for job in jobs)
    return seconds / 60


def _class(job: Job) -> str:
    return "compile" if job.peer == "compile" else "others"


def _kind(job: Job) -> tuple[str, bool]:
    return _class(job), job.suite in MODELS


def run(request: Request, make_worker: MakeWorker, say: Say, clock: Callable[[], float] = time.monotonic) -> Outcome:
    """Check, then measure what no file has yet, each row written as it is finished.

    Args:
        request: what is wanted.
        make_worker: what works on the device.
        say: told what is going on.
        clock: seconds.

    Raises:
        RuntimeError: the device does not work.
    """
    budget = Budget(60 * request.minutes, clock)
    worker = make_worker()
    try:
        conditions, limits = _conditions(worker)
        checks = _check(request, make_worker, conditions, budget, say)
        failed = {f"{row.operator}:{row.backend}" for row in checks.values() if row.status in _LOST}
        found: dict[Job, Row] = {}
        if len(checks) == len(request.checks):
            found = _measure(request, worker, conditions, limits, budget, sorted(failed), say)
    finally:
        worker.close()
    return Outcome(
        len(request.checks),
        len(checks),
        sum(row.status in _LOST for row in checks.values()),
        len(request.jobs),
        len(found),
        sum(row.status in _LOST and row.peer in OURS for row in found.values()),
        files.rows_file(request.output, conditions.device),
    )


def _describe(device: Device) -> tuple[str, str, Roofline]:
    return device.name(), device.capability(), device.limits()


def _conditions(worker: Worker) -> tuple[Conditions, Roofline]:
    try:
        name, capability, limits = worker.run(_describe, limit=_START)
    except Lost as error:
        raise RuntimeError(f"the device does not work: {error}") from error
    conditions = Conditions(
        device=name,
        capability=capability,
        peak_tflops=limits.peak("bf16") / 1e3,
        copy_tbs=limits.copy_gbs / 1e3,
        python=platform.python_version(),
        torch=torch.__version__,
        triton=machine.version("triton"),
        cuda=torch.version.cuda or "",
        fastvit_kernels=machine.version("fastvit-kernels"),
        sources=machine.sources(),
        tuning=machine.tuned(),
        commit=machine.commit(),
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    )
    return conditions, limits


def _check_on(device: Device, check: Check) -> CheckRow:
    try:
        run_check(check, device.type, device.capture)
    except NumericsError as error:
        return CheckRow(*check, FAILED, " ".join(str(error).split()))
    except Exception as error:
        return CheckRow(*check, FAILED, " ".join(f"{type(error).__name__}: {error}".split()))
    return CheckRow(*check, OK)


def _check(
    request: Request, make_worker: MakeWorker, conditions: Conditions, budget: Budget, say: Say
) -> dict[Check, CheckRow]:
    """The results of all checks that were done, now or before."""
    path = files.checks_file(request.output, conditions.device)
    known = _known(files.read_checks(path), conditions, request.retry) if path.exists() else []
    wanted = set(request.checks)
    found = {row.check: row for row in known if row.check in wanted}
    pending = iter([check for check in request.checks if check not in found])
    lock = threading.Lock()

    def work(index: int) -> None:
        worker = make_worker()
        try:
            while budget.left > 0:
                with lock:
                    check = next(pending, None)
                if check is None:
                    return
                limit = min(_CHECK, budget.left)
                try:
                    row = worker.run(_check_on, check, limit=limit)
                except TimedOut as error:
                    if limit < _CHECK:
                        return
                    row = CheckRow(*check, TIMED_OUT, str(error))
                except Lost as error:
                    row = CheckRow(*check, FAILED, str(error))
                with lock:
                    found[check] = row
                    files.append(path, row, conditions)
                    if row.status != OK:
                        say(f"{row.status}: {check}: {row.reason[:200]}")
        finally:
            worker.close()

    left = len(request.checks) - len(found)
    processes = max(min(request.processes, left), 1)
    minutes = estimate([], left, processes)
    say(
        f"correctness on {conditions.device}: {len(request.checks)} checks, {len(found)} of them done before; "
        f"the others take about {minutes:.0f} minutes"
    )
    if left:
        with ThreadPoolExecutor(processes) as pool:
            list(pool.map(work, range(processes)))
    return found


def _known(records: Iterable[tuple[Kind, Conditions]], conditions: Conditions, retry: bool) -> list[Kind]:
    """What was measured or checked under these conditions and need not be again."""
    return [row for row, other in records if conditions.repeats(other) and not (retry and row.status in _LOST)]


def _measure(
    request: Request,
    worker: Worker,
    conditions: Conditions,
    limits: Roofline,
    budget: Budget,
    distrusted: Collection[str],
    say: Say,
) -> dict[Job, Row]:
    """The rows that there are, from now or before."""
    path = files.rows_file(request.output, conditions.device)
    known = _known(files.read(path), conditions, request.retry) if path.exists() else []
    wanted = set(request.jobs)
    found = {row.job: row for row in known if row.job in wanted}
    left = estimate([job for job in request.jobs if job not in found], 0, 1)
    say(f"{len(request.jobs)} rows, {len(found)} of them done before; the others take about {left:.0f} minutes")
    for job in request.jobs:
        if job in found or budget.left < budget.expected(job):
            continue
        limit = min(_LIMITS[_class(job)], budget.left)
        started = budget.left
        status = FAILED if job.peer in OURS else UNAVAILABLE
        row = Row(*job, variant=VARIANTS[job.dtype, job.mode], status=status)
        try:
            row = worker.run(measure, job, request.find, request.plan, distrusted, limit=limit)
        except TimedOut as error:
            if limit < _LIMITS[_class(job)]:
                # Not its fault: the next run has the whole time for it.
                break
            row = replace(row, status=TIMED_OUT, reason=str(error))
        except Lost as error:
            row = replace(row, reason=str(error))
        budget.note(job, started - budget.left)
        row = with_limits(row, request.find(job.suite, job.case, job.batch).cost, limits)
        files.append(path, row, conditions)
        found[job] = row
        say(f"{job}: {_summary(row)}")
    return found


def _summary(row: Row) -> str:
    if row.p50_ms is None:
        return f"{row.status}: {row.reason[:120]}"
    assert row.floor_multiple is not None and not math.isnan(row.p50_ms)
    return f"{row.p50_ms:.4g} ms, {row.floor_multiple:.2f} x floor"
