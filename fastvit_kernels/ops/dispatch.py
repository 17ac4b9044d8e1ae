"""Which backend runs a call, and every reason why the others do not."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastvit_kernels.ops.arguments import autocast_is_on
from fastvit_kernels.ops.operator import Backend, BackwardBackend, Operator, Outputs, Tensors
from fastvit_kernels.ops.preference import in_order

BACKENDS = ("auto", "cuda", "triton", "cpu", "reference", "sdpa")
# Whose kernels compute gradients in place of those that a backend does not have, from what it saved.
_GRADIENTS_OF = {"cuda": "triton"}


class _Reference(NamedTuple):
    operator: Operator
    name: str = "reference"

    def supports(self, tensors: Tensors, static: Any) -> list[str]:
        return []

    def run(self, tensors: Tensors, packed: Tensor | None, static: Any) -> Outputs:
        device = tensors[0].device.type  # type: ignore[union-attr]
        if not autocast_is_on(device):
            return self.operator.reference(tensors, static)
        # `static.dtype` is what autocast asks for; it must not change single steps of the reference besides.
        with torch.autocast(device, enabled=False):
            return self.operator.reference(tensors, static)


class BackendError(RuntimeError):
    """An explicitly chosen backend cannot run the call. The message lists every backend with its reasons."""


@dataclass
class Decision:
    """One operator call as `explain` reports it.

    `measured` are the times that decided, empty where none did. `gradients` is who computed the call's: the chosen
    backend, Triton in place of the CUDA C++ kernels, or `"reference"` where they were recomputed through it; empty
    where nobody did. `gradients_rejected` are the reasons why the chosen backend, and Triton in its place, did not.
    """

    operator: str
    module: str
    shape: str
    chosen: str
    rejected: dict[str, list[str]]
    channels: int = 0
    measured: str = ""
    gradients: str = ""
    gradients_rejected: list[str] = field(default_factory=list)


class _State(threading.local):
    def __init__(self) -> None:
        self.backend: str | None = None
        self.recompute: bool | None = None
        self.recorder: Recorder | None = None
        self.taping = True


class Recorder:
    """Collects the decisions of one thread while `explain` runs a model."""

    def __init__(self) -> None:
        self.decisions: list[Decision] = []
        self.path: list[str] = []


_state = _State()


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: unknown backend {name!r}, expected one of {', '.join(BACKENDS)}")
    return name


# Judged at the first use: a typing error in it must not keep anybody from importing the package.
_environment = os.environ.get("FASTVIT_BACKEND", "auto")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operator called in this block, in this thread, on one backend.

    Args:
        name: `"cuda"`, `"triton"`, `"cpu"`, `"reference"`, `"sdpa"`, or `"auto"` for the default order. Operators
            without `"cuda"` or `"sdpa"` raise; the second, PyTorch's attention, is for the attentions alone.

    Raises:
        ValueError: the name is none of these.
        BackendError: raised by the operator call itself when the chosen backend cannot run it.

    The choice of a call (`backend=`) goes before this block, this block before `FASTVIT_BACKEND`.
    """
    _checked(name, "use_backend")
    previous, _state.backend = _state.backend, name
    try:
        yield
    finally:
        _state.backend = previous


@contextmanager
def use_recompute(enabled: bool | None) -> Iterator[None]:
    """Choose, for the operators called in this block, in this thread, between memory and time in training.

    A fused operator keeps its inputs for the backward. Where a backend has kernels for the gradients, they compute what
    is in between again tile by tile; where it has none, the backward runs the whole operator once more, through the
    reference. Two things can be kept in place of that:

    * maps of a depthwise MLP that its forward makes as a whole anyway: the hidden one around batch statistics (CMT,
      DHVT; six to eight times x instead of once, a fifth of what plain PyTorch keeps), the result in front of its own
      GroupNorm (HAT-Net; two to three times x). On a CPU the step gets faster by more than they cost; on a GPU nothing
      is kept.
    * what autograd keeps of the reference: an operator without kernels for its gradients runs on it from the start.
      That saves the time of one forward, and takes the memory of plain PyTorch. It concerns backends that are not asked
      for by name; `explain(model, x, training=True)` shows them as those whose gradients the reference computes.

    Args:
        enabled: True for as little memory as possible, False for both; None, the default, keeps the first alone.
    """
    previous, _state.recompute = _state.recompute, enabled
    try:
        yield
    finally:
        _state.recompute = previous


