"""All operator schemas, fake kernels and autograd registration, in one place.

For every operator `name` this defines

* `fastvit::name(Tensor?[] tensors, Tensor? packed, ...)`: the C++ kernels, CPU and CUDA dispatch keys;
* `fastvit::name.triton(Tensor?[] tensors, ...)`: the Triton kernels (on a CPU they run under Triton's interpreter);
* `fastvit::name_pack(Tensor?[] tensors, ...)`: weights in the layout the CPU kernels read;
* `fastvit::name_backward(Tensor[] grads, Tensor?[] tensors, bool[] needs, ...)`: gradients in plain PyTorch, mostly
  recomputed through the reference;
* `fastvit::name_statistics`, where batch norms take those of the batch: their means and variances, from C++, and with
  the overload `.triton` from Triton; of depthwise_mlp the former also returns what `fastvit::name_finish` goes on from;
* `fastvit::name_backward.native` and `fastvit::name_backward.triton`, where there are such kernels: the same gradients
  from C++ (CPU and CUDA dispatch keys) and from Triton;
* `fastvit::name.sdpa` and `fastvit::name_backward.sdpa`, of the attentions: the reference around PyTorch's own
  attention, and its gradients, recomputed through that.

`...` stands for the operator's static arguments. The tensors of a call travel as one list in a documented order, so
that the autograd, fake and packing code below exists once for all operators.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import Library

from fastvit_kernels.ops import dispatch, listening
from fastvit_kernels.ops.batch_norm import BatchNorm, BatchOf, update_running_statistics
from fastvit_kernels.ops.operator import (
    Backend,
    BackwardBackend,
    GradientKernels,
    Operator,
    Outputs,
    Tensors,
    TwoStepBackend,
)
from fastvit_kernels.ops.packing import PackedWeights, check_packed

NAMESPACE = "fastvit"
Launcher = Callable[[Tensors, Any], Outputs]
Composition = Callable[[Tensors, Any], Outputs]
BackwardLauncher = Callable[[Sequence[Tensor], Tensors, Sequence[bool], Any], list[Tensor]]
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

library = Library(NAMESPACE, "DEF")
library.define("cpu_isa() -> str")
library.define("cpu_peak(str kind, float seconds) -> float")
library.define("cpu_bandwidth(float seconds) -> float")
library.define("release_memory() -> int")
library.define("shelve(Tensor block) -> Tensor")
library.define(
    "update_running_statistics(Tensor(a!)[] running, Tensor[] batch, float[] momenta, float[] corrections) -> ()"
)
torch.library.register_fake(
    f"{NAMESPACE}::update_running_statistics",
    lambda running, batch, *_: _check_one_device("update_running_statistics", [*running, *batch]),
    lib=library,
)
library.define("plan_begin() -> ()")
library.define("plan_end(Tensor[] inputs, Tensor[] outputs) -> int")
library.define("plan_replay(Tensor[] inputs, int plan) -> Tensor[]")
library.define("plan_forget(int plan) -> ()")
library.define("places_note(Tensor[] tensors) -> int")
library.define("places_unchanged(int places) -> bool")
library.define("places_forget(int places) -> ()")
library.define("fetch_ahead(Tensor objects, Tensor tables, int arrays) -> ()")
operators: dict[str, Operator] = {}
# Operators that write into their first argument, with how many of the tensors in their second one are activations.
in_place: dict[str, int] = {}
_NATIVE = ("cpu", "cuda")
_functions: dict[str, Any] = {}
# By the helper operator's name and the backend.
_statistics: dict[tuple[str, str], Any] = {}
_two_steps: set[str] = set()
_cpu_ops: dict[str, Any] = {}


def _as_tuple(outputs: Tensor | Outputs) -> Outputs:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _unwrap(outputs: Outputs) -> Tensor | Outputs:
    return outputs[0] if len(outputs) == 1 else outputs


def _define(signature: str) -> None:
    library.define(signature, tags=_TAGS)


def define_statistics(name: str, static_schema: str, fake: Callable[..., Tensor]) -> None:
    """Define a helper operator `fastvit::name(Tensor?[] tensors, ...) -> Tensor` that only has C++ kernels."""
    _define(f"{name}(Tensor?[] tensors, {static_schema}) -> Tensor")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    _statistics[name, "cpu"] = getattr(getattr(torch.ops, NAMESPACE), name).default


def define_in_place(name: str, arguments: str, activations: int) -> None:
    """Define an operator `fastvit::name(Tensor(a!) out, Tensor?[] tensors, ...) -> ()` that only has C++ kernels.

    The first `activations` of the tensors are activations, the others weights, which it reads where they lie.
    """
    _define(f"{name}({arguments}) -> ()")
    torch.library.register_fake(f"{NAMESPACE}::{name}", lambda *_: None, lib=library)
    in_place[name] = activations


def define_two_steps(operator: Operator, fake: Callable[..., Outputs]) -> None:
    """Define C++ helpers that split a call with batch statistics in two.

    `fastvit::name_statistics(Tensor?[] tensors, ..., bool keep)` returns the statistics, with `keep` what the gradients
    read besides the tensors, and the result of the last step in front of the last batch norm (empty where the call
    cannot go on from there); `fastvit::name_finish(Tensor?[] tensors, Tensor branch, ...)` is the rest.
    """
    name, statics = operator.name, operator.static_schema
    _define(f"{name}_statistics(Tensor?[] tensors, {statics}, bool keep) -> (Tensor, Tensor, Tensor)")
    returns = ", ".join(["Tensor"] * operator.returns)
    _define(f"{name}_finish(Tensor?[] tensors, Tensor branch, {statics}) -> ({returns})")

    def fake_finish(tensors: Tensors, branch: Tensor, *static: Any) -> Outputs:
        _check_one_device(f"{name}_finish", [*tensors, branch])
        return operator.fake(tensors, operator.static(*static))

    for helper, function in ((f"{name}_statistics", fake), (f"{name}_finish", fake_finish)):
        torch.library.register_fake(f"{NAMESPACE}::{helper}", function, lib=library)
    _statistics[f"{name}_statistics", "cpu"] = getattr(getattr(torch.ops, NAMESPACE), f"{name}_statistics").default
    _two_steps.add(name)


def define_keeping(operator: Operator, fake: Callable[..., Outputs]) -> None:
    """Define the C++ helper `fastvit::name_keeping(Tensor?[] tensors, ...)`.

    It is the operator without packed weights, and returns behind the results one tensor that the gradients read.
    """
    returns = ", ".join(["Tensor"] * (operator.returns + 1))
    _define(f"{operator.name}_keeping(Tensor?[] tensors, {operator.static_schema}) -> ({returns})")
    torch.library.register_fake(f"{NAMESPACE}::{operator.name}_keeping", fake, lib=library)


def define_triton_statistics(
    operator: Operator, launcher: Callable[[Tensors, Any], Tensor], fake: Callable[..., Tensor]
) -> None:
    """Define the helper operator `fastvit::name_statistics.triton(Tensor?[] tensors, ...) -> Tensor`."""
    overload, static = f"{operator.name}_statistics.triton", operator.static
    _define(f"{overload}(Tensor?[] tensors, {operator.static_schema}) -> Tensor")

    def run(tensors: Tensors, *arguments: Any) -> Tensor:
        with torch.no_grad():
            return launcher(tensors, static(*arguments))

    torch.library.register_fake(f"{NAMESPACE}::{overload}", fake, lib=library)
    for key in ("CPU", "CUDA"):
        library.impl(overload, run, key)
    name = f"{operator.name}_statistics"
    _statistics[name, "triton"] = getattr(getattr(torch.ops, NAMESPACE), name).triton


class BatchStatistics(NamedTuple):
    """What kernels for a batch's statistics computed: these, and what the call goes on from (empty: nothing).

    `on_cpu`: they were the CPU kernels.
    """

    moments: Tensor
    begun: Outputs = ()
    on_cpu: bool = False


def statistics_by_kernels(
    operator: Operator, tensors: Tensors, static: Any, backend: str | None, gradients: bool = False
) -> BatchStatistics | None:
    """Those of the backend that runs this call; None where it has none. `gradients`: some of the call are wanted."""
    chosen = dispatch.select(operator, tensors, static, backend).name
    kernels = _statistics.get((f"{operator.name}_statistics", chosen))
    if kernels is None:
        return None
    tensors = dense(tensors, operator.triton_any_layout if chosen == "triton" else ())
    on_cpu = chosen == "cpu"
    if not on_cpu or operator.name not in _two_steps:
        return BatchStatistics(kernels(tensors, *static), (), on_cpu)
    moments, kept, branch = kernels(tensors, *static, gradients and dispatch.keeps_maps())
    return BatchStatistics(moments, (kept, branch) if branch.numel() else (), on_cpu)


def take_batch_statistics(
    operator: Operator,
    tensors: list[Tensor | None],
    at: int,
    static: Any,
    bn: BatchNorm,
    count: int,
    backend: str | None,
    composed: Callable[[Tensors, Any], tuple[Tensor, Tensor]],
    by_kernels: bool = True,
) -> None:
    """Put a batch's mean and variance into `tensors` from `at` on, and update those of `bn`.

    Args:
        count: values per channel.
        composed: finds them in plain PyTorch, where no kernels do.
        by_kernels: False keeps a call from them that they do not take.
    """
    if count < 2:
        raise ValueError(f"x: expected more than 1 value per channel when training, got {count}")
    with torch.no_grad():
        found = statistics_by_kernels(operator, tensors, static, backend) if by_kernels else None
        mean, var = composed(tensors, static) if found is None else found.moments.unbind()
        tensors[at : at + 2] = mean, var
        update_running_statistics([BatchOf(bn, mean, var, count)], found is not None and found.on_cpu)


def register(
    operator: Operator,
    triton_launcher: Launcher | None = None,
    triton_backward: BackwardLauncher | None = None,
    sdpa: Composition | None = None,
    gradients: BackwardLauncher | None = None,
) -> None:
    """Define `operator`'s schemas and register its fakes, its Triton kernels (if any) and its backward.

    Args:
        operator: its `"cpu"` or `"cuda"` backend must be a `BackwardBackend` for `name_backward.native` to exist.
        triton_launcher, triton_backward: what the `.triton` overloads run.
        sdpa: what the `.sdpa` overloads run: PyTorch's operators, which its gradients are recomputed through.
        gradients: those of the reference in plain PyTorch, where they take less than running it once more.
    """
    name, statics = operator.name, operator.static_schema
    returns = "Tensor" if operator.returns == 1 else "(" + ", ".join(["Tensor"] * operator.returns) + ")"
    _define(f"{name}(Tensor?[] tensors, Tensor? packed, {statics}) -> {returns}")
    _define(f"{name}_pack(Tensor?[] tensors, {statics}) -> Tensor")

    def fake(tensors: Tensors, packed: Tensor | None, *static: Any) -> Tensor | Outputs:
        _check_one_device(name, [*tensors, packed])
        return _unwrap(operator.fake(tensors, operator.static(*static)))

    def fake_pack(tensors: Tensors, *static: Any) -> Tensor:
        # The layout, and with it the size, depends on the instruction set found at run time.
        return torch.empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)

    for overload, function in ((name, fake), (f"{name}_pack", fake_pack)):
        torch.library.register_fake(f"{NAMESPACE}::{overload}", function, lib=library)
    if gradients is None:
        _register_backward(operator, "", _recomputing(operator, lambda: operator.reference))
    else:
        _register_backward(operator, "", _unrecorded(operator, gradients))
    if any(b.name in _NATIVE and isinstance(b, BackwardBackend) for b in operator.backends):
        _register_backward(operator, ".native")
    if triton_backward is not None:
        _register_backward(operator, ".triton", _unrecorded(operator, triton_backward))
    if triton_launcher is not None:
        _register_overload(operator, "triton", triton_launcher, returns)
    if sdpa is not None:
        _register_overload(operator, "sdpa", _by_itself(sdpa), returns)
        _register_backward(operator, ".sdpa", _recomputing(operator, lambda: sdpa))
    operators[name] = operator
    _cpu_ops[name] = getattr(getattr(torch.ops, NAMESPACE), name).default
    _functions[name] = _make_function(operator)


def _check_one_device(name: str, tensors: Tensors) -> None:
    """A mixture with meta tensors is dispatched here; its results would be memory that nobody has written."""
    devices = {str(t.device) for t in tensors if t is not None}
    if len(devices) > 1:
        raise ValueError(f"{name}: expected tensors on one device, got {', '.join(sorted(devices))}")


def _register_backward(operator: Operator, overload: str, run: Callable[..., list[Tensor]] | None = None) -> None:
    """Define `name_backward` or one of its overloads; without `run` C++ brings the kernels."""
    name = f"{operator.name}_backward{overload}"
    _define(f"{name}(Tensor[] grads, Tensor?[] tensors, bool[] needs, {operator.static_schema}) -> Tensor[]")

    def fake(grads: Sequence[Tensor], tensors: Tensors, needs: Sequence[bool], *static: Any) -> list[Tensor]:
        _check_one_device(name, [*grads, *tensors])
        # There may be one entry more: see GradientKernels.adds_own.
        wanted = zip(tensors, needs[: len(tensors)], strict=True)
        return [torch.empty_like(t, memory_format=torch.contiguous_format) for t, n in wanted if n and t is not None]

    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    if run is not None:
        for key in ("CPU", "CUDA"):
            library.impl(name, run, key)


def _unrecorded(operator: Operator, launch: BackwardLauncher) -> Callable[..., list[Tensor]]:
    """A backward whose steps are not recorded for a gradient of the gradient."""

    def run(grads: Sequence[Tensor], tensors: Tensors, needs: Sequence[bool], *static: Any) -> list[Tensor]:
        if len(needs) != len(tensors):
            raise ValueError(f"needs: expected {len(tensors)} entries, got {len(needs)}")
        with torch.no_grad():
            return launch(grads, tensors, needs, operator.static(*static))

    return run


def _recomputing(operator: Operator, composition: Callable[[], Composition]) -> Callable[..., list[Tensor]]:
    """A backward that runs a composition of PyTorch's operators once more, this time recorded."""

    def run(grads: Sequence[Tensor], tensors: Tensors, needs: Sequence[bool], *static: Any) -> list[Tensor]:
        # One entry more, if true, adds the first output's gradient to x's: see `GradientKernels.adds_own`.
        adds_own = operator.residual is not None and len(needs) == len(tensors) + 1 and needs[-1]
        needs = needs[:-1] if adds_own else needs
        with _autograd_inside_kernel():
            found = recompute_gradients(
                composition(), grads, tensors, needs, operator.static(*static), create_graph=False
            )
        if adds_own and found[0] is not None:
            found[0] = found[0] + grads[0]
        # Gradients leave as fresh dense tensors, whatever autograd returned: the fake promises it.
        return [g.clone(memory_format=torch.contiguous_format) for g in found if g is not None]

    return run


