"""A run on a GPU, as long as the time allows: of each part correctness first, then its rows; the next run goes on."""

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
from fastvit_kernels.bench.gpu.jobs import MODELS, TRAINING, Find, Job, find
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
# What a row may take at most; and what one of its kind is expected to take, before any has been measured: guesses, as
# no GPU has run any of this yet. What trains is compiled twice: once for the few images on which it is judged.
_LIMITS = {"compile": 300.0, "compile, training": 450.0, "others": 120.0}
_EXPECTED = {
    ("compile", True): 60.0,
    ("compile", False): 30.0,
    ("compile, training", True): 150.0,
    ("compile, training", False): 60.0,
    ("others", True): 8.0,
    ("others", False): 4.0,
}
_EXPECTED_CHECK = 3.0
# What is repeated on request, and a defect where it is a check or a row of ours.
_LOST = (FAILED, TIMED_OUT)


class Part(NamedTuple):
    """Rows, the most important first, and the checks of correctness that come before them."""

    jobs: Sequence[Job]
    checks: Sequence[Check] = ()


@dataclass(frozen=True)
class Request:
    """What is wanted.

    Attributes:
        parts: one after the other; a check that several have is done once.
        output: folder of the files.
        minutes: nothing is started that would end after them.
        processes: that share the device while nothing is timed.
        plan: for every row.
        retry: repeat what failed or took too long.
        find: makes the jobs' cases.
    """

    parts: Sequence[Part]
    output: Path
    minutes: float = 30.0
    processes: int = 1
    plan: Plan = field(default_factory=Plan)
    retry: bool = False
    find: Find = find

    @property
    def jobs(self) -> list[Job]:
        return list(dict.fromkeys(job for part in self.parts for job in part.jobs))

    @property
    def checks(self) -> list[Check]:
        return list(dict.fromkeys(check for part in self.parts for check in part.checks))


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
    if job.peer != "compile":
        return "others"
    return "compile, training" if job.mode == TRAINING else "compile"


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
        checks = _checked_before(request, conditions)
        found = _measured_before(request, conditions)
        _announce(request, checks, found, conditions, say)
        for part in request.parts:
            _check(request, part, checks, make_worker, conditions, budget, say)
            if checks.keys() >= set(part.checks):
                failed = {f"{row.operator}:{row.backend}" for row in checks.values() if row.status in _LOST}
                _measure(request, part, found, worker, conditions, limits, budget, sorted(failed), say)
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


def _checked_before(request: Request, conditions: Conditions) -> dict[Check, CheckRow]:
    path = files.checks_file(request.output, conditions.device)
    known = _known(files.read_checks(path), conditions, request.retry) if path.exists() else []
    wanted = set(request.checks)
    return {row.check: row for row in known if row.check in wanted}


def _measured_before(request: Request, conditions: Conditions) -> dict[Job, Row]:
    path = files.rows_file(request.output, conditions.device)
    known = _known(files.read(path), conditions, request.retry) if path.exists() else []
    wanted = set(request.jobs)
    return {row.job: row for row in known if row.job in wanted}


def _announce(
    request: Request, checks: Collection[Check], found: Collection[Job], conditions: Conditions, say: Say
) -> None:
    left = [job for job in request.jobs if job not in found]
    minutes = estimate(left, len(request.checks) - len(checks), request.processes)
    say(
        f"{conditions.device}: {len(request.checks)} checks, {len(checks)} of them done before; {len(request.jobs)} "
        f"rows, {len(found)} of them done before; the others take about {minutes:.0f} minutes"
    )


def _check(
    request: Request,
    part: Part,
    found: dict[Check, CheckRow],
    make_worker: MakeWorker,
    conditions: Conditions,
    budget: Budget,
    say: Say,
) -> None:
    """Do the part's checks that are not among those found, and add them."""
    path = files.checks_file(request.output, conditions.device)
    waiting = [check for check in part.checks if check not in found]
    pending = iter(waiting)
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

    processes = min(request.processes, len(waiting))
    if waiting and budget.left > 0:
        say(f"{len(waiting)} checks of correctness")
        with ThreadPoolExecutor(processes) as pool:
            list(pool.map(work, range(processes)))


def _known(records: Iterable[tuple[Kind, Conditions]], conditions: Conditions, retry: bool) -> list[Kind]:
    """What was measured or checked under these conditions and need not be again."""
    return [row for row, other in records if conditions.repeats(other) and not (retry and row.status in _LOST)]


def _measure(
    request: Request,
    part: Part,
    found: dict[Job, Row],
    worker: Worker,
    conditions: Conditions,
    limits: Roofline,
    budget: Budget,
    distrusted: Collection[str],
    say: Say,
) -> None:
    """Measure the part's rows that are not among those found, and add them."""
    path = files.rows_file(request.output, conditions.device)
    for job in part.jobs:
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


def _summary(row: Row) -> str:
    if row.p50_ms is None:
        return f"{row.status}: {row.reason[:120]}"
    assert row.floor_multiple is not None and not math.isnan(row.p50_ms)
    text = f"{row.p50_ms:.4g} ms, {row.floor_multiple:.2f} x floor"
    return f"{text}; {row.reason[:120]}" if row.reason else text
