"""Turns and statistics."""

from __future__ import annotations

import time

import pytest
import torch

from fastvit_kernels.bench.cases import Case
from fastvit_kernels.bench.measure import MINIMUM_ROUNDS, Plan, interleave, order, wait_until_idle
from fastvit_kernels.bench.peers import PEERS
from fastvit_kernels.bench.run import run, thread_count


class Clock:
    """Time passes only while a call runs."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def call(self, name: str, *seconds: float):
        """A call that takes these times in turn."""
        index = 0

        def run() -> None:
            nonlocal index
            self.log.append(name)
            self.now += seconds[index % len(seconds)]
            index += 1

        return run

    def plan(self, **options: float) -> Plan:
        return Plan(**{"rounds": 6, "sample": 0.0, "settle": 0.0, **options}, clock=self)


def test_order_rotates() -> None:
    names = ["a", "b", "c"]
    assert [order(names, turn) for turn in range(4)] == [
        ["a", "b", "c"],
        ["b", "c", "a"],
        ["c", "a", "b"],
        ["a", "b", "c"],
    ]


def test_every_round_runs_everybody_once_in_rotating_order() -> None:
    clock = Clock()
    found = interleave({name: clock.call(name, 1.0) for name in "abc"}, clock.plan(rounds=6))
    calibration, rounds = clock.log[:6], clock.log[6:]
    assert calibration == ["a", "a", "b", "b", "c", "c"]
    # Twice in a turn: the first call is not timed.
    assert "".join(rounds) == "aabbccbbccaaccaabbaabbccbbccaaccaabb"
    assert all(times.rounds == 6 and times.calls == 1 for times in found.values())


def test_quantiles_and_minimum() -> None:
    clock = Clock()
    # Two calls for calibration, then eleven that count, 1 to 11 seconds, each behind one that does not.
    seconds = [100.0, 100.0, *(s for counted in range(11, 0, -1) for s in (100.0, float(counted)))]
    times = interleave({"a": clock.call("a", *seconds)}, clock.plan(rounds=11))["a"]
    assert times[:4] == (3.0, 6.0, 9.0, 1.0)


def test_short_calls_are_repeated() -> None:
    clock = Clock()
    times = interleave({"a": clock.call("a", 0.001)}, clock.plan(rounds=5, sample=0.0045))["a"]
    assert times.calls == 5
    assert times.p50 == pytest.approx(0.001)
    assert len(clock.log) == 2 + 5 * (1 + 5)


def test_the_time_limit_ends_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    plan = clock.plan(rounds=1000, seconds=40.0)
    times = interleave({"a": clock.call("a", 1.0), "b": clock.call("b", 1.0)}, plan)
    assert times["a"].rounds == times["b"].rounds == 10
    times = interleave({"a": clock.call("a", 60.0)}, plan)
    assert times["a"].rounds == MINIMUM_ROUNDS


def test_turns_wait_for_spinning_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    now, slept = [0.0], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    # Another thread of the process keeps one core busy for the first 37 ms.
    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "process_time", lambda: min(now[0], 0.037))
    wait_until_idle(0.02)
    assert now[0] == pytest.approx(0.02)
    wait_until_idle(1.0)
    assert now[0] == pytest.approx(0.045)
    wait_until_idle(1.0)
    assert now[0] == pytest.approx(0.05) and set(slept) == {0.005}


def test_nobody_to_time() -> None:
    assert interleave({}, Plan()) == {}


def test_thread_count_is_put_back() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), thread_count(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before


def test_cpu_time_is_for_one_thread(tiny: Case) -> None:
    plan = Plan(rounds=2, seconds=0.0, clock=time.process_time)
    with pytest.raises(ValueError, match="threads"):
        run([tiny], "fp32", [PEERS["eager"]], 2, plan, lambda text: None)
    rows, conditions = run([tiny], "fp32", [PEERS["eager"]], 1, plan, lambda text: None)
    assert conditions.clock == "cpu" and rows[0].p50_ms is not None and rows[0].p50_ms > 0