def _by_itself(composition: Composition) -> Launcher:
    """A composition as a kernel: no autocast of single steps, and dense results, as the fake promises."""

    def run(tensors: Tensors, static: Any) -> Outputs:
        with torch.autocast(tensors[0].device.type, enabled=False):  # type: ignore[union-attr]
            return tuple(output.contiguous() for output in composition(tensors, static))

    return run


def _register_overload(operator: Operator, name: str, launcher: Launcher, returns: str) -> None:
    overload = f"{operator.name}.{name}"
    _define(f"{overload}(Tensor?[] tensors, {operator.static_schema}) -> {returns}")

    def fake(tensors: Tensors, *static: Any) -> Tensor | Outputs:
        _check_one_device(overload, tensors)
        return _unwrap(operator.fake(tensors, operator.static(*static)))

    def run(tensors: Tensors, *static: Any) -> Tensor | Outputs:
        # What runs between the kernels must not be recorded: the operator's gradient is registered beside it.
        with torch.no_grad():
            return _unwrap(launcher(tensors, operator.static(*static)))

    torch.library.register_fake(f"{NAMESPACE}::{overload}", fake, lib=library)
    for key in ("CPU", "CUDA"):
        library.impl(overload, run, key)


def recompute_gradients(
    composition: Composition,
    grads: Sequence[Tensor],
    tensors: Tensors,
    needs: Sequence[bool],
    static: Any,
    create_graph: bool,
) -> list[Tensor | None]:
    """Gradients of PyTorch's operators at `tensors`, one entry per tensor (None where `needs` is False).

    With `create_graph` the result stays connected to `tensors` and `grads`, so it can be differentiated again.
    """
    # `static.dtype` already says what autocast decided in the forward.
    with torch.enable_grad(), torch.autocast(grads[0].device.type, enabled=False):
        if create_graph:
            # A view of each input: its gradient is taken there, yet its own history, if any, stays attached.
            inputs = [
                t.view_as(t).requires_grad_() if t is not None and n else t for t, n in zip(tensors, needs, strict=True)
            ]
        else:
            inputs = [
                t.detach().requires_grad_(n) if t is not None else None for t, n in zip(tensors, needs, strict=True)
            ]
        outputs = composition(inputs, static)
        wanted = [t for t, n in zip(inputs, needs, strict=True) if n and t is not None]
        # An output that depends on none of the wanted inputs has no history and may not be asked for.
        pairs = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if output.requires_grad]
        found = torch.autograd.grad(
            [output for output, _ in pairs],
            wanted,
            [grad for _, grad in pairs],
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )
    remaining = iter(found)
    return [next(remaining) if n and t is not None else None for t, n in zip(tensors, needs, strict=True)]


