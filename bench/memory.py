"""Whether a case fits into this machine's memory, found without computing it."""

from __future__ import annotations

import os
import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fastvit_kernels.bench import training
from fastvit_kernels.bench.cases import Case
from fastvit_kernels.bench.training import Training

# Peers take turns but keep what their runtimes hold: memory for about as many copies of the stock module's own need.
HOLDERS = 3


class _Peak(TorchDispatchMode):
    """The most bytes that tensors hold at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._now = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.add(out)
        return out

    def add(self, tree: Any) -> None:
        for leaf in pytree.tree_leaves(tree):
            if isinstance(leaf, Tensor) and (storage := leaf.untyped_storage())._cdata not in self._alive:
                self._alive[storage._cdata] = storage.nbytes()
                self._now += storage.nbytes()
                self.peak = max(self.peak, self._now)
                weakref.finalize(storage, self._drop, storage._cdata)

    def _drop(self, key: int) -> None:
        self._now -= self._alive.pop(key)


def stock_bytes(case: Case) -> int:
    """What the stock module in fp32, its inputs and its intermediate results take at once."""
    with torch.device("meta"):
        module, inputs = case.build().eval(), case.make_inputs()
        with torch.no_grad(), _Peak() as memory:
            memory.add([*module.parameters(), *module.buffers(), *inputs])
            module(*inputs)
    return memory.peak


def training_bytes(case: Case) -> int:
    """What a step of the stock module in fp32 takes at once, its parameters, inputs and gradients included."""
    shapes = replace(case, device="meta", _remembered={})
    step = Training(training.stock(shapes, "fp32"), shapes, "fp32")
    with _Peak() as memory:
        memory.add([*step.parameters.values(), *step.buffers.values(), *step.inputs])
        outputs = step.forward()
        torch.autograd.backward(outputs, [torch.empty_like(out) for out in outputs])
    return memory.peak


def machine_bytes() -> int:
    """Physical memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def shortage(case: Case) -> str | None:
    """Why this machine's memory is too small for measuring peers on this case; None where it is not."""
    return _shortage(HOLDERS * stock_bytes(case))


def shortage_in_training(case: Case) -> str | None:
    """The same for its training steps. The largest is the one in fp64, all other gradients are kept beside it."""
    return _shortage(HOLDERS * training_bytes(case))


def _shortage(needed: int) -> str | None:
    there = machine_bytes()
    if needed <= there:
        return None
    gib = 2**30
    return f"needs {needed / gib:.1f} GiB of memory with other peers beside it, this machine has {there / gib:.1f}"