@contextmanager
def use_taping(enabled: bool) -> Iterator[None]:
    """Choose, for the modules called in this block, in this thread, whether they may repeat their calls in training.

    On a CPU the blocks of the bundled models record the operators that their forward calls while gradients are wanted,
    and as long as nothing changes make those calls alone, as few nodes of autograd's graph. Results and gradients are
    the same, to the bit. A module whose hooks, classes, parameters (as objects), settings or modes change runs its own
    code again, and so does every block that somebody listens to. Where even that is too much, say False.
    """
    previous, _state.taping = _state.taping, enabled
    try:
        yield
    finally:
        _state.taping = previous


@contextmanager
def record(recorder: Recorder) -> Iterator[None]:
    """Collect this thread's dispatch decisions in `recorder`."""
    previous, _state.recorder = _state.recorder, recorder
    try:
        yield
    finally:
        _state.recorder = previous


def keeps_maps() -> bool:
    """Whether operators may keep maps for the gradients that they made as a whole anyway."""
    return _state.recompute is not True


def recompute_setting() -> bool | None:
    """What the enclosing `use_recompute` says."""
    return _state.recompute


def latest_decision() -> Decision | None:
    """That of the call being run, where `explain` listens."""
    recorder = None if torch.compiler.is_compiling() else _state.recorder
    return recorder.decisions[-1] if recorder is not None and recorder.decisions else None


def requested_backend(backend: str | None = None) -> str:
    """The backend asked for by the call, the enclosing `use_backend`, or the environment, in this order."""
    if backend is not None:
        return _checked(backend, "backend")
    return _state.backend if _state.backend is not None else _checked(_environment, "FASTVIT_BACKEND")


