"""What a training step holds in memory beside parameters, inputs and their gradients.

Three figures, since none of them says everything: what PyTorch's allocator hands out, also inside compiled graphs and
kernels; what the operating system sees, which is more by what the allocator cannot give back, by kernels' scratch and
by other libraries' own memory; and what autograd keeps between forward and backward.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fastvit_kernels import _extension
from fastvit_kernels.bench.training import Training

_CLEAR_PEAK = "5"


class StepMemory(NamedTuple):
    """Bytes.

    Attributes:
        allocated: the most that tensors hold at once.
        resident: what the process grows by; None where the system does not tell.
        saved: of tensors that the forward keeps for the backward.
    """

    allocated: int
    resident: int | None
    saved: int


def of_step(training: Training) -> StepMemory:
    """Measure a step that has run before: what compilers and libraries set up once is not a step's."""
    with _without_gradients(training):
        own = [*training.parameters.values(), *training.buffers.values(), *training.inputs]
        kept = saved(training.forward, own)
        return StepMemory(allocated_peak(training.step), resident_peak(training.step), kept)


@contextmanager
def _without_gradients(training: Training) -> Iterator[None]:
    """Gradients of leaves are given back as soon as they are there: an optimiser's, not activations."""

    def drop(leaf: Tensor) -> None:
        leaf.grad = None

    handles = [leaf.register_post_accumulate_grad_hook(drop) for leaf in training.leaves]
    try:
        # What was there before.
        for leaf in training.leaves:
            drop(leaf)
        yield
    finally:
        for handle in handles:
            handle.remove()


def allocated_peak(run: Callable[[], object]) -> int:
    """The most bytes that PyTorch's CPU allocator has given out at once during a call, beside those of before."""
    _release()
    with _quiet_profiler(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    assert profiled.profiler is not None and profiled.profiler.kineto_results is not None
    found = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(found, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Without its own lines on starting and stopping."""
    name = "KINETO_LOG_LEVEL"
    previous = os.environ.get(name)
    os.environ[name] = "99"
    try:
        yield
    finally:
        os.environ.pop(name)
        if previous is not None:
            os.environ[name] = previous


def resident_peak(run: Callable[[], object]) -> int | None:
    """The most bytes of physical memory that the process holds during a call, beside those of before (Linux)."""
    _release()
    with contextlib.suppress(OSError, AttributeError):
        # Otherwise the call would find memory in the process that others have left there.
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text(_CLEAR_PEAK)
        before = _status("VmRSS")
        run()
        return max(0, _status("VmHWM") - before)
    except OSError:
        return None


def _release() -> None:
    """What earlier calls left behind: the kernels keep memory for their next call, which must count."""
    gc.collect()
    if _extension.parts["cpu"].loaded:
        torch.ops.fastvit.release_memory()


def _status(name: str) -> int:
    """A line of this process's memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith(f"{name}:"))
    return int(kilobytes) * 1024


def saved(forward: Callable[[], object], own: Iterable[Tensor]) -> int:
    """Bytes of the storages that a forward keeps for its backward, without those of the tensors `own`."""
    known = {t.untyped_storage()._cdata for t in own}
    kept: dict[int, Tensor] = {}

    def note(t: Tensor) -> Tensor:
        # The tensor itself is kept as well: the address of one that is gone would be another's.
        kept.setdefault(t.untyped_storage()._cdata, t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        # What was kept may go with the results.
        results = forward()
    del results
    return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in known)
