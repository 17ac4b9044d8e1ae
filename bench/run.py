"""One benchmark run: who can take part, whose numbers are right, and only then how fast they are."""

from __future__ import annotations

import datetime
import gc
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from fastvit_kernels import environment
from fastvit_kernels.bench import machine, roofline
from fastvit_kernels.bench.cases import Case
from fastvit_kernels.bench.flops import Cost
from fastvit_kernels.bench.measure import Plan, Times, interleave
from fastvit_kernels.bench.modes import INFERENCE, Mode
from fastvit_kernels.bench.peers import Peer, Runner, Unavailable
from fastvit_kernels.bench.results import FAILED, OK, UNAVAILABLE, Conditions, Row
from fastvit_kernels.bench.roofline import Roofline
from fastvit_kernels.testing.numerics import NumericsError

Say = Callable[[str], None]
_REASON_LENGTH = 200


@contextmanager
def thread_count(threads: int) -> Iterator[None]:
    previous = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(previous)


def run(
    cases: Sequence[Case],
    dtype: str,
    peers: Sequence[Peer],
    threads: int,
    plan: Plan,
    say: Say,
    mode: Mode = INFERENCE,
) -> tuple[list[Row], Conditions]:
    """Measure every peer on every case in one dtype.

    Args:
        cases: of one suite and batch size.
        dtype: `"fp32"` or `"bf16"`.
        peers: who takes part; each gets a row per case and variant whatever happens.
        threads: for all peers and for the roofline.
        plan: rounds, time limit, clock.
        say: told what is going on.
        mode: what a call is; the peers are its own.

    Raises:
        ValueError: CPU time is asked for with several threads.
        RuntimeError: the roofline cannot be measured.
    """
    cpu_time = plan.clock is time.process_time
    if cpu_time and threads != 1:
        raise ValueError(f"threads: CPU time compares single threads, got {threads}")
    rows = []
    with thread_count(threads):
        limits = roofline.measure()
        for case in cases:
            rows += _run_case(case, dtype, peers, threads, plan, say, mode)
            limits = limits.best(roofline.measure())
    by_name = {case.name: case for case in cases}
    rows = [_with_floor(row, mode.cost(by_name[row.case].cost), limits) for row in rows]
    return rows, _conditions(dtype, threads, "cpu" if cpu_time else "wall", limits)


def _run_case(
    case: Case, dtype: str, peers: Sequence[Peer], threads: int, plan: Plan, say: Say, mode: Mode
) -> list[Row]:
    # Compiled code of earlier cases counts towards Dynamo's limit of recompilations.
    torch._dynamo.reset()
    rows: list[Row] = []
    runners: dict[int, Runner] = {}
    shortage = mode.shortage(case)
    for peer in peers:
        for variant in (v for v in mode.variants[dtype] if v in peer.variants):
            row = Row(case.suite, case.name, dtype, case.batch, peer.name, variant, OK, mode=mode.name)
            if shortage is not None:
                rows.append(replace(row, status=UNAVAILABLE, reason=shortage))
                continue
            say(f"{case.title} {dtype} batch {case.batch}: preparing {peer.name} ({variant})")
            row, runner = admit(row, case, peer, threads, mode)
            if runner is not None:
                runners[len(rows)] = runner
            rows.append(row)
    say(f"{case.title} {dtype} batch {case.batch}: timing {len(runners)} of {len(rows)}")
    times = interleave({str(index): runner for index, runner in runners.items()}, plan)
    for index in runners:
        rows[index] = _with_times(rows[index], times[str(index)])
    runners.clear()
    gc.collect()
    return rows


def admit(row: Row, case: Case, peer: Peer, threads: int, mode: Mode = INFERENCE) -> tuple[Row, Runner | None]:
    """Prepare a peer, run it once and judge its results; without a runner the row says why there is none."""
    try:
        runner = peer.prepare(case, row.variant, threads)
        outputs = runner()
    except Unavailable as error:
        return replace(row, status=UNAVAILABLE, reason=str(error)), None
    except Exception as error:
        # Whatever a foreign toolchain raises, the others are still worth measuring; from ours it is a failure.
        first_line = next(iter(str(error).splitlines()), "")
        reason = _short(f"{type(error).__name__}: {first_line}")
        return replace(row, status=FAILED if peer.ours else UNAVAILABLE, reason=reason), None
    try:
        verdict = mode.judge(case, row.variant, outputs, peer.ours)
    except NumericsError as error:
        return replace(row, status=FAILED, reason=_short(str(error))), None
    row = replace(row, error=verdict.error, error_allowed=verdict.allowed)
    # What was returned is no part of what the next call takes.
    del outputs
    return mode.remark(row, runner), runner


def _short(text: str) -> str:
    return " ".join(text.split())[:_REASON_LENGTH]


def _with_times(row: Row, times: Times) -> Row:
    return replace(
        row,
        p20_ms=1e3 * times.p20,
        p50_ms=1e3 * times.p50,
        p80_ms=1e3 * times.p80,
        min_ms=1e3 * times.minimum,
        rounds=times.rounds,
        calls=times.calls,
    )


def _with_floor(row: Row, cost: Cost, limits: Roofline) -> Row:
    floor = 1e3 * limits.floor(cost, row.dtype)
    return replace(
        row,
        gflop=cost.flops / 1e9,
        least_mb=cost.nbytes(roofline.DTYPES[row.dtype].itemsize) / 1e6,
        floor_ms=floor,
        floor_multiple=None if row.p50_ms is None else row.p50_ms / floor,
    )


def _conditions(dtype: str, threads: int, clock: str, limits: Roofline) -> Conditions:
    return Conditions(
        cpu=environment.cpu_model(),
        cores=environment.cores(),
        threads=threads,
        clock=clock,
        peak_gflops=limits.peak(dtype),
        copy_gbs=limits.copy_gbs,
        python=platform.python_version(),
        **{package: machine.version(package) for package in machine.PACKAGES},
        fastvit_kernels=machine.version("fastvit-kernels"),
        commit=machine.commit(),
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    )
