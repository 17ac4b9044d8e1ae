"""Tuning on a GPU: at every place the candidates that compile well, whose numbers are right, are timed."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, Protocol, TypeVar

from fastvit_kernels.bench.gpu.device import Device
from fastvit_kernels.bench.gpu.jobs import FORWARD, GRAPH, OPERATORS, TRAINING, Find, Job, cases_of, find
from fastvit_kernels.bench.gpu.measure import Plan, judge, made, repeated
from fastvit_kernels.bench.gpu.peers import prepare
from fastvit_kernels.bench.gpu.worker import Lost, TimedOut, Worker
from fastvit_kernels.bench.tune.candidates import candidates
from fastvit_kernels.bench.tune.places import Call, Place, with_config
from fastvit_kernels.bench.tune.survey import Surveyed, places, survey
from fastvit_kernels.ops import library, tuning
from fastvit_kernels.ops.triton_configs import Config
from fastvit_kernels.ops.tuning import Launch, Tuning

Say = Callable[[str], None]
# Seconds, or None for as many as it takes.
Left = Callable[[], float | None]
T = TypeVar("T")

BATCH = 64
# Sums of partial sums: as wide as a weight or a table is, and quick whatever their tiles.
SKIPPED = ("sum",)
# Enough to see an error, and quick in fp64.
_JUDGED = 2
_LIMIT = 60.0
_AHEAD = 2
# A candidate must be this much faster to take the place of the usual configuration.
_GAIN = 0.97


class Pool(Protocol):
    """Processes in which kernels are compiled for GPUs that need not be there."""

    def submit(self, function: Callable[..., T], /, *arguments: Any) -> Any: ...


@dataclass(frozen=True)
class Request:
    """What is wanted.

    Attributes:
        calls: whose kernels are tuned, the most important first.
        architecture: of the device.
        output: the tuning file; what it has from this device is not measured again.
        minutes: nothing is started after them, nor goes on; a place that they end in is left for another run.
        kernels: only these; None for all.
        plan: for every candidate.
        find: makes the calls' cases.
        retry: places whose usual configuration failed once more.
    """

    calls: Sequence[Call]
    architecture: str
    output: Path
    minutes: float = 10.0
    kernels: Sequence[str] | None = None
    plan: Plan = field(default_factory=lambda: Plan(seconds=0.05, fewest=10, most=100))
    find: Find = find
    retry: bool = False

    def wants(self, place: Place) -> bool:
        return place.kernel not in SKIPPED if self.kernels is None else place.kernel in self.kernels


class Outcome(NamedTuple):
    """Places tuned in this run, calls left for another, and of the file's entries those faster than the usual ones, and
    those whose usual one failed."""

    tuned: int
    left: int
    faster: int
    failed: int

    def __str__(self) -> str:
        text = f"{self.tuned} places tuned, {self.faster} of the file's entries are faster than the usual configuration"
        text += f", which failed at {self.failed} (--retry repeats those)" if self.failed else ""
        return f"{text}; {self.left} calls are left: the same command goes on from here" if self.left else text


def all_calls(batch: int = BATCH) -> list[Call]:
    """Every operator that has Triton kernels, at every published shape; forward first."""
    suites = [name for name, op in OPERATORS.items() if any(b.name == "triton" for b in library.operators[op].backends)]
    return [Call(s, case, batch, m) for m, s in product((FORWARD, TRAINING), suites) for case in cases_of(s)]


def dry_run(request: Request, pool: Pool) -> Iterator[tuple[Call, Place, list[Surveyed]]]:
    """Every place with its candidates, the usual configuration first, each place at the first call that has it."""
    return _surveyed(request, pool, (), lambda: None)


def _surveyed(
    request: Request, pool: Pool, known: Iterable[Place], left: Left
) -> Iterator[tuple[Call, Place, list[Surveyed]]]:
    """Compiles ahead of who takes them.

    Raises:
        TimeoutError: the seconds that were left are over.
    """
    waiting: deque[tuple[Call, Place, list[Any]]] = deque()
    for call, place, usual in _places(request, pool, known, left):
        tasks = [pool.submit(survey, call, place, config, request.find) for config in candidates(place.kernel, usual)]
        waiting.append((call, place, tasks))
        if len(waiting) > _AHEAD:
            yield _done(waiting.popleft(), left)
    while waiting:
        yield _done(waiting.popleft(), left)


def _done(waiting: tuple[Call, Place, list[Any]], left: Left) -> tuple[Call, Place, list[Surveyed]]:
    call, place, tasks = waiting
    return call, place, [_result(task, left) for task in tasks]


def _result(task: Any, left: Left) -> Any:
    try:
        return task.result(left())
    except futures.TimeoutError as error:
        # Another class before Python 3.11.
        raise TimeoutError from error


def _places(request: Request, pool: Pool, known: Iterable[Place], left: Left) -> Iterator[tuple[Call, Place, Config]]:
    seen = set(known)
    for call in request.calls:
        found: dict[Place, Config] = _result(pool.submit(places, call, request.architecture, request.find), left)
        for place, usual in found.items():
            if place not in seen and request.wants(place):
                seen.add(place)
                yield call, place, usual


def run(
    request: Request,
    pool: Pool,
    worker: Worker,
    say: Say,
    clock: Callable[[], float] = time.monotonic,
) -> Outcome:
    """Tune place after place; the file is written after each.

    Raises:
        RuntimeError: the device does not work.
        ValueError: the file holds something else.
    """
    end = clock() + 60 * request.minutes
    before = tuning.read(request.output) if request.output.exists() else Tuning()
    try:
        device = worker.run(_name, limit=_LIMIT)
    except Lost as error:
        raise RuntimeError(f"the device does not work: {error}") from error
    entries = {Place(*entry.place): entry for entry in before.launches}
    known = {p for p, e in entries.items() if e.device == device and not (request.retry and e.failed)}
    tuned, reached = 0, 0

    def left() -> float:
        return max(end - clock(), 0.0)

    with contextlib.suppress(TimeoutError):
        for call, place, surveyed in _surveyed(request, pool, known, left):
            reached = request.calls.index(call)
            usual, *others = surveyed
            configs = [candidate.config for candidate in others if not candidate.reason]
            entry = _tune(request, worker, call, place, usual.config, configs, device, say, left)
            entries[place] = entry
            tuning.write(request.output, Tuning(tuple(entries[at] for at in sorted(entries)), before.preferences))
            tuned += not entry.failed
        reached = len(request.calls)
    faster = sum(entry.milliseconds < entry.usual_milliseconds for entry in entries.values())
    return Outcome(tuned, len(request.calls) - reached, faster, sum(entry.failed for entry in entries.values()))


def _name(device: Device) -> str:
    return device.name()


def _tune(
    request: Request,
    worker: Worker,
    call: Call,
    place: Place,
    usual: Config,
    configs: Sequence[Config],
    device: str,
    say: Say,
    left: Callable[[], float],
) -> Launch:
    """The entry of a place.

    Raises:
        TimeoutError: the seconds that were left are over before all candidates were tried.
    """
    times: dict[Config, float] = {}
    for config in (usual, *configs):
        limit = min(_LIMIT, left())
        if limit <= 0:
            raise TimeoutError
        try:
            times[config] = worker.run(try_config, call, place, config, request.find, request.plan, limit=limit)
        except Lost as error:
            if isinstance(error, TimedOut) and limit < _LIMIT:
                raise TimeoutError from error
            say(f"{place}: {tuple(config)}: {str(error)[:160]}")
            if config == usual:
                return place.launch(usual, device)
    best = min(times, key=lambda config: times[config])
    if times[best] > _GAIN * times[usual]:
        best = usual
    say(f"{place}: {tuple(best)} {times[best]:.4g} ms, {tuple(usual)} {times[usual]:.4g} ms in {call}")
    return place.launch(best, device, times[best], times[usual])


def try_config(device: Device, call: Call, place: Place, config: Config, find: Find, plan: Plan) -> float:
    """Milliseconds of the call with this configuration, replayed from a graph, once its numbers are right.

    Raises:
        NumericsError: they are not.
        CaptureRefused: no graph holds the call.
    """
    job = Job(call.suite, call.case, call.batch, call.mode, "triton", GRAPH, call.dtype)
    with tuning.using(with_config(place, config)):
        judged = made(find, job._replace(batch=_JUDGED), device)
        judge(job, judged, prepare(job, judged))
        step = prepare(job, made(find, job, device))
        return 1e3 * median(repeated(device, device.capture(step), plan, cold=True))
