"""The two ways to call a case: for its outputs, or for a step of training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from fastvit_kernels.bench import gate, memory, step_memory, training
from fastvit_kernels.bench.cases import VARIANTS, Case, Outputs
from fastvit_kernels.bench.flops import Cost
from fastvit_kernels.bench.gate import Verdict
from fastvit_kernels.bench.peers import PEERS, Peer, Runner, Unavailable
from fastvit_kernels.bench.results import Row
from fastvit_kernels.bench.sdpa import sdpa_attention
from fastvit_kernels.bench.training import Training

_MB = 1e6


@dataclass(frozen=True)
class Mode:
    """How cases are called and judged.

    Attributes:
        name: as the command line and the rows call it.
        batches: the usual ones.
        variants: the ways to each dtype.
        peers: who takes part, by name.
        judge: `(case, variant, what a runner returned, whether it is ours)`.
        cost: of a call, from that of the forward.
        shortage: why this machine's memory is too small for a case, or None.
        remark: adds to a row what else is known of a runner that has kept the rule.
    """

    name: str
    batches: tuple[int, ...]
    variants: Mapping[str, tuple[str, ...]]
    peers: Mapping[str, Peer]
    judge: Callable[[Case, str, Outputs, bool], Verdict]
    cost: Callable[[Cost], Cost]
    shortage: Callable[[Case], str | None]
    remark: Callable[[Row, Runner], Row]


class _Step:
    """The runner of a training step."""

    def __init__(self, step: Training) -> None:
        self.training = step

    def __call__(self) -> Outputs:
        return self.training.step()


def _eager(case: Case, variant: str, threads: int) -> Runner:
    return _Step(Training(training.stock(case, variant), case, variant))


def _sdpa(case: Case, variant: str, threads: int) -> Runner:
    if not case.attention:
        raise Unavailable(f"{case.suite} has no attention that it could replace")
    return _Step(Training(training.stock(case, variant), case, variant, sdpa_attention))


def _compile(case: Case, variant: str, threads: int) -> Runner:
    compiled = torch.compile(training.stock(case, variant), fullgraph=True)
    return _Step(Training(compiled, case, variant))


def _fastvit(case: Case, variant: str, threads: int) -> Runner:
    return _Step(Training(case.fuse(training.stock(case, variant)), case, variant))


def _with_memory(row: Row, runner: Runner) -> Row:
    assert isinstance(runner, _Step)
    found = step_memory.of_step(runner.training)
    resident = None if found.resident is None else found.resident / _MB
    return replace(row, peak_mb=found.allocated / _MB, resident_mb=resident, saved_mb=found.saved / _MB)


# Weights stay in fp32, as it is usual.
_WAYS = ("fp32", "autocast")

INFERENCE = Mode(
    name="inference",
    batches=(1, 8),
    variants=VARIANTS,
    peers=PEERS,
    judge=lambda case, variant, outputs, ours: gate.check(case, variant, outputs, ours=ours),
    cost=lambda cost: cost,
    shortage=memory.shortage,
    remark=lambda row, runner: row,
)
TRAINING = Mode(
    name="training",
    batches=(8,),
    variants={"fp32": ("fp32",), "bf16": ("autocast",)},
    peers={
        peer.name: peer
        for peer in (
            Peer("eager", _WAYS, _eager),
            Peer("sdpa", _WAYS, _sdpa),
            Peer("compile", _WAYS, _compile),
            Peer("fastvit", _WAYS, _fastvit, ours=True),
        )
    },
    judge=lambda case, variant, grads, ours: training.check(case, variant, grads),
    cost=training.cost,
    shortage=memory.shortage_in_training,
    remark=_with_memory,
)
MODES = {mode.name: mode for mode in (INFERENCE, TRAINING)}
