"""One row: the numbers first, then the time."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import numpy
import torch
from torch import Tensor

from fastvit_kernels.bench import gate, training
from fastvit_kernels.bench.cases import Case, Outputs
from fastvit_kernels.bench.flops import Cost
from fastvit_kernels.bench.gpu.device import CaptureRefused, Device, Run
from fastvit_kernels.bench.gpu.jobs import GRAPH, OPERATORS, TRAINING, Find, Job
from fastvit_kernels.bench.gpu.peers import OURS, VARIANTS, prepare
from fastvit_kernels.bench.gpu.rows import Row
from fastvit_kernels.bench.peers import Unavailable
from fastvit_kernels.bench.results import FAILED, OK, UNAVAILABLE
from fastvit_kernels.bench.roofline import DTYPES, Roofline
from fastvit_kernels.ops import dispatch
from fastvit_kernels.testing.numerics import NumericsError, relative_l2

# Gradients are judged on so many images: those in fp64 take a multiple of the memory.
JUDGED = 8
# A compiled function warms up, then records a graph, and then replays it, which is what is timed.
_CALLS_TO_REPLAY = 3
_REASON_LENGTH = 300
# Ends the variant of a row that should come from a graph and does not.
UNCAPTURED = "-uncaptured"


@dataclass(frozen=True)
class Plan:
    """How long a row is timed: `seconds` in all, but not fewer or more calls than these."""

    seconds: float = 0.3
    fewest: int = 10
    most: int = 200


def measure(device: Device, job: Job, find: Find, plan: Plan, distrusted: Collection[str] = ()) -> Row:
    """The row of a job, whatever happens but a device that has to be given up.

    Args:
        device: where.
        job: what to measure.
        find: makes the case.
        plan: how long.
        distrusted: operators and backends, as `global_attention:triton`, whose checks have failed: a row that one of
            them takes part in gets no time.
    """
    row = Row(*job, variant=VARIANTS[job.dtype, job.mode], status=OK)
    torch._dynamo.reset()
    device.release()
    try:
        return _measure(row, device, find, plan, distrusted)
    except Unavailable as error:
        return replace(row, status=UNAVAILABLE, reason=_short(str(error)))
    except torch.OutOfMemoryError:
        return replace(row, status=UNAVAILABLE, reason="out of memory")
    except NumericsError as error:
        return replace(row, status=FAILED, reason=_short(str(error)))
    except Exception as error:
        status = FAILED if job.peer in OURS else UNAVAILABLE
        return replace(row, status=status, reason=_short(f"{type(error).__name__}: {error}"))


def _measure(row: Row, device: Device, find: Find, plan: Plan, distrusted: Collection[str]) -> Row:
    job = row.job
    case = made(find, job, device)
    if job.mode == TRAINING and job.batch > JUDGED:
        fewer = made(find, job._replace(batch=JUDGED), device)
        verdict, ran = judge(job, fewer, prepare(job, fewer))
        # Compilers keep code, graphs and their memory.
        torch._dynamo.reset()
        device.release()
        step: Run = prepare(job, case)
    else:
        # Compiled once: what is timed is what was judged.
        step = prepare(job, case)
        verdict, ran = judge(job, case, step)
    row = replace(row, error=verdict.error, error_allowed=verdict.allowed, backends=" ".join(sorted(ran)))
    wrong = sorted({name for name in distrusted if any(entry.startswith(f"{name}:") for entry in ran)})
    if wrong:
        raise NumericsError(f"{', '.join(wrong)}: failed the checks of correctness on this device")
    step()
    row = replace(row, peak_mb=device.peak_bytes(step) / 1e6)
    if job.launch == GRAPH:
        try:
            step = _captured(job, case, device, step, verdict)
        except CaptureRefused as error:
            # A model has a row without a graph.
            if job.suite not in OPERATORS:
                raise
            row = replace(row, variant=row.variant + UNCAPTURED, reason=_short(f"not from a graph: {error}"))
    # An operator in a model finds its inputs in memory, a model its own.
    times = repeated(device, step, plan, cold=not case.end_to_end)
    p20, p50, p80 = (1e3 * float(value) for value in numpy.percentile(times, [20, 50, 80]))
    return replace(row, p20_ms=p20, p50_ms=p50, p80_ms=p80, min_ms=1e3 * min(times), calls=len(times))


def _captured(job: Job, case: Case, device: Device, step: Run, verdict: gate.Verdict) -> Run:
    """Replays of a step. What is timed is the replay: its results must be right as well."""
    if job.mode == TRAINING and job.batch > JUDGED:
        wanted = _as_vector(step())
        replay = device.capture(step)
        # Each of the two may have its error.
        difference = relative_l2(_as_vector(replay()), wanted)
        if not difference <= 2 * verdict.allowed:
            raise NumericsError(f"gradients of a replay: relative L2 difference {difference:.2e} from the call's")
        return replay
    replay = device.capture(step)
    _check(job, case, _as_outputs(replay()))
    return replay


def _as_vector(gradients: object) -> Tensor:
    return torch.cat([gradient.double().flatten() for gradient in _as_outputs(gradients)])


def _as_outputs(results: object) -> Outputs:
    assert isinstance(results, tuple)
    return results


def judge(job: Job, case: Case, step: Callable[[], Outputs]) -> tuple[gate.Verdict, set[str]]:
    """The error of what a step gives, which `prepare` has made of the case, and which backends made it."""
    recorder = dispatch.Recorder()
    for _ in range(_CALLS_TO_REPLAY - 1 if job.peer == "compile" else 0):
        step()
    with dispatch.record(recorder):
        results = step()
    verdict = _check(job, case, results)
    ran = {f"{d.operator}:{d.chosen}:{d.channels}" for d in recorder.decisions} if job.peer in OURS else set()
    return verdict, ran


def _check(job: Job, case: Case, results: Outputs) -> gate.Verdict:
    variant = VARIANTS[job.dtype, job.mode]
    if job.mode == TRAINING:
        return training.check(case, variant, results)
    return gate.check(case, variant, results, ours=job.peer in OURS)


def made(find: Find, job: Job, device: Device) -> Case:
    """The job's case on the device."""
    return _case(find, job.suite, job.case, job.batch, device.type)


@functools.lru_cache(maxsize=2)
def _case(find: Find, suite: str, name: str, batch: int, device: str) -> Case:
    """The jobs of one case follow each other: what it remembers serves all of them."""
    return replace(find(suite, name, batch), device=device, _remembered={})


def repeated(device: Device, step: Run, plan: Plan, cold: bool) -> list[float]:
    """Seconds of each of as many calls as the plan has time for."""
    once = max(device.times(step, 3, cold)[-1], 1e-9)
    return device.times(step, min(plan.most, max(plan.fewest, math.ceil(plan.seconds / once))), cold)


def with_limits(row: Row, cost: Cost, limits: Roofline) -> Row:
    """The row with its arithmetic and least traffic, and how near it comes to the device's limits."""
    if row.mode == TRAINING:
        cost = training.cost(cost)
    floor = 1e3 * limits.floor(cost, row.dtype)
    nbytes = cost.nbytes(DTYPES[row.dtype].itemsize)
    row = replace(row, gflop=cost.flops / 1e9, least_mb=nbytes / 1e6, floor_ms=floor)
    if row.p50_ms is None:
        return row
    return replace(
        row,
        floor_multiple=row.p50_ms / floor,
        tflops=cost.flops / row.p50_ms / 1e9,
        tbs=nbytes / row.p50_ms / 1e9,
    )


def _short(text: str) -> str:
    return " ".join(text.split())[:_REASON_LENGTH]
