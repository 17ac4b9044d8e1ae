"""Tuning: which candidates there are, which compile, which of them a device finds the fastest, and what is kept."""

from __future__ import annotations

import time
from concurrent.futures import Future
from pathlib import Path
from unittest import mock

import pytest
import torch
from gpu_host import Host, Inline, find

from fastvit_kernels import cli
from fastvit_kernels.bench.gpu import measure as measuring
from fastvit_kernels.bench.gpu.jobs import FORWARD, OPERATORS, TRAINING
from fastvit_kernels.bench.gpu.measure import Plan
from fastvit_kernels.bench.gpu.worker import Lost, TimedOut
from fastvit_kernels.bench.tune import cli as tune_cli
from fastvit_kernels.bench.tune import run as running
from fastvit_kernels.bench.tune.candidates import candidates
from fastvit_kernels.bench.tune.places import Call, Place, looked_up, with_config
from fastvit_kernels.bench.tune.run import Request, all_calls, dry_run, run, try_config
from fastvit_kernels.bench.tune.survey import Surveyed, places, survey
from fastvit_kernels.ops import library, triton_support, tuning
from fastvit_kernels.ops.triton_configs import CONFIGS, Config
from fastvit_kernels.ops.tuning import Preference, Tuning
from fastvit_kernels.testing.numerics import NumericsError
from fastvit_kernels.testing.triton_aot import compiling_process

CALL = Call("pointwise_mlp", "tiny", 2, FORWARD)
# Where the interpreter looks its configurations up for this call: 16 channels, 64 hidden ones.
FIRST = Place("linear", "interpreter", "any", 64, 16)
SECOND = Place("linear", "interpreter", "any", 16, 64)
USUAL = Config(32, 64, 64, 4, 1)
FASTER, SLOWER, SPILLING = (USUAL._replace(num_warps=n) for n in (2, 8, 16))


@pytest.fixture(autouse=True)
def forget():
    yield
    measuring._case.cache_clear()


class Inside:
    """A pool of no processes, in which nothing compiles: what compiles is listed."""

    def submit(self, function, *arguments):
        future: Future = Future()
        if function is survey:
            _, _, config, _ = arguments
            future.set_result(Surveyed(config, "linear_kernel spills 8 bytes" if config == SPILLING else ""))
        else:
            assert function is places
            future.set_result({FIRST: USUAL, SECOND: USUAL, Place("sum", "interpreter", "any", 9, 0): USUAL})
        return future


class Timed(Inline):
    """Every configuration takes its own time, and one is wrong."""

    seconds = {USUAL: 1.0, FASTER: 0.5, SLOWER: 2.0}
    wrong: tuple[Config, ...] = ()

    def run(self, task, *arguments, limit):
        if task is not try_config:
            return super().run(task, *arguments, limit=limit)
        _, place, config, *_ = arguments
        self.tasks.append((place, config))
        if config in self.wrong:
            raise Lost("NumericsError: outside the numerics rule")
        return 1e3 * self.seconds[config]


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(running, "candidates", lambda kernel, usual: [usual, FASTER, SLOWER, SPILLING])


def _request(folder: Path, **options) -> Request:
    plan = Plan(seconds=0.0, fewest=1, most=1)
    return Request([CALL], "interpreter", folder / "tuning.json", plan=plan, find=find, **options)


