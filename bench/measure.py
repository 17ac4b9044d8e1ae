"""Interleaved timing: all peers in one process, in turn, so that a busy moment of the machine meets them all."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy

Clock = Callable[[], float]

MINIMUM_ROUNDS = 5
_IDLE_WINDOW, _IDLE_SHARE = 0.005, 0.1


@dataclass(frozen=True)
class Plan:
    """How long and with which clock to measure.

    Attributes:
        rounds: turns of each peer.
        seconds: no further round starts after this time (`MINIMUM_ROUNDS` are always done).
        sample: a turn repeats a quick call until it lasts about this many seconds, behind one that is not timed.
        settle: wait at most this long before a turn until the process is idle: some runtimes keep their threads
            spinning for tens of milliseconds after a call, and the next peer would pay for it.
        clock: wall time, or `time.process_time` for the CPU time of a single thread, which pre-emption leaves alone.
    """

    rounds: int = 30
    seconds: float = 40.0
    sample: float = 0.1
    settle: float = 0.3
    clock: Clock = time.perf_counter


class Times(NamedTuple):
    """Seconds of one call, over the rounds."""

    p20: float
    p50: float
    p80: float
    minimum: float
    rounds: int
    calls: int


def order(names: list[str], turn: int) -> list[str]:
    """Who runs when in a round: each round starts one peer later, so that no place in it is always the same peer's."""
    first = turn % len(names)
    return names[first:] + names[:first]


def interleave(
    runs: Mapping[str, Callable[[], object]], plan: Plan, advance: Callable[[], None] = lambda: None
) -> dict[str, Times]:
    """Time each of `runs`; every one has run at least once before. `advance` is called after every round."""
    names = list(runs)
    calls = {name: _calls(runs[name], plan) for name in names}
    samples: dict[str, list[float]] = {name: [] for name in names}
    started = time.perf_counter()
    turn = 0
    while names and turn < plan.rounds and (turn < MINIMUM_ROUNDS or time.perf_counter() - started < plan.seconds):
        for name in order(names, turn):
            wait_until_idle(plan.settle)
            samples[name].append(_sample(runs[name], calls[name], plan))
        turn += 1
        advance()
    return {name: _statistics(samples[name], calls[name]) for name in names}


def wait_until_idle(limit: float) -> None:
    """Return when this process uses next to no processor time, after `limit` seconds in any case."""
    end = time.perf_counter() + limit
    while time.perf_counter() < end:
        before = time.process_time()
        time.sleep(_IDLE_WINDOW)
        if time.process_time() - before < _IDLE_SHARE * _IDLE_WINDOW:
            return


def _calls(run: Callable[[], object], plan: Plan) -> int:
    run()
    begin = plan.clock()
    run()
    once = plan.clock() - begin
    return max(1, math.ceil(plan.sample / once)) if once > 0 else 1


def _sample(run: Callable[[], object], calls: int, plan: Plan) -> float:
    # The others' turns have emptied the caches, and the memory that a call takes and gives back has gone to the system:
    # a first call would also measure that, and whoever repeats a call or trains does not meet it again.
    run()
    begin = plan.clock()
    for _ in range(calls):
        run()
    return (plan.clock() - begin) / calls


def _statistics(samples: list[float], calls: int) -> Times:
    p20, p50, p80 = (float(value) for value in numpy.percentile(samples, [20, 50, 80]))
    return Times(p20, p50, p80, min(samples), len(samples), calls)
