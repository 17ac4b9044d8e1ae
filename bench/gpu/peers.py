"""Who takes part on a GPU, and how each runs a case's forward or its training step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastvit_kernels import BackendError, use_backend
from fastvit_kernels.bench.cases import Case, Outputs, as_outputs, deterministic, inference, precision
from fastvit_kernels.bench.gpu.jobs import FORWARD, GRAPH, TRAINING, Job
from fastvit_kernels.bench.peers import Unavailable
from fastvit_kernels.bench.sdpa import sdpa_attention

PEERS = ("fastvit", "triton", "cuda", "eager", "sdpa", "compile")
OURS = ("fastvit", "triton", "cuda")
# Inference in bf16 throughout; training with weights in fp32, as it is usual.
VARIANTS = {FORWARD: "cast", TRAINING: "autocast"}

Step = Callable[[], Outputs]


def prepare(job: Job, case: Case) -> Step:
    """A function that runs the job's call once and returns the outputs, or in training all gradients.

    Raises:
        Unavailable: the call itself may raise it as well.
    """
    module = stock(case, job.mode)
    if job.peer in OURS:
        module = case.fuse(module)
    elif job.peer == "compile":
        # Both choose kernels by measuring them; the second leaves the graph to us, who take one for everybody.
        tuning = "max-autotune-no-cudagraphs" if job.launch == GRAPH else "max-autotune"
        module = torch.compile(module, fullgraph=True, mode=tuning)  # type: ignore[assignment]
    variant = VARIANTS[job.mode]
    step = forward(module, case, variant) if job.mode == FORWARD else Training(module, case, variant)
    if job.peer == "compile" and job.launch != GRAPH:
        step = _in_steps(step)
    return _within(_context(job.peer), step)


def stock(case: Case, mode: str) -> nn.Module:
    """The stock module as it is called in this mode; what is random in training is switched off."""
    module = case.stock(VARIANTS[mode])
    if mode == TRAINING:
        deterministic(module.train().requires_grad_(True))
    return module


def forward(module: Callable[..., Any], case: Case, variant: str) -> Step:
    inputs = case.inputs(variant)

    def step() -> Outputs:
        with inference(variant, case.device):
            return as_outputs(module(*inputs))

    return step


class Training:
    """Forward and backward; called, it returns the gradients of all parameters and of an operator's inputs.

    Those come in the order of `names`, without the parameters that no output depends on.
    """

    def __init__(self, module: Callable[..., Any], case: Case, variant: str, dtype: torch.dtype | None = None) -> None:
        inputs = case.inputs(variant)
        # Nobody trains an image.
        trained = not case.end_to_end
        self._inputs = [x.detach().to(dtype or x.dtype).requires_grad_(trained) for x in inputs]
        self._module, self._case, self._variant = module, case, variant
        parameters = dict(module.named_parameters()) if isinstance(module, nn.Module) else {}
        leaves: dict[str, Tensor] = {name.removeprefix("_orig_mod."): p for name, p in parameters.items()}
        if trained:
            leaves |= {f"input {index}": x for index, x in enumerate(self._inputs)}
        # Another implementation may have its modules in another order.
        self._leaves = [leaves[name] for name in sorted(leaves)]
        self._cotangents: list[Tensor] | None = None

    def __call__(self) -> Outputs:
        with precision(self._variant, self._case.device):
            found = as_outputs(self._module(*self._inputs))
        outputs = [out for out in found if out.requires_grad]
        if self._cotangents is None:
            self._cotangents = _cotangents(outputs)
        grads = torch.autograd.grad(outputs, self._leaves, self._cotangents, allow_unused=True)
        return tuple(g for g in grads if g is not None)


def _cotangents(outputs: list[Tensor]) -> list[Tensor]:
    """The same values for every dtype."""
    made = []
    for seed, out in enumerate(outputs):
        generator = torch.Generator(out.device).manual_seed(seed)
        values = torch.randn(out.shape, generator=generator, device=out.device)
        made.append(values.bfloat16().to(out.dtype))
    return made


def _context(peer: str) -> Callable[[], AbstractContextManager[Any]]:
    if peer == "sdpa":
        return sdpa_attention
    return (lambda: use_backend(peer)) if peer in ("triton", "cuda") else nullcontext


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
