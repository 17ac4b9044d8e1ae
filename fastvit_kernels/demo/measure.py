"""Scores and times of models on the same input."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from fastvit_kernels.bench.measure import Plan, Times, interleave

_BLOCK = re.compile(r"(?:^|\.)(?:(?:blocks|layers)\.\d+|patch_embed|embedding)$")
REST = "everything else"


@dataclass(frozen=True)
class BlockTime:
    """Median seconds spent inside one block, per variant."""

    name: str
    seconds: dict[str, float]


@contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Inference without gradients, in fp32 or with bf16 autocast."""
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
        yield


def logits(model: nn.Module, x: Tensor) -> Tensor:
    """The class scores `[B, num_classes]` of a model that returns them bare or in a `transformers` output."""
    out: Any = model(x)
    return getattr(out, "logits", out)


def measure(
    models: Mapping[str, nn.Module], x: Tensor, plan: Plan, advance: Callable[[], None]
) -> tuple[dict[str, Times], list[BlockTime]]:
    """Time models that share their module names in turn, and with module hooks every block (and embedding) in them.

    The hooks' own time, about a microsecond each, is contained.

    Args:
        models: variant -> model.
        x: the input of all.
        plan: rounds and clock.
        advance: told after every round.

    Returns:
        The times of whole calls; and per block, in the order of the first model, the median time inside it, followed by
        that outside all blocks.
    """
    names = _block_names(next(iter(models.values())))
    samples: dict[str, dict[str, list[float]]] = {v: {n: [] for n in [*names, REST]} for v in models}

    def run(variant: str) -> None:
        start = time.perf_counter()
        logits(models[variant], x)
        total = time.perf_counter() - start
        samples[variant][REST].append(total - sum(samples[variant][name][-1] for name in names))

    with ExitStack() as stack:
        for variant, model in models.items():
            for name in names:
                stack.enter_context(_timed(model.get_submodule(name), samples[variant][name]))
        times = interleave({variant: partial(run, variant) for variant in models}, plan, advance)
    shared = _shared_path(names)
    blocks = [
        BlockTime(name.removeprefix(shared), {v: median(samples[v][name]) for v in models}) for name in [*names, REST]
    ]
    return times, blocks


def _shared_path(names: list[str]) -> str:
    """What the names have in common and a reader can do without: all but the last common component."""
    return "".join(f"{part}." for part in os.path.commonprefix(names).split(".")[:-2])


def _block_names(model: nn.Module) -> list[str]:
    names: list[str] = []
    for name, _ in model.named_modules():
        if _BLOCK.search(name) and not any(name.startswith(f"{outer}.") for outer in names):
            names.append(name)
    return names


@contextmanager
def _timed(module: nn.Module, samples: list[float]) -> Iterator[None]:
    started: list[float] = []

    def before(module: nn.Module, args: Any) -> None:
        started.append(time.perf_counter())

    def after(module: nn.Module, args: Any, output: Any) -> None:
        samples.append(time.perf_counter() - started.pop())

    handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
