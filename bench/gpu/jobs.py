"""What is measured on a GPU, the most telling rows first: a run that ends early has those."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import NamedTuple

from fastvit_kernels.bench.cases import Case
from fastvit_kernels.bench.suites import SUITES
from fastvit_kernels.ops import library

MODELS = ("cvt_13", "hat_net_small", "cmt_s", "pvt_v2_b2", "dhvt_small_imagenet_patch16")
# Suites of operators, by the operator that they call.
OPERATORS = {name: "global_attention" if name == "query_attention" else name for name in SUITES}
OPERATORS = {name: operator for name, operator in OPERATORS.items() if operator in library.operators}
# Peers that are ours by one backend.
BY_NAME = {"triton": "triton", "cuda": "cuda", "fastvit_sdpa": "sdpa"}
BATCHES = (1, 64, 256)
FORWARD, TRAINING = "forward", "training"
MODES = (FORWARD, TRAINING)
STREAM, GRAPH = "stream", "graph"
# From this batch size on, launches hide behind each other without a graph.
_LARGEST_IN_GRAPH = 1

Find = Callable[[str, str, int], Case]


class Job(NamedTuple):
    """One row to be measured.

    Attributes:
        suite, case, batch: as in `fastvit_kernels.bench.suites`.
        mode: `"forward"`, or `"training"` for forward and backward.
        peer: as in `fastvit_kernels.bench.gpu.peers`.
        launch: `"stream"` for calls as they are, `"graph"` for replays of a CUDA graph.
    """

    suite: str
    case: str
    batch: int
    mode: str
    peer: str
    launch: str

    def __str__(self) -> str:
        case = self.suite if self.case == self.suite else f"{self.suite} {self.case}"
        graph = " in a graph" if self.launch == GRAPH else ""
        return f"{case}, batch {self.batch}, {self.mode}, {self.peer}{graph}"


def find(suite: str, case: str, batch: int) -> Case:
    """The case of this name, which remembers nothing yet."""
    return replace(_cases(suite, batch)[case], _remembered={})


def cases_of(suite: str) -> list[str]:
    """The names of a suite's cases."""
    return list(_cases(suite, 1))


@functools.cache
def _cases(suite: str, batch: int) -> dict[str, Case]:
    # Naming the shapes of some suites takes whole models.
    return {case.name: case for case in SUITES[suite](batch)}


def all_jobs() -> list[Job]:
    """Every row, in the order in which they are measured."""
    quick, compiled = ("fastvit", "eager", "sdpa"), ("compile",)
    parts = [
        _of(MODELS, (64,), (FORWARD,), quick),
        _of(MODELS, (64,), (TRAINING,), quick),
        _of(MODELS, (1,), (FORWARD,), quick),
        _of(MODELS, (64,), (FORWARD,), compiled),
        _of(OPERATORS, (64,), (FORWARD,), (*quick, *BY_NAME)),
        _of(OPERATORS, (64,), (TRAINING,), (*quick, *BY_NAME)),
        _of(MODELS, (64,), (TRAINING,), compiled),
        _of(MODELS, (1,), (FORWARD,), compiled),
        _of(OPERATORS, (1, 256), MODES, (*quick, *BY_NAME)),
        _of(MODELS, (256,), MODES, quick),
        _of(MODELS, (1,), (TRAINING,), quick),
        _of(MODELS, (256,), MODES, compiled),
        _of(MODELS, (1,), (TRAINING,), compiled),
        _of(OPERATORS, (64, 1, 256), MODES, compiled),
    ]
    return [job for part in parts for job in part]


def _of(
    suites: Sequence[str] | dict[str, str], batches: Sequence[int], modes: Sequence[str], peers: Sequence[str]
) -> Iterator[Job]:
    for suite, batch in product(suites, batches):
        launches = (STREAM, GRAPH) if batch <= _LARGEST_IN_GRAPH else (STREAM,)
        for case, mode, peer, launch in product(_cases(suite, 1).values(), modes, peers, launches):
            if takes_part(peer, suite, case):
                yield Job(suite, case.name, batch, mode, peer, launch)


def takes_part(peer: str, suite: str, case: Case) -> bool:
    """Whether a peer is another one there: without attention, `sdpa` is `eager`."""
    if peer == "sdpa":
        return case.attention
    if peer in BY_NAME:
        backends = library.operators[OPERATORS[suite]].backends if suite in OPERATORS else []
        found = {backend.name for backend in backends} & set(BY_NAME.values())
        # Where there is one of them only, `fastvit` runs it.
        return BY_NAME[peer] in found and len(found) > 1
    return True
