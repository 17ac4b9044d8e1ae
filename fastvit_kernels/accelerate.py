"""Switch the modules of an existing model to fused kernels, and back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from fastvit_kernels import integrations
from fastvit_kernels.integrations import own, swap
from fastvit_kernels.integrations.adapter import STATE, Outcome
from fastvit_kernels.ops import dispatch
from fastvit_kernels.tables import text_table


class Replaced(NamedTuple):
    """One module that was changed: its path ("" is the model itself), what it was, what it is, and what to know.

    `remarks` says which parts of an accelerated module would run unfused if it were called now, and why.
    """

    path: str
    before: str
    after: str
    remarks: tuple[str, ...] = ()


class LeftAlone(NamedTuple):
    """One known module that was not changed: its path, what it is, and every reason."""

    path: str
    module: str
    reasons: tuple[str, ...]


@dataclass
class Report:
    """What `accelerate` or `restore` did. True when something changed; `str()` is a table.

    Attributes:
        action: `"accelerate"` or `"restore"`.
        replaced: the modules that were changed.
        left_alone: the modules that are known, or derive from a known class, and were not changed.
        notes: what else there is to know.
    """

    action: str
    replaced: list[Replaced] = field(default_factory=list)
    left_alone: list[LeftAlone] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.replaced)

    def __str__(self) -> str:
        lines = [f"{self.action}: {len(self.replaced)} replaced, {len(self.left_alone)} left alone"]
        if self.replaced:
            rows = [(path or "(model)", before, after) for path, before, after, _ in self.replaced]
            lines.append(text_table(("replaced", "was", "is"), rows))
            remarks = ((path, "; ".join(why)) for path, _, _, why in self.replaced if why)
            lines += [f"{path or '(model)'} runs unfused now: {why}" for path, why in remarks]
        if self.left_alone:
            entries = [(path or "(model)", what, "; ".join(why)) for path, what, why in self.left_alone]
            lines.append(text_table(("left alone", "module", "why"), entries))
        return "\n".join([*lines, *self.notes])


def accelerate(
    model: nn.Module, *, inference: bool = False, frozen: bool = False, backend: str | None = None
) -> Report:
    """Run what this library knows inside `model` on fused kernels, in place, with the same results.

    Known are transformers' CvT, PvtV2 and Segformer (patch embeddings and layers), timm's PVTv2 and Twins (patch
    embeddings and blocks, of Twins also the attentions by themselves), Swin (blocks without shift) and
    EfficientFormerV2 (MLPs), and this library's own modules where they are pinned to the reference.
    Only the class of an instance changes (of our own modules only their choice of backend): parameters, buffers, hooks,
    child modules and `state_dict` keys stay the same objects, so optimizers, EMA copies and checkpoints notice nothing.

    Fused kernels bypass a layer's child modules. A layer with children that somebody expects to be called (they have
    hooks), or that are not what their library puts there, is left alone; where that becomes so later, the layer notices
    at its next call and runs its library's code. Hooks registered for all modules of the process are not considered.

    The call may be repeated: it changes only what is not in the asked-for configuration yet.

    Args:
        model: any module; compiled, `DataParallel` and `DistributedDataParallel` wrappers are searched like others. A
            compiled model compiles again at its next call.
        inference: also keep the weights of each operator packed for the CPU kernels (about their memory again). Weights
            that change later are noticed, with one exception: of a write behind PyTorch's back (through `.data` or
            NumPy) only eight elements of each weight are looked at, so one that leaves most of them as they were
            (zeroing a row, a sparse mask) can pass unnoticed. Write in place under `torch.no_grad()` instead, or call
            `accelerate` with `inference=False` and again. Training is not affected. Compiled and exported graphs do
            not use packed weights.
        frozen: with `inference`, a promise about models of this library: from the second forward on nothing will change
            but the values of their weights, in place, and the model's own mode. Submodules, settings, hooks and which
            objects the parameters are is not looked at any more, which takes a part of a small model's forward at batch
            1; what changes there passes unnoticed. `accelerate` without it ends that.
        backend: run the known modules on this backend; None for the usual choice. See `use_backend`.

    Returns:
        What was replaced, and what was left alone for which reasons.

    Raises:
        TypeError: `model` is not an `nn.Module`.
        ValueError: `backend` is unknown; `frozen` without `inference`.
    """
    _check_module(model)
    dispatch.requested_backend(backend)
    if frozen and not inference:
        raise ValueError("frozen: expected inference=True beside it, got False")
    report = Report("accelerate")
    for path, module, adapter, base in integrations.find(model):
        if adapter is not None:
            _enter(report, path, swap.accelerate(module, adapter, inference, backend))
        elif own.is_own(module):
            _enter(report, path, own.accelerate(module, inference, backend))
        elif base is not None:
            reason = f"its class derives from {base.__name__} and may compute something else"
            report.left_alone.append(LeftAlone(path, type(module).__name__, (reason,)))
    own.repeat(model, inference, frozen)
    if inference:
        own.pack(model)
    if not report.replaced and not report.left_alone:
        known = ", ".join(integrations.KNOWN)
        report.notes.append(
            f"nothing in this model is known; known are {known} (timm from 0.9 on) and the modules of fastvit_kernels"
        )
    _note_compiled(report, model)
    return report


def restore(model: nn.Module) -> Report:
    """Undo `accelerate` exactly: every instance gets back its class or its own choice of backend, and nothing remains.

    Args:
        model: what `accelerate` was called with, or any module that contains it or is a part of it.

    Returns:
        What was replaced, and the modules that cannot be: those whose class was changed again by somebody else.

    Raises:
        TypeError: `model` is not an `nn.Module`.
    """
    _check_module(model)
    report = Report("restore")
    own.repeat(model, False)
    for path, module in model.named_modules():
        adapter = integrations.adapter_of(type(module))
        if adapter is not None:
            if type(module) is adapter.fused:
                _enter(report, path, swap.restore(module, adapter))
        elif own.is_own(module):
            if (outcome := own.restore(module)) is not None:
                _enter(report, path, outcome)
        elif STATE in module.__dict__:
            reason = "its class was changed again after accelerate"
            report.left_alone.append(LeftAlone(path, type(module).__name__, (reason,)))
    if not report.replaced and not report.left_alone:
        report.notes.append("nothing in this model is accelerated")
    _note_compiled(report, model)
    return report


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def _enter(report: Report, path: str, outcome: Outcome) -> None:
    before, after, reasons = outcome
    if before != after:
        report.replaced.append(Replaced(path, before, after, reasons))
    else:
        report.left_alone.append(LeftAlone(path, after, reasons))


def _note_compiled(report: Report, model: nn.Module) -> None:
    compiled = any(
        "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )
    if report.replaced and compiled:
        report.notes.append("the model is compiled: what was replaced is compiled again at the next call")