def _autograd_inside_kernel() -> AbstractContextManager[Any]:
    """Autograd also where a dispatch mode (a FLOP counter, a schema check) called this kernel and switched it off."""
    return torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)


def _passed_on(
    operator: Operator, grads: Sequence[Tensor], tensors: Tensors, needs: Sequence[bool], static: Any
) -> int | None:
    """Position of a wanted residual whose gradient is that of the first output, which it need not be copied from."""
    at = operator.residual
    if at is None or not needs[at] or operator.residual_in_all(static):
        return None
    residual = tensors[at]
    return at if residual is not None and residual.dtype is grads[0].dtype else None


class GradientPlan(NamedTuple):
    """Who computes the gradients of a call, and what of them.

    Attributes:
        backend: whose kernels do; None where they are recomputed through the reference.
        needs: which of them, without one that is the result's.
        passed_on: position of a tensor whose gradient is that of the first output.
        adds_own: the kernels add it to x's.
        reasons: why those before `backend` do not.
    """

    backend: BackwardBackend | None
    needs: list[bool]
    passed_on: int | None
    adds_own: bool
    reasons: list[str]


def plan_gradients(
    operator: Operator,
    backend: Backend,
    grads: Sequence[Tensor],
    tensors: Tensors,
    needs: Sequence[bool],
    static: Any,
    residual_is_x: bool,
) -> GradientPlan:
    """By `backend`, or whoever has kernels for these gradients in its place, else recomputed.

    Args:
        grads: those of the outputs, row-major.
        residual_is_x: the tensors have x in two places; x's gradient may then come whole in the first of them.
    """
    passed_on = _passed_on(operator, grads, tensors, needs, static)
    needs = [n and index != passed_on for index, n in enumerate(needs)]
    if not any(needs):
        return GradientPlan(None, needs, passed_on, False, [])
    found, reasons = dispatch.gradient_backend(operator, backend, grads, tensors, needs, static)
    adds_own = residual_is_x and passed_on is not None and needs[0] and isinstance(found, GradientKernels)
    adds_own = adds_own and found.adds_own(tensors, static)  # type: ignore[union-attr]
    return GradientPlan(found if isinstance(found, BackwardBackend) else None, needs, passed_on, adds_own, reasons)


