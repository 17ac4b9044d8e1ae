"""Who takes part on a GPU, and how each runs a case's forward or its training step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from fastvit_kernels import BackendError, use_backend
from fastvit_kernels.bench import training
from fastvit_kernels.bench.cases import Case, Outputs, as_outputs, inference
from fastvit_kernels.bench.gpu.jobs import BY_NAME, FORWARD, GRAPH, TRAINING, Job
from fastvit_kernels.bench.peers import Unavailable
from fastvit_kernels.bench.sdpa import sdpa_attention
from fastvit_kernels.bench.training import Training

OURS = ("fastvit", *BY_NAME)
PEERS = (*OURS, "eager", "sdpa", "compile")
# By dtype and mode: inference in a dtype throughout; training with weights in fp32, as it is usual.
VARIANTS = {
    ("bf16", FORWARD): "cast",
    ("bf16", TRAINING): "autocast",
    ("fp16", FORWARD): "cast-fp16",
    ("fp16", TRAINING): "autocast-fp16",
    ("fp32", FORWARD): "fp32",
    ("fp32", TRAINING): "fp32",
}

Step = Callable[[], Outputs]


def prepare(job: Job, case: Case) -> Step:
    """A function that runs the job's call once and returns the outputs, or in training all gradients.

    Raises:
        Unavailable: the call itself may raise it as well.
    """
    variant = VARIANTS[job.dtype, job.mode]
    module = stock(case, job.mode, variant)
    if job.peer in OURS:
        module = case.fuse(module)
    elif job.peer == "compile":
        # Both choose kernels by measuring them; the second leaves the graph to us, who take one for everybody.
        tuning = "max-autotune-no-cudagraphs" if job.launch == GRAPH else "max-autotune"
        # After another batch size the compiler would otherwise make code for any: no user of one size runs that.
        module = torch.compile(module, fullgraph=True, dynamic=False, mode=tuning)  # type: ignore[assignment]
    step = forward(module, case, variant) if job.mode == FORWARD else Training(module, case, variant).gradients
    if job.peer == "compile" and job.launch != GRAPH:
        step = _in_steps(step)
    return _within(_context(job.peer), step)


def stock(case: Case, mode: str, variant: str) -> nn.Module:
    """The stock module as it is called in this mode; what is random in training is switched off."""
    return training.stock(case, variant) if mode == TRAINING else case.stock(variant)


def forward(module: Callable[..., Any], case: Case, variant: str) -> Step:
    inputs = case.inputs(variant)

    def step() -> Outputs:
        with inference(variant, case.device):
            return as_outputs(module(*inputs))

    return step


def _context(peer: str) -> Callable[[], AbstractContextManager[Any]]:
    if peer == "sdpa":
        return sdpa_attention
    return (lambda: use_backend(BY_NAME[peer])) if peer in BY_NAME else nullcontext


def _within(context: Callable[[], AbstractContextManager[Any]], step: Step) -> Step:
    def run() -> Outputs:
        try:
            with context():
                return step()
        except BackendError as error:
            raise Unavailable(str(error).replace("\n", ";")) from error

    return run


def _in_steps(step: Step) -> Step:
    """Its graphs write the results of each call where those of the call before were."""

    def run() -> Outputs:
        torch.compiler.cudagraph_mark_step_begin()
        return step()

    return run
