"""Repeating the calls of a module's forward in training without running its Python again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastvit_kernels import _extension
from fastvit_kernels.nn import repetition
from fastvit_kernels.nn.program import Places
from fastvit_kernels.nn.repetition import Repeater
from fastvit_kernels.nn.tape import Tape
from fastvit_kernels.ops import dispatch


class _Function:
    """What a tape has recorded, as long as the module's tensors look as they did."""

    def __init__(self, run: Callable[..., Any], module: nn.Module) -> None:
        self.run = run
        self._tensors = repetition.constants(module)
        self._places = Places(self._tensors)
        self._wanted = [t.requires_grad for t in self._tensors]

    def valid(self) -> bool:
        return self._places.unchanged() and [t.requires_grad for t in self._tensors] == self._wanted


class Taping(Repeater):
    """Records and repeats the calls of one module's forward while gradients are wanted, on a CPU.

    Where operators follow each other they become one node of autograd's graph, which computes their gradients in one
    go: see `fastvit_kernels.nn.chain`. Results and gradients are the same, to the bit. For the rest as `Repeater`;
    besides, nobody may have asked to pack what is saved for the gradients (activation checkpointing does), or to find
    anomalies.
    """

    def _possible(self) -> bool:
        return dispatch.tapeable()

    def _key(self, module: nn.Module, inputs: tuple[Any, ...]) -> Any:
        key = super()._key(module, inputs)
        if key is None:
            return None
        wanted = [x.requires_grad for x in inputs if isinstance(x, Tensor)]
        return (*key, dispatch.recompute_setting(), *wanted)

    def _try(self, module: nn.Module, compute: Callable[..., Any], inputs: tuple[Any, ...]) -> tuple[Any, Any]:
        tape = Tape(repetition.distinct(inputs), module.parameters(), module.buffers())
        with tape:
            output = compute(*inputs)
        run = tape.function(output)
        return output, None if run is None else _Function(run, module)

    def _run(self, program: Any, inputs: tuple[Any, ...]) -> Any:
        with repetition.without_autocast():
            return program.run(*repetition.distinct(inputs))


class Taped(nn.Module):
    """Base of modules whose forward is repeated in training: see `Taping`."""

    _taping: Taping | None = None

    def taped(self, compute: Callable[..., Any], *inputs: Any) -> Any:
        """`compute(*inputs)`, which may depend on nothing but the inputs and what this module holds."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return compute(*inputs)
        if self._taping is None:
            # Without the C++ part there is nothing to save.
            if _extension.parts["cpu"].problem is not None:
                return compute(*inputs)
            self._taping = Taping()
        return self._taping(self, compute, *inputs)
