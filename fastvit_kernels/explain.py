"""Which backend runs each operator of a model, and why the others do not."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils import _pytree as pytree

from fastvit_kernels import integrations
from fastvit_kernels.integrations import own
from fastvit_kernels.ops.dispatch import Decision, Recorder, record
from fastvit_kernels.tables import text_table


class Remark(NamedTuple):
    """Something about one module: its path ("" is the model itself), its class, and every reason."""

    path: str
    module: str
    reasons: tuple[str, ...]


@dataclass
class Explanation:
    """What happened in one forward, and in its backward if asked for. `str()` is a readable account.

    Attributes:
        decisions: operator calls with module path, input, chosen backend, each other backend's reasons and, where times
            of this device decided, those, in order; equal calls of one module appear once. Behind a backward also who
            computed the gradients, and why they were recomputed through the reference where they were.
        unfused: modules that could run fused operators and called their submodules, in whole or in part.
        not_accelerated: modules that `accelerate` knows and that are not accelerated; what would keep it from doing so.
    """

    decisions: list[Decision] = field(default_factory=list)
    unfused: list[Remark] = field(default_factory=list)
    not_accelerated: list[Remark] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [_decision_table(self.decisions)] if self.decisions else ["no fused operator ran"]
        if self.unfused:
            parts.append(_remark_table("runs unfused", self.unfused))
        if self.not_accelerated:
            parts.append(_remark_table("not accelerated", self.not_accelerated))
        return "\n\n".join(parts)


def explain(model: nn.Module, *inputs: Any, training: bool = False, **kwargs: Any) -> Explanation:
    """Call `model(*inputs, **kwargs)` once and say which backend ran each fused operator and why.

    Modes, buffers (batch-norm statistics too), gradients and random number generators are afterwards what they were
    before. A compiled model runs uncompiled. Operator calls of other threads, such as `nn.DataParallel` makes, are not
    seen.

    Args:
        model: any module, in the mode that is to be explained.
        *inputs, **kwargs: what it is called with.
        training: also go back through the model, and say who computes the gradients of its parameters. Without it
            nothing is recorded for a backward.

    Returns:
        The decisions, the modules that ran unfused, and those that `accelerate` would replace.

    Raises:
        TypeError: `model` is not an `nn.Module`.
        ValueError: with `training`, none of its results depends on a parameter that needs a gradient.
        BackendError: as the call itself, when a chosen backend cannot run an operator.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected a torch.nn.Module, got {type(model).__name__}; for a single operator wrap it in a module"
        )
    while isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
        model = inner
    recorder = Recorder()
    with _unchanged(model), _paths(model, recorder), record(recorder), torch.set_grad_enabled(training):
        explanation = Explanation()
        with torch.compiler.set_stance("force_eager"):
            results = model(*inputs, **kwargs)
            if training:
                _go_back(model, results)
                _join_repeated(recorder.decisions)
        _remark(model, explanation)
    for decision in recorder.decisions:
        if decision not in explanation.decisions:
            explanation.decisions.append(decision)
    return explanation


def _go_back(model: nn.Module, results: Any) -> None:
    """Run the backward of everything that the model returned; no `.grad` is touched."""
    outputs = [leaf for leaf in pytree.tree_leaves(results) if isinstance(leaf, Tensor) and leaf.requires_grad]
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not outputs or not wanted:
        raise ValueError(
            "training: expected a model whose results depend on parameters that need a gradient, got "
            f"{len(wanted)} such parameters and {len(outputs)} such results"
        )
    torch.autograd.grad(outputs, wanted, [torch.ones_like(out) for out in outputs], allow_unused=True)


def _join_repeated(decisions: list[Decision]) -> None:
    """Calls that activation checkpointing repeated are listed once, with their gradients."""
    known = [replace(decision, gradients="", gradients_rejected=[]) for decision in decisions if decision.gradients]
    decisions[:] = [decision for decision in decisions if decision.gradients or decision not in known]


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Put random number generators and the buffers of a model in training back behind the block."""
    devices = sorted({t.device.index for t in model.parameters() if t.device.type == "cuda"})
    saved = [(buffer, buffer.clone()) for buffer in model.buffers()] if _anything_trains(model) else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in saved:
                    buffer.copy_(value)


def _anything_trains(model: nn.Module) -> bool:
    return any(module.training for module in model.modules())


@contextmanager
def _paths(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Keep `recorder.path` at the path of the module that this thread is in.

    The hooks are for all modules of the process: a hook on a module itself would keep it from being fused.
    """
    names = {id(module): path for path, module in model.named_modules()}
    thread = threading.get_ident()
    entered: list[list[str]] = []

    def enter(module: nn.Module, args: Any) -> None:
        if threading.get_ident() == thread and id(module) in names:
            entered.append(recorder.path)
            recorder.path = [names[id(module)]]

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() == thread and id(module) in names:
            recorder.path = entered.pop()

    handles = [
        torch_module.register_module_forward_pre_hook(enter),
        torch_module.register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _remark(model: nn.Module, explanation: Explanation) -> None:
    for path, module, adapter, _ in integrations.find(model):
        name = type(module).__name__
        if adapter is not None and type(module) is adapter.fused:
            unfused = adapter.unfused(module)
        elif own.is_own(module):
            unfused = own.unfused(module)
            if own.is_pinned(module):
                reasons = ["pinned to the reference, accelerate(model) would release it"]
                explanation.not_accelerated.append(Remark(path, name, tuple(reasons)))
        else:
            if adapter is not None:
                reasons = adapter.obstacles(module) or ["accelerate(model) would replace it"]
                explanation.not_accelerated.append(Remark(path, name, tuple(reasons)))
            continue
        if unfused:
            explanation.unfused.append(Remark(path, name, tuple(unfused)))


def _decision_table(decisions: list[Decision]) -> str:
    """One row per decision; the other backends' reasons, mostly the same for many rows, as numbered notes below."""
    notes: dict[str, int] = {}
    rows = []
    trained = any(decision.gradients for decision in decisions)
    for decision in decisions:
        parts = [f"{name}: {', '.join(reasons)}" for name, reasons in decision.rejected.items()]
        if decision.gradients_rejected:
            parts.append(f"gradients by {decision.chosen}: {', '.join(decision.gradients_rejected)}")
        why = "; ".join([*parts, f"measured: {decision.measured}"] if decision.measured else parts)
        number = notes.setdefault(why, len(notes) + 1)
        gradients = (decision.gradients or "-",) if trained else ()
        ran = (decision.module or "(model)", decision.operator, decision.shape, decision.chosen, *gradients)
        rows.append((*ran, f"[{number}]"))
    header = ("module", "operator", "input", "backend", *(("gradients",) if trained else ()), "why not the others")
    table = text_table(header, rows)
    return "\n".join([table, *(f"[{number}] {why}" for why, number in notes.items())])


def _remark_table(title: str, remarks: list[Remark]) -> str:
    rows = [(remark.path or "(model)", remark.module, "; ".join(remark.reasons)) for remark in remarks]
    return text_table((title, "class", "why"), rows)
