"""What is measured on a GPU, the most telling rows first: a run that ends early has those."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import NamedTuple

from fastvit_kernels.bench.cases import Case
from fastvit_kernels.bench.suites import SUITES
from fastvit_kernels.ops import library

# Models, the most important first, with the operators that they call.
OPERATORS_OF = {
    "cvt_13": ("patch_embedding", "conv_projection", "global_attention", "pointwise_mlp"),
    "hat_net_small": ("local_attention", "global_attention", "depthwise_mlp", "pooled_projection"),
    "cmt_s": ("patch_embedding", "global_attention", "depthwise_conv", "depthwise_mlp"),
    "pvt_v2_b2": ("patch_embedding", "global_attention", "depthwise_mlp"),
    "dhvt_small_imagenet_patch16": (
        "global_attention",
        "depthwise_mlp",
        "pointwise_mlp",
        "head_tokens",
        "merge_head_tokens",
    ),
}
MODELS = tuple(OPERATORS_OF)
# Operators with kernels for a GPU, and their suites by the operator that they call.
_ON_GPU = {name for name, operator in library.operators.items() if any(b.name != "cpu" for b in operator.backends)}
OPERATORS = {name: "global_attention" if name == "query_attention" else name for name in SUITES}
OPERATORS = {name: operator for name, operator in OPERATORS.items() if operator in _ON_GPU}
# Peers that are ours by one backend.
BY_NAME = {"triton": "triton", "cuda": "cuda", "fastvit_sdpa": "sdpa"}
BATCHES = (1, 64, 256)
FORWARD, TRAINING = "forward", "training"
MODES = (FORWARD, TRAINING)
STREAM, GRAPH = "stream", "graph"
BF16 = "bf16"
DTYPES = (BF16, "fp16", "fp32")
# In a larger batch of a whole model launches hide behind the kernels before them. The one launch of an operator has
# nothing to hide behind: many take less than the host needs for the call, and are replayed from graphs alone.
_LARGEST_MODEL_IN_GRAPH = 1

Find = Callable[[str, str, int], Case]


class Job(NamedTuple):
    """One row to be measured.

    Attributes:
        suite, case, batch: as in `fastvit_kernels.bench.suites`.
        mode: `"forward"`, or `"training"` for forward and backward.
        peer: as in `fastvit_kernels.bench.gpu.peers`.
        launch: `"stream"` for calls as they are, `"graph"` for replays of a CUDA graph.
        dtype: of the matrix products: `"bf16"`, `"fp16"` or `"fp32"`.
    """

    suite: str
    case: str
    batch: int
    mode: str
    peer: str
    launch: str
    dtype: str = BF16

    def __str__(self) -> str:
        case = self.suite if self.case == self.suite else f"{self.suite} {self.case}"
        graph = " in a graph" if self.launch == GRAPH else ""
        dtype = "" if self.dtype == BF16 else f", {self.dtype}"
        return f"{case}, batch {self.batch}, {self.mode}{dtype}, {self.peer}{graph}"


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


_QUICK, _COMPILED = ("fastvit", "eager", "sdpa"), ("compile",)
# Of a model, one after the other: a comparison is complete before the next begins.
_COMPARED = ("fastvit", "eager", "compile", "sdpa")


def core_jobs() -> list[Job]:
    """The most telling rows, in the order in which they are measured: the models, and their own first two stages."""
    # Without times of this device `fastvit` runs Triton's kernels, which need no row by name then.
    operators = (*_QUICK, *(peer for peer in BY_NAME if peer != "triton"))
    parts = [
        _of(MODELS, (64,), (FORWARD,), _COMPARED),
        _core(_of(OPERATORS, (64,), (FORWARD,), operators)),
        _of(MODELS, (64,), (TRAINING,), _COMPARED),
        _core(_of(OPERATORS, (64,), (TRAINING,), operators)),
        _in_graphs(_of(MODELS, (1,), (FORWARD,), _COMPARED)),
        _of(MODELS, (1,), (FORWARD,), _QUICK),
        _core(_of(OPERATORS, (1,), (FORWARD,), ("fastvit", "eager"))),
    ]
    return list(dict.fromkeys(job for part in parts for job in part))


def _in_graphs(jobs: Iterable[Job]) -> Iterator[Job]:
    return (job for job in jobs if job.launch == GRAPH)


def _core(jobs: Iterable[Job]) -> Iterator[Job]:
    """Those at the first two stages of the models, at 224 x 224; DHVT has one stage."""
    models = "|".join(name.removesuffix("_imagenet_patch16") for name in MODELS)
    core = re.compile(rf"({models})(-224)?(-stage[12](-keys)?|_imagenet_patch16)")
    return (job for job in jobs if core.fullmatch(job.case))


def all_jobs() -> list[Job]:
    """Every row, in the order in which they are measured: `core_jobs`, then the others."""
    parts = [
        core_jobs(),
        _of(OPERATORS, (64,), (FORWARD,), (*_QUICK, *BY_NAME)),
        _of(OPERATORS, (64,), (TRAINING,), (*_QUICK, *BY_NAME)),
        _of(MODELS, (1,), (FORWARD,), _COMPILED),
        _of(OPERATORS, (1, 256), MODES, (*_QUICK, *BY_NAME)),
        _of(MODELS, (256,), (FORWARD,), _COMPARED),
        _of(MODELS, (256,), (TRAINING,), _COMPARED),
        _of(MODELS, (1,), (TRAINING,), _QUICK),
        _of(MODELS, (1,), (TRAINING,), _COMPILED),
        _of(OPERATORS, (64, 1, 256), MODES, _COMPILED),
    ]
    return list(dict.fromkeys(job for part in parts for job in part))


def _of(
    suites: Sequence[str] | dict[str, str], batches: Sequence[int], modes: Sequence[str], peers: Sequence[str]
) -> Iterator[Job]:
    for suite, batch in product(suites, batches):
        launches = (GRAPH,) if suite in OPERATORS else (STREAM, GRAPH)[: 2 if batch <= _LARGEST_MODEL_IN_GRAPH else 1]
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
