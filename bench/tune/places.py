"""Where configurations are looked up: every kernel that an operator launches, at its widths."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import torch

from fastvit_kernels.bench.gpu.jobs import BF16, FORWARD, Find
from fastvit_kernels.bench.gpu.peers import VARIANTS, stock
from fastvit_kernels.ops import arguments, library, triton_support, tuning
from fastvit_kernels.ops.operator import Tensors
from fastvit_kernels.ops.triton_configs import Config
from fastvit_kernels.ops.triton_support import Arithmetic
from fastvit_kernels.ops.tuning import Launch, Tuning


class Call(NamedTuple):
    """An operator at a published shape, forward or in training; as in `fastvit_kernels.bench.gpu.jobs`."""

    suite: str
    case: str
    batch: int
    mode: str
    dtype: str = BF16

    def __str__(self) -> str:
        dtype = "" if self.dtype == BF16 else f", {self.dtype}"
        return f"{self.suite} {self.case}, {self.mode}{dtype}"


class Place(NamedTuple):
    """What a configuration is looked up by."""

    kernel: str
    architecture: str
    kind: str
    width: int
    depth: int

    def __str__(self) -> str:
        depth = f" from {self.depth}" if self.depth else ""
        return f"{self.kernel} {self.architecture} {self.kind} {self.width}{depth}"

    def launch(self, config: Config, device: str = "", milliseconds: float = 0.0, usual: float = 0.0) -> Launch:
        return Launch(*self, config, device, milliseconds, usual)


def with_config(place: Place, config: Config) -> Tuning:
    """The entries in force, but this configuration at this place."""
    # Nobody reads these times, but without them it would count as failed.
    return Tuning((place.launch(config, milliseconds=1.0, usual=1.0),)) + tuning.current()


@contextmanager
def looked_up() -> Iterator[dict[Place, Config]]:
    """Filled with what is looked up inside: the places, and the configurations without any tuning."""
    found: dict[Place, Config] = {}
    original = triton_support.config

    def config(kernel: str, arithmetic: Arithmetic, width: int, *channels: int) -> Config:
        place = Place(*triton_support.place(kernel, arithmetic, width, *channels))
        found[place] = triton_support.usual(*place[:4])
        return original(kernel, arithmetic, width, *channels)

    with mock.patch.object(triton_support, "config", config):
        yield found


@contextmanager
def autocast_without_memory(dtype: torch.dtype | None) -> Iterator[None]:
    """Autocast to this dtype, or none, for tensors without memory, which torch has none for."""
    if dtype is None:
        yield
        return
    with (
        mock.patch.object(arguments, "autocast_is_on", lambda device: True),
        mock.patch.object(torch, "get_autocast_dtype", lambda device: dtype),
    ):
        yield


def launches(call: Call, find: Find) -> Callable[[], None]:
    """Launches the kernels of a call on tensors without memory: its forward or, in training, its gradients."""
    case = replace(find(call.suite, call.case, call.batch), device="meta", _remembered={})
    variant = VARIANTS[call.dtype, call.mode]
    module = case.fuse(stock(case, call.mode, variant))
    inputs = [x.requires_grad_(call.mode != FORWARD) for x in case.inputs(variant)]
    caught: list[tuple[Any, list[Any], Any]] = []

    class Stop(Exception):
        pass

    def catch(operator: Any, tensors: Tensors, static: Any, **options: Any) -> Any:
        caught.append((operator, library.dense(tensors, operator.triton_any_layout), static))
        raise Stop

    autocast = autocast_without_memory(torch.bfloat16 if variant == "autocast" else None)
    with mock.patch.object(library, "call", catch), autocast, contextlib.suppress(Stop):
        module(*inputs)
    ((operator, tensors, static),) = caught
    needs = [t is not None and t.requires_grad for t in tensors]
    bridge = importlib.import_module(f"fastvit_kernels.ops.{operator.name}.triton")
    tensors = [t if t is None else t.detach() for t in tensors]

    def run() -> None:
        if call.mode == FORWARD:
            bridge.launch(tensors, static)
            return
        grads = operator.fake(tensors, static)
        backend = next(b for b in operator.backends if b.name == "triton")
        if hasattr(backend, "supports_backward") and not backend.supports_backward(grads, tensors, needs, static):
            bridge.launch_backward(grads, tensors, needs, static)

    return run