def gradients(
    operator: Operator,
    plan: GradientPlan,
    grads: Sequence[Tensor],
    tensors: Tensors,
    static: Any,
    outputs: Sequence[Tensor] = (),
) -> list[Tensor | None]:
    """One entry per tensor.

    Args:
        grads: those of the outputs, row-major.
        outputs: those of the forward, where the backend reads them, or what it kept besides.
    """
    needs = plan.needs
    remaining: Iterator[Tensor] = iter(())
    if any(needs):
        if plan.backend is not None:
            asked = [*needs, True] if plan.adds_own else needs
            # Autograd hands results out with their history, which no kernel has a use for.
            read = [*grads, *(o.detach() if o.requires_grad else o for o in outputs)]
            remaining = iter(plan.backend.run_backward(read, tensors, asked, static))
        else:
            recomputing = getattr(getattr(torch.ops, NAMESPACE), f"{operator.name}_backward").default
            remaining = iter(recomputing(grads, list(tensors), needs, *static))
    results = [next(remaining) if n else None for n in needs]
    if plan.passed_on is not None and not plan.adds_own:
        results[plan.passed_on] = grads[0]
    return results


def _make_function(operator: Operator) -> Any:
    class Fused(torch.autograd.Function):
        """A backend's forward and, where it has one for the gradients in question, its backward."""

        @staticmethod
        def forward(ctx: Any, backend: Backend, static: Any, begun: int, *given: Tensor | None) -> Any:
            tensors, steps = given[begun:], tuple(t for t in given[:begun] if t is not None)
            outputs, kept = run_keeping(backend, tensors, steps, static)
            if (heard_by := listening.listener()) is not None:
                heard_by.keeps(kept)
            unread = operator.unread
            read = [t if t is None or i not in unread else shape_of(t) for i, t in enumerate(tensors)]
            ctx.save_for_backward(*read, *kept)
            ctx.backend, ctx.static, ctx.decision, ctx.begun = backend, static, dispatch.latest_decision(), begun
            ctx.residual_is_x = operator.residual is not None and tensors[operator.residual] is tensors[0]
            return _unwrap(outputs)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            needs, static = [bool(n) for n in ctx.needs_input_grad[3 + ctx.begun :]], ctx.static
            saved = ctx.saved_tensors
            tensors, outputs = saved[: len(needs)], saved[len(needs) :]
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                found = recompute_gradients(operator.reference, grads, tensors, needs, static, create_graph=True)
            else:
                grads = tuple(row_major(grads))
                plan = plan_gradients(operator, ctx.backend, grads, tensors, needs, static, ctx.residual_is_x)
                if ctx.decision is not None and any(plan.needs):
                    ctx.decision.gradients = getattr(plan.backend, "name", "reference")
                    ctx.decision.gradients_rejected = plan.reasons
                found = gradients(operator, plan, grads, tensors, static, outputs)
            return (*[None] * (3 + ctx.begun), *found)

    Fused.__name__ = Fused.__qualname__ = f"Fused[{operator.name}]"
    return Fused


