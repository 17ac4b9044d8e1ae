"""Which backend runs each operator of a model, and why the others do not."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as torch_module

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
    """What happened in one forward. `str()` is a readable account.

    Attributes:
        decisions: operator calls with module path, input, chosen backend, each other backend's reasons and, where times
            of this device decided, those, in order; equal calls of one module appear once.
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


def explain(model: nn.Module, *inputs: Any, **kwargs: Any) -> Explanation:
    """Call `model(*inputs, **kwargs)` once, without gradients, and say which backend ran each fused operator and why.

    Modes, buffers (batch-norm statistics too) and random number generators are afterwards what they were before. A
    compiled model runs uncompiled. Operator calls of other threads, such as `nn.DataParallel` makes, are not seen.

    Args:
        model: any module.
        *inputs, **kwargs: what it is called with.

    Returns:
        The decisions, the modules that ran unfused, and those that `accelerate` would replace.

    Raises:
        TypeError: `model` is not an `nn.Module`.
        BackendError: as the call itself, when a chosen backend cannot run an operator.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected a torch.nn.Module, got {type(model).__name__}; for a single operator wrap it in a module"
        )
    while isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
        model = inner
    recorder = Recorder()
    with _unchanged(model), _paths(model, recorder), record(recorder), torch.no_grad():
        explanation = Explanation()
        with torch.compiler.set_stance("force_eager"):
            model(*inputs, **kwargs)
        _remark(model, explanation)
    for decision in recorder.decisions:
        if decision not in explanation.decisions:
            explanation.decisions.append(decision)
    return explanation


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
    for decision in decisions:
        parts = [f"{name}: {', '.join(reasons)}" for name, reasons in decision.rejected.items()]
        why = "; ".join([*parts, f"measured: {decision.measured}"] if decision.measured else parts)
        number = notes.setdefault(why, len(notes) + 1)
        rows.append((decision.module or "(model)", decision.operator, decision.shape, decision.chosen, f"[{number}]"))
    table = text_table(("module", "operator", "input", "backend", "why not the others"), rows)
    return "\n".join([table, *(f"[{number}] {why}" for why, number in notes.items())])


def _remark_table(title: str, remarks: list[Remark]) -> str:
    rows = [(remark.path or "(model)", remark.module, "; ".join(remark.reasons)) for remark in remarks]
    return text_table((title, "class", "why"), rows)
