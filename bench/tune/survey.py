"""Ahead-of-time compilation of candidates, without a GPU: those that spill or need too much are left out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

from fastvit_kernels.bench.gpu.jobs import Find
from fastvit_kernels.bench.tune.places import Call, Place, launches, looked_up, with_config
from fastvit_kernels.ops import triton_support, tuning
from fastvit_kernels.ops.triton_configs import Config
from fastvit_kernels.testing.triton_aot import REGISTERS, SHARED_MEMORY, Compiled, compile_launches

_UNKNOWN = min(SHARED_MEMORY.values())


class Surveyed(NamedTuple):
    """A candidate, and why it is no choice: empty when it is one."""

    config: Config
    reason: str


def places(call: Call, architecture: str, find: Find) -> dict[Place, Config]:
    """The places that a call looks up on an architecture, and the usual configurations there."""
    with (
        looked_up() as found,
        mock.patch.object(triton_support, "architecture", lambda device: architecture),
        mock.patch.object(triton_support, "submit", lambda *arguments: None),
        mock.patch.object(triton_support, "_guard", lambda device: _NOTHING),
        tuning.using(tuning.Tuning()),
    ):
        _prepared(find, call)()
    return found


class _Nothing:
    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


_NOTHING = _Nothing()


def survey(call: Call, place: Place, config: Config, find: Find) -> Surveyed:
    """Compile a call with a configuration at one place.

    Raises:
        RuntimeError: this process interprets its kernels; see `testing.triton_aot.compiling_process`.
    """
    with tuning.using(tuning.Tuning()):
        usual = _usual_keys(find, call, place.architecture)
    with tuning.using(with_config(place, config)):
        try:
            found = compile_launches(_prepared(find, call), place.architecture)
        except Exception as error:
            return Surveyed(config, f"does not compile: {' '.join(str(error).split())[:160]}")
    # What the usual configurations compile to is not this one's doing.
    problems = [_problem(kernel, place.architecture) for kernel in found if kernel.key not in usual]
    return Surveyed(config, "; ".join(dict.fromkeys(problem for problem in problems if problem)))


def _problem(kernel: Compiled, architecture: str) -> str:
    if kernel.spilled:
        return f"{kernel.name} spills {kernel.spilled} bytes"
    most = SHARED_MEMORY.get(architecture, _UNKNOWN)
    if kernel.shared > most:
        return f"{kernel.name} takes {kernel.shared} bytes of shared memory, there are {most}"
    if kernel.registers * kernel.threads > REGISTERS:
        return f"{kernel.name} takes {kernel.registers * kernel.threads} registers, there are {REGISTERS}"
    return ""


@functools.lru_cache(maxsize=4)
def _prepared(find: Find, call: Call) -> Callable[[], None]:
    return launches(call, find)


@functools.lru_cache(maxsize=16)
def _usual_keys(find: Find, call: Call, architecture: str) -> frozenset[str]:
    return frozenset(kernel.key for kernel in compile_launches(_prepared(find, call), architecture))