def _transforming() -> bool:
    """Whether a torch.func transform (vmap, grad, jvp, ...) or forward-mode differentiation is at work."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def reasons_for_plain_operators() -> list[str]:
    """Why every call must be plain PyTorch operators now: exporting, tracing, a transform."""
    if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        return ["exporting or tracing: the graph is kept to plain PyTorch operators"]
    if _transforming():
        return ["under torch.func or forward-mode differentiation, which see through plain PyTorch operators only"]
    return []


def repeatable() -> bool:
    """Whether operators do nothing now but compute, and no mode listens to them."""
    return (
        only_computes() and not torch._C._is_torch_function_mode_enabled() and torch._C._len_torch_dispatch_stack() == 0
    )


def tapeable() -> bool:
    """Whether operators do nothing now but compute and note their gradients, and nobody listens to either."""
    return (
        torch.is_grad_enabled()
        and _state.taping
        and _is_undisturbed()
        and not torch._C._is_torch_function_mode_enabled()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._autograd._top_saved_tensors_default_hooks(True) is None
        and not torch.is_anomaly_enabled()
    )


def only_computes() -> bool:
    """Whether operators do nothing now but compute: no gradient, no tracing, no transform, no explanation."""
    return not torch.is_grad_enabled() and _is_undisturbed()


def _is_undisturbed() -> bool:
    return (
        not torch.compiler.is_compiling()
        and _state.recorder is None
        and not torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        and not _transforming()
    )


def _reasons(candidate: Backend, operator: Operator, tensors: Tensors, static: Any, wanted: str) -> list[str]:
    """Why `candidate` cannot run this call, whether or not it was asked for."""
    if candidate.name == "reference":
        return []
    if plain := reasons_for_plain_operators():
        return plain
    reasons = candidate.supports(tensors, static)
    if wanted == "auto" and _state.recompute is False and not reasons:
        reasons = [f"recompute is off: {reason}" for reason in _recomputed(candidate, operator, tensors, static)]
    if wanted == "auto" and candidate.name == "triton" and tensors[0].device.type != "cuda":  # type: ignore[union-attr]
        return [*reasons, "on a CPU Triton only interprets: it runs when asked for by name"]
    return reasons


def _recomputed(candidate: Backend, operator: Operator, tensors: Tensors, static: Any) -> list[str]:
    """Why gradients of this call, where any are wanted, would be recomputed through the reference."""
    needs = [t is not None and t.requires_grad for t in tensors]
    if not torch.is_grad_enabled() or not any(needs):
        return []
    found, reasons = gradient_backend(operator, candidate, operator.fake(tensors, static), tensors, needs, static)
    return reasons if found is None else []


def gradient_backend(
    operator: Operator,
    backend: Backend,
    grads: Sequence[Tensor],
    tensors: Tensors,
    needs: Sequence[bool],
    static: Any,
) -> tuple[Backend | None, list[str]]:
    """Whose kernels compute these gradients of a call that `backend` runs, and why those before them cannot.

    None where nobody's do: then they are recomputed through the reference.
    """
    reasons = _gradient_reasons(backend, grads, tensors, needs, static)
    if not reasons:
        return backend, []
    for other in operator.backends:
        if other.name == _GRADIENTS_OF.get(backend.name):
            own = other.supports(tensors, static) + _gradient_reasons(other, grads, tensors, needs, static)
            if not own:
                return other, reasons
            reasons = [*reasons, *(f"{other.name}: {reason}" for reason in own)]
    return None, reasons


def _gradient_reasons(
    backend: Backend, grads: Sequence[Tensor], tensors: Tensors, needs: Sequence[bool], static: Any
) -> list[str]:
    if not isinstance(backend, BackwardBackend):
        return ["no kernels for gradients"]
    return backend.supports_backward(grads, tensors, needs, static)


def select(operator: Operator, tensors: Tensors, static: Any, backend: str | None = None) -> Backend:
    """The backend that runs this call; records the decision when `explain` listens.

    Raises:
        BackendError: a backend was asked for by name and cannot run the call.
    """
    wanted = requested_backend(backend)
    candidates, times = in_order(operator, _Reference(operator), tensors, static)
    recorder = None if torch.compiler.is_compiling() else _state.recorder
    if recorder is None:
        for candidate in candidates:
            if wanted in ("auto", candidate.name) and not _reasons(candidate, operator, tensors, static, wanted):
                return candidate
    reasons = {candidate.name: _reasons(candidate, operator, tensors, static, wanted) for candidate in candidates}
    able = [c for c in candidates if not reasons[c.name] and wanted in ("auto", c.name)]
    if not able:
        raise BackendError(_explain_failure(operator, tensors, wanted, reasons))
    chosen = able[0]
    assert recorder is not None
    rejected = {}
    for candidate in candidates:
        if candidate is not chosen:
            first = "was measured faster" if times else "comes first"
            unwanted = f"{wanted!r} was asked for" if wanted != "auto" else f"{chosen.name} {first}"
            own = reasons[candidate.name]
            rejected[candidate.name] = [*own, unwanted] if wanted != "auto" or not own else own
    channels = int(tensors[0].shape[-1])  # type: ignore[union-attr]
    measured = times if wanted == "auto" else ""
    recorder.decisions.append(
        Decision(operator.name, ".".join(recorder.path), describe(tensors), chosen.name, rejected, channels, measured)
    )
    return chosen


def describe(tensors: Sequence[Tensor | None]) -> str:
    """Shape, dtype and device of the call's first tensor."""
    first = next(t for t in tensors if t is not None)
    return f"{tuple(first.shape)} {str(first.dtype).removeprefix('torch.')} {first.device.type}"


def _explain_failure(operator: Operator, tensors: Tensors, wanted: str, reasons: dict[str, list[str]]) -> str:
    lines = [f"{operator.name}: backend {wanted!r} cannot run this call on {describe(tensors)}"]
    missing = {} if wanted in reasons else {wanted: [f"{operator.name} has no {wanted} kernels in this build"]}
    for name, own in {**reasons, **missing}.items():
        lines.append(f"  {name}: {'; '.join(own) if own else 'could run it'}")
    return "\n".join(lines)