def run_keeping(backend: Backend, tensors: Tensors, begun: Outputs, static: Any) -> tuple[Outputs, Outputs]:
    """The outputs of a call whose gradients are wanted, and what these read besides its tensors.

    `begun` is what `statistics_by_kernels` found for it.
    """
    kept: Outputs = ()
    if begun:
        outputs = _finish(backend, tensors, begun, static)
        kept = begun if begun[0].numel() else ()
    elif isinstance(backend, GradientKernels) and dispatch.keeps_maps():
        outputs, kept = backend.run_keeping(tensors, static)
    else:
        outputs = backend.run(tensors, None, static)
    if isinstance(backend, GradientKernels) and backend.reads_outputs(static):
        kept = (*outputs, *kept)
    return outputs, kept


def _finish(backend: Backend, tensors: Tensors, begun: Outputs, static: Any) -> Outputs:
    assert isinstance(backend, TwoStepBackend)
    return backend.finish(tensors, begun, static)


def shape_of(t: Tensor) -> Tensor:
    """A tensor of the same shape and dtype, whose memory is that of one element."""
    return t.new_empty(()).expand(t.shape)


def row_major(grads: Sequence[Tensor]) -> list[Tensor]:
    """The output gradients as kernels read them."""
    compiling = torch.compiler.is_compiling()
    return [_row_major(_signed(g, compiling)) for g in grads]


