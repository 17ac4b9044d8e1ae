"""Repeating a module's operator calls without running its Python again.

At batch 1 a block's kernels take a fraction of a millisecond, and looking at some twenty submodules, checking arguments
and choosing backends before each of them costs a good part of that. A module that is prepared for inference therefore
records which operators its forward calls, and as long as nothing has changed calls those alone.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastvit_kernels import _extension
from fastvit_kernels.nn.program import Program
from fastvit_kernels.nn.recording import Recording
from fastvit_kernels.nn.watch import Watch
from fastvit_kernels.ops import dispatch
from fastvit_kernels.ops.arguments import autocast_is_on

# Enough for the sizes that alternate in practice; where they never repeat nothing is recorded.
_MOST_PROGRAMS = 8
# A module that changes at every call wastes this many records, and no more.
_MOST_WASTED = 3


class _Records(NamedTuple):
    """The programs of a module for several inputs, and what they rest on."""

    owner: weakref.ref[nn.Module]
    watch: Watch
    programs: dict[Any, Any]


class Repeater:
    """Records and repeats the calls of one module's forward.

    The second call in a row with inputs of the same shapes, dtypes and memory layouts is recorded, and the record is
    kept if it gives the same result to the bit. It is used as long as nothing that the forward could look at has
    changed (`Watch`), no gradient is wanted and nobody traces, compiles or explains. In-place changes of parameters
    need no attention: the operators read them anew. Nothing is recorded where submodules are of a class that somebody
    else wrote, because such code may look at anything.

    It belongs to the first module that it records; copies and pickles start empty.

    Args:
        frozen: somebody promises that nothing but tensors will change, so that nothing else is looked at behind the
            recording; only the module's own mode is.
    """

    def __init__(self, frozen: bool = False) -> None:
        self._frozen = frozen
        self._records: _Records | None = None
        self._latest: Any = None
        self._wasted = 0

    def __call__(self, module: nn.Module, compute: Callable[..., Any], *inputs: Any) -> Any:
        """`compute(*inputs)`; it may depend on nothing but the inputs and what `module` and its submodules hold.

        Inputs that are no tensors are compared by value.
        """
        if not self._possible() or (key := self._key(module, inputs)) is None:
            return compute(*inputs)
        # Other threads may replace the records meanwhile; these stay what they are.
        records = self._records
        if records is not None:
            if records.owner() is not module:
                return compute(*inputs)
            if not self._frozen and not records.watch.unchanged():
                if records.watch.hooked():
                    return compute(*inputs)
                records = self._records = None
                self._wasted += 1
            elif key in records.programs:
                program = records.programs.get(key)
                if program is None:
                    return compute(*inputs)
                if program.valid():
                    self._wasted = 0
                    return self._run(program, inputs)
                records.programs.pop(key, None)
                self._wasted += 1
        if self._latest != key or self._wasted >= _MOST_WASTED:
            self._latest = key
            return compute(*inputs)
        if records is None:
            records = _Records(weakref.ref(module), Watch(list(module.modules())), {})
        return self._record(records, module, compute, inputs, key)

    def _record(
        self,
        records: _Records,
        module: nn.Module,
        compute: Callable[..., Any],
        inputs: tuple[Any, ...],
        key: Any,
    ) -> Any:
        if records.watch.hooked():
            return compute(*inputs)
        if not records.watch.knows_everything():
            records.programs[key] = None
            self._records = records
            return compute(*inputs)
        cached = torch.is_autocast_cache_enabled()
        # A weight that autocast converted before would be a tensor of unknown origin.
        torch.set_autocast_cache_enabled(False)
        try:
            output, program = self._try(module, compute, inputs)
        finally:
            torch.set_autocast_cache_enabled(cached)
        if len(records.programs) >= _MOST_PROGRAMS:
            records.programs.clear()
        records.programs[key] = program
        self._records = records
        return output

    def _possible(self) -> bool:
        """Whether calls may be repeated now."""
        return dispatch.repeatable()

    def _key(self, module: nn.Module, inputs: tuple[Any, ...]) -> Any:
        """What else a program is made for; None for inputs that no program takes."""
        return _key(module, inputs)

    def _try(
        self, module: nn.Module, compute: Callable[..., Any], inputs: tuple[Any, ...]
    ) -> tuple[Any, Program | None]:
        """The result, and a program that gives the same; None where there is none."""
        recording = Recording(distinct(inputs), constants(module))
        with recording:
            output = compute(*inputs)
        program = recording.program(output)
        if program is not None:
            with without_autocast():
                program.plan(distinct(inputs))
            if not _same(self._run(program, inputs), output):
                program = None
        return output, program

    def _run(self, program: Program, inputs: tuple[Any, ...]) -> Any:
        with without_autocast():
            return program.run(distinct(inputs))

    @property
    def recorded(self) -> int:
        """How many different calls would be repeated."""
        return 0 if self._records is None else sum(p is not None for p in list(self._records.programs.values()))

    def __reduce__(self) -> tuple[type[Repeater], tuple[bool]]:
        return type(self), (self._frozen,)


class Repeating(nn.Module):
    """Base of modules whose forward is repeated when they are prepared for inference: see `Repeater`."""

    _repeater: Repeater | None = None

    def prepare_repetition(self, enabled: bool, frozen: bool = False) -> None:
        """Record the calls of the forward from now on (`enabled`), or forget them and stop."""
        self.__dict__.pop("_repeater", None)
        # Without the C++ part there is nothing to save.
        if enabled and _extension.parts["cpu"].problem is None:
            self._repeater = Repeater(frozen)

    def repeat(self, compute: Callable[..., Any], *inputs: Any) -> Any:
        """`compute(*inputs)`, repeated where that is prepared and possible."""
        if self._repeater is None or torch.compiler.is_compiling():
            return compute(*inputs)
        return self._repeater(self, compute, *inputs)


def _key(module: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """What else a program is made for; None for inputs that no program takes."""
    found: list[Any] = [
        module.training,
        torch.is_inference_mode_enabled(),
        torch.get_num_threads(),
        torch.get_autocast_dtype("cpu") if autocast_is_on("cpu") else None,
        dispatch.requested_backend(),
    ]
    addresses = []
    for x in inputs:
        if isinstance(x, Tensor):
            plain = type(x) in (Tensor, nn.Parameter) and x.layout is torch.strided and not x.is_neg()
            if not plain or x.device.type != "cpu":
                return None
            found += [x.shape, x.stride(), x.storage_offset(), x.dtype]
            # Two inputs that were one tensor are one variable of the program.
            addresses.append(id(x))
        else:
            found.append(x)
    key = (*found, *map(addresses.index, addresses))
    try:
        hash(key)
    except TypeError:
        return None
    return key


def without_autocast() -> contextlib.AbstractContextManager[Any]:
    """Its conversions are part of the record."""
    return torch.autocast("cpu", enabled=False) if autocast_is_on("cpu") else contextlib.nullcontext()


def distinct(inputs: tuple[Any, ...]) -> list[Tensor]:
    """The tensors among them, each once."""
    return list({id(x): x for x in inputs if isinstance(x, Tensor)}.values())


def constants(module: nn.Module) -> list[Tensor]:
    """The tensors of a module."""
    return [*module.parameters(), *module.buffers()]


def _same(found: Any, expected: Any) -> bool:
    return all(map(_identical, tree_leaves(found), tree_leaves(expected)))


def _identical(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return bool(a == b)
    if a.shape != b.shape or a.stride() != b.stride() or a.dtype is not b.dtype:
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all())