def test_candidates_are_near_the_usual_one() -> None:
    for kernel, table in CONFIGS.items():
        for (architecture, _), rows in table.items():
            for _, usual in rows if architecture != "interpreter" else ():
                found = candidates(kernel, usual)
                # A kernel with one block to choose has the fewest.
                assert found[0] == usual and len(set(found)) == len(found) and 5 < len(found) < 80
                for config in found[1:]:
                    assert 1 <= sum(a != b for a, b in zip(config, usual, strict=True)) <= 2
                    blocks = list(zip(config[:3], usual[:3], strict=True))
                    assert all((a == 0) == (b == 0) and a in (b // 2, b, 2 * b) for a, b in blocks)
                    assert config.num_warps in (1, 2, 4, 8, 16) and 1 <= config.num_stages <= 4
    assert all(config.block_n == 0 for config in candidates("norm_gradient", Config(16, 0, 0, 4, 1)))


def test_every_operator_is_tuned_at_every_shape() -> None:
    calls = all_calls()
    assert {call.suite for call in calls} == set(OPERATORS)
    assert {call.mode for call in calls[: len(calls) // 2]} == {FORWARD} and {call.batch for call in calls} == {64}


@pytest.mark.parametrize(
    ("suite", "mode", "kernels"),
    [
        ("pointwise_mlp", FORWARD, {"linear"}),
        ("global_attention", FORWARD, {"attention", "linear"}),
        ("depthwise_mlp", FORWARD, {"expansion", "depthwise_projection"}),
        ("global_attention", TRAINING, {"attention_gradient", "weight_gradient", "input_gradient"}),
    ],
)
def test_places_of_a_call(suite: str, mode: str, kernels: set[str]) -> None:
    """What the launchers look up for an architecture that is not there, in bf16; sizes change nothing."""
    found = places(Call(suite, "tiny", 2, mode), "sm_90", find)
    assert kernels <= {place.kernel for place in found}
    assert {place.architecture for place in found} == {"sm_90"}
    assert any(place.kind == "half" for place in found)
    assert all(config == triton_support.usual(*place[:4]) for place, config in found.items())
    assert found == places(Call(suite, "tiny", 3, mode), "sm_90", find)


def test_places_in_fp32_are_others() -> None:
    for mode in (FORWARD, TRAINING):
        call = Call("pointwise_mlp", "tiny", 2, mode, "fp32")
        kinds = {place.kind for place in places(call, "sm_90", find)}
        assert kinds == {"ieee"} and str(call).endswith(", fp32")


def test_one_configuration_changes_one_place() -> None:
    with tuning.using(with_config(FIRST, FASTER)), looked_up() as found:
        arithmetic = triton_support.Arithmetic("interpreter", "ieee", torch.float32)
        assert triton_support.config("linear", arithmetic, 64, 16) == FASTER
        assert triton_support.config("linear", arithmetic, 16, 64) == USUAL
    assert found == {FIRST: USUAL, SECOND: USUAL}


def test_what_spills_or_does_not_fit_is_left_out() -> None:
    place, configs = Place("linear", "sm_80", "half", 64, 16), [Config(64, 64, 64, 4, 3), Config(128, 128, 32, 2, 2)]
    with compiling_process() as pool:
        found = [pool.submit(survey, CALL, place, config, find).result() for config in configs]
        usual, huge = found
        assert usual == Surveyed(configs[0], "") and "linear_kernel spills" in huge.reason
        deep = pool.submit(survey, CALL, Place("linear", "sm_89", "half", 64, 16), Config(128, 128, 64, 8, 4), find)
        assert "bytes of shared memory, there are 101376" in deep.result().reason
        request = Request([CALL], "sm_80", Path("unused"), kernels=["linear"], find=find)
        with mock.patch.object(running, "candidates", lambda kernel, usual: configs[:1]):
            first, second = dry_run(request, pool)
    assert first == (CALL, place, found[:1]) and second[1] == place._replace(width=16, depth=64)


def test_the_fastest_is_written_and_measured_once(tmp_path: Path, few: None) -> None:
    other = Preference("x", "y", "9.0", "bfloat16", "forward", 1, {"cuda": 1.0}, "z")
    tuning.write(tmp_path / "tuning.json", Tuning((), (other,)))
    said: list[str] = []
    outcome = run(_request(tmp_path), Inside(), worker := Timed(), said.append)
    assert (outcome.tuned, outcome.left, outcome.faster) == (2, 0, 2)
    assert worker.tasks[1:] == [(place, config) for place in (FIRST, SECOND) for config in (USUAL, FASTER, SLOWER)]
    written = tuning.read(tmp_path / "tuning.json")
    assert written.preferences == (other,)
    assert written.launches == tuple(place.launch(FASTER, "Test GPU 1", 500.0, 1000.0) for place in (SECOND, FIRST))
    assert "(32, 64, 64, 2, 1) 500 ms" in said[0]
    again = run(_request(tmp_path), Inside(), worker := Timed(), said.append)
    assert again.tuned == 0 and len(worker.tasks) == 1
    other_device = Timed(Host())
    other_device.device.name = lambda: "Test GPU 2"
    assert run(_request(tmp_path), Inside(), other_device, said.append).tuned == 2


def test_little_is_gained_is_nothing_gained(tmp_path: Path, few: None) -> None:
    worker = Timed()
    worker.seconds = {USUAL: 1.0, FASTER: 0.98, SLOWER: 2.0}
    outcome = run(_request(tmp_path), Inside(), worker, lambda text: None)
    assert (outcome.tuned, outcome.faster) == (2, 0)
    assert {entry.config for entry in tuning.read(tmp_path / "tuning.json").launches} == {USUAL}


def test_wrong_candidates_and_places_that_do_not_run(tmp_path: Path, few: None) -> None:
    worker, said = Timed(), []
    worker.wrong = (FASTER,)
    assert run(_request(tmp_path), Inside(), worker, said.append).faster == 0
    assert any("outside the numerics rule" in line for line in said)
    worker.wrong = (USUAL,)
    outcome = run(_request(tmp_path / "other"), Inside(), worker, said.append)
    assert (outcome.tuned, outcome.left, outcome.failed) == (0, 0, 2) and "--retry repeats those" in str(outcome)
    # They are remembered, and decide nothing.
    written = tuning.read(tmp_path / "other" / "tuning.json")
    assert all(entry.failed and written.config(*entry.place) is None for entry in written.launches)
    assert len(written.launches) == 2
    tried = len(worker.tasks)
    worker.wrong = ()
    assert run(_request(tmp_path / "other"), Inside(), worker, said.append).failed == 2
    assert len(worker.tasks) == tried + 1
    outcome = run(_request(tmp_path / "other", retry=True), Inside(), worker, said.append)
    assert (outcome.tuned, outcome.failed, outcome.faster) == (2, 0, 2)


class Ticking(Timed):
    """Each configuration is tried for 20 seconds, of which there are 100; three are tried at each place."""

    now = 0.0

    def run(self, task, *arguments, limit):
        if task is try_config:
            assert limit == min(60.0, 100.0 - self.now) > 0
            self.now += 20.0
        return super().run(task, *arguments, limit=limit)


def test_the_time_ends_it(tmp_path: Path, few: None) -> None:
    """In the middle of a place, which is left to the next run."""
    worker = Ticking()
    outcome = run(_request(tmp_path, minutes=100 / 60), Inside(), worker, lambda text: None, clock=lambda: worker.now)
    assert (outcome.tuned, outcome.left) == (1, 1) and "the same command goes on" in str(outcome)
    assert worker.now == 100.0
    assert [Place(*entry.place) for entry in tuning.read(tmp_path / "tuning.json").launches] == [FIRST]


def test_a_candidate_that_the_end_of_the_time_interrupts_did_not_fail(tmp_path: Path, few: None) -> None:
    class Late(Timed):
        def run(self, task, *arguments, limit):
            if task is try_config:
                raise TimedOut("no result within 30 s")
            return super().run(task, *arguments, limit=limit)

    outcome = run(_request(tmp_path, minutes=0.5), Inside(), Late(), lambda text: None)
    assert (outcome.left, outcome.failed) == (1, 0) and not (tmp_path / "tuning.json").exists()
    assert run(_request(tmp_path, minutes=2), Inside(), Late(), lambda text: None).failed == 2


@pytest.mark.parametrize("function", [survey, places])
def test_compilers_that_take_too_long_end_it(function, tmp_path: Path, few: None) -> None:
    class Compiling(Inside):
        slow = staticmethod(function)

        def submit(self, function, *arguments):
            return Future() if function is self.slow else super().submit(function, *arguments)

    outcome = run(_request(tmp_path, minutes=0.1 / 60), Compiling(), Timed(), lambda text: None)
    assert (outcome.tuned, outcome.left) == (0, 1)


def test_what_nobody_waits_for_is_not_compiled() -> None:
    with compiling_process() as pool:
        pool.submit(time.sleep, 0.0).result()
        tasks = [pool.submit(time.sleep, 0.5) for _ in range(20)]
    # One was running, and another was on its way to the process.
    assert sum(task.cancelled() for task in tasks) >= 17


def test_a_candidate_is_judged_before_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On this CPU, in the interpreter: first the launches with its tiles, then wrong numbers."""
    plan = Plan(seconds=0.0, fewest=1, most=1)
    launched = []
    submit = triton_support.submit

    def listen(kernel, grid, args, options):
        launched.append(options["num_warps"])
        submit(kernel, grid, args, options)

    monkeypatch.setattr(triton_support, "submit", listen)
    captured = []
    capture = Host.capture
    monkeypatch.setattr(Host, "capture", lambda self, run: captured.append(1) or capture(self, run))
    for mode, dtype in ((FORWARD, "bf16"), (TRAINING, "bf16"), (FORWARD, "fp32")):
        launched.clear()
        assert try_config(Host(), CALL._replace(mode=mode, dtype=dtype), FIRST, FASTER, find, plan) > 0
        assert 2 in launched and 4 in launched
    assert captured == [1, 1, 1]

    def skewed(kernel, grid, args, options):
        submit(kernel, grid, args, options)
        out = args[7]
        out.mul_(1.1)

    monkeypatch.setattr(triton_support, "submit", skewed)
    timed = []
    monkeypatch.setattr(Host, "times", lambda *args: timed.append(1) or [1.0])
    with pytest.raises(NumericsError):
        try_config(Host(), CALL, FIRST, FASTER, find, plan)
    assert not timed


def test_calls_without_kernels_for_gradients_have_no_places_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    call = CALL._replace(mode=TRAINING)
    assert "weight_gradient" in {place.kernel for place in places(call, "sm_90", find)}
    backend = next(type(b) for b in library.operators["pointwise_mlp"].backends if b.name == "triton")
    monkeypatch.setattr(backend, "supports_backward", lambda *arguments: ["refused"])
    assert not places(call, "sm_90", find)


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["tune"]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err
    assert cli.main(["tune", "--case", "nothing*"]) == 2
    assert "--case nothing*: no such call" in capsys.readouterr().err
    assert cli.main(["tune", "--suite", "cvt_13", "pointwise_mlp"]) == 2
    assert "--suite cvt_13: expected some of patch_embedding, " in capsys.readouterr().err
    assert cli.main(["tune", "--dry-run", "--suite", "pointwise_mlp", "--architecture", "sm_123x"]) == 2
    assert "--architecture sm_123x: expected one like sm_80" in capsys.readouterr().err

    found = [Surveyed(USUAL, ""), Surveyed(SPILLING, "linear_kernel spills 8 bytes")]
    monkeypatch.setattr(tune_cli, "dry_run", lambda request, pool: [(request.calls[0], FIRST, found)])
    assert cli.main(["tune", "--dry-run", "--suite", "pointwise_mlp", "--architecture", "sm_80"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "linear interpreter any 64 from 16 (pointwise_mlp cvt_13-224-stage1, forward): 1 of 2",
        "  32 64 64 4 1",
        "  32 64 64 16 1: linear_kernel spills 8 bytes",
    ]
    assert cli.main(["tune", "--dry-run", "--suite", "pointwise_mlp", "--dtype", "fp32", "bf16"]) == 0
    assert "(pointwise_mlp cvt_13-224-stage1, forward, fp32)" in capsys.readouterr().out