def dense(tensors: Tensors, except_at: Collection[int] = ()) -> list[Tensor | None]:
    """The tensors as kernels read them: row-major, after one explicit copy where they are not.

    Those at `except_at` may have any layout. A sign that a view only notes (`z.conj().imag`) is written out everywhere.
    """
    found = list(tensors)
    compiling = torch.compiler.is_compiling()
    for index, t in enumerate(found):
        if t is not None:
            t = _signed(t, compiling)
            found[index] = t if index in except_at else _row_major(t)
    return found


def _row_major(t: Tensor) -> Tensor:
    """The tensor with the strides that its shape says: PyTorch calls any strides contiguous where a size is 1."""
    if not t.is_contiguous():
        return t.contiguous()
    shape = t.shape
    if 1 not in shape:
        return t
    expected = 1
    for size, stride in zip(reversed(shape), reversed(t.stride()), strict=True):
        if size == 1 and stride != expected:
            return t.view(-1).view(shape)
        expected *= max(size, 1)
    return t


def _signed(t: Tensor, compiling: bool) -> Tensor:
    """The tensor with its sign in memory."""
    # torch.compile cannot look at it; in a graph, writing out what is written costs nothing.
    return t.resolve_neg() if compiling or t.is_neg() else t


def _distinct(tensors: Tensors) -> list[Tensor | None]:
    """Views for repeated tensors (x is often its own residual), which torch.compile cannot pass to a Function."""
    found: list[Tensor | None] = []
    for t in tensors:
        found.append(t.view_as(t) if t is not None and any(t is other for other in found) else t)
    return found


def call(
    operator: Operator,
    tensors: Tensors,
    static: Any,
    *,
    packed: PackedWeights | None = None,
    backend: str | None = None,
    begun: Outputs = (),
) -> Outputs:
    """Run `operator` on the backend that `dispatch` selects, with autograd when a gradient is needed.

    `begun` is what `statistics_by_kernels` found for this call.
    """
    check_packed(packed)
    chosen = dispatch.select(operator, tensors, static, backend)
    if chosen.name == "reference":
        outputs = chosen.run(tensors, None, static)
        decision = dispatch.latest_decision()
        if decision is not None and any(out.requires_grad for out in outputs):
            decision.gradients = chosen.name
        return outputs
    # The CPU kernels read weights only to pack them, and take them in any layout.
    on_cpu = chosen.name == "cpu"
    tensors = dense(tensors, operator.loose_on_cpu if on_cpu else operator.triton_any_layout)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        if torch.compiler.is_compiling():
            tensors = _distinct(tensors)
        apply = partial(_functions[operator.name].apply, chosen, static, len(begun), *begun, *tensors)
        heard_by = listening.listener()
        if heard_by is None:
            return _as_tuple(apply())
        return _as_tuple(heard_by.fused(operator, chosen, static, begun, tensors, apply))
    if begun:
        return _finish(chosen, tensors, begun, static)
    prepared = packed.get(operator, tensors, static) if packed is not None and chosen.name == "cpu" else None
    return chosen.run(tensors, prepared, static)


def repeat(operator: Operator, packed: PackedWeights, tensors: Tensors, static: Any) -> Outputs:
    """`call` for a call like one that ran on the CPU kernels before: the caller knows that nothing else has changed."""
    return _as_tuple(_cpu_ops[operator.name](tensors, packed.get(operator, tensors, static), *static))
