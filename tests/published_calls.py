"""What the operators are called with in whole models, on meta tensors: every published width, layout and option."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from triton_calls import RUNNING_STATISTICS, Precision

from fastvit_kernels import models
from fastvit_kernels.bench.tune.places import autocast_without_memory
from fastvit_kernels.ops import library
from fastvit_kernels.ops.operator import Operator, Outputs, Tensors

BATCH = 8
# SegFormer's operators are its MiT's.
MODELS = [name for name in models.list_models() if not name.startswith("segformer")]
_SIDES = {"cmt_ti": 160, "cmt_xs": 192, "cmt_b": 256}

Launch = Callable[[], object]


def launches_of(model: str, precision: Precision) -> list[Launch]:
    """Those of a model's operators in inference, and in training with their gradients and batch statistics."""
    return [
        launch
        for training in (False, True)
        for operator, tensors, static, part in _calls(model, precision, training)
        for launch in _launches(operator, tensors, static, part)
    ]


def _calls(model: str, precision: Precision, training: bool) -> list[tuple[Operator, Tensors, Any, str]]:
    """The calls that differ, each with what is launched for it."""
    side = _SIDES.get(model, 32 if "cifar" in model else 224)
    found: dict[str, tuple[Operator, Tensors, Any, str]] = {}

    def keep(operator: Operator, tensors: Tensors, static: Any, part: str) -> None:
        tensors = [t if t is None else t.detach() for t in library.dense(tensors, operator.triton_any_layout)]
        shapes = [None if t is None else (t.shape, t.dtype) for t in tensors]
        found.setdefault(f"{operator.name} {shapes} {static} {part}", (operator, tensors, static, part))

    def call(operator: Operator, tensors: Tensors, static: Any, **options: Any) -> Outputs:
        keep(operator, tensors, static, "gradients" if training else "forward")
        return operator.fake(tensors, static)

    def statistics(operator: Operator, tensors: Tensors, static: Any, *options: Any) -> None:
        keep(operator, tensors, static, "statistics")

    autocast = None if precision.products == precision.parameters else precision.products
    with torch.device("meta"), torch.no_grad(), autocast_without_memory(autocast):
        built = models.create_model(model).train(training).to(precision.parameters)
        images = torch.empty(BATCH, 3, side, side, dtype=precision.activations)
        with (
            mock.patch.object(library, "call", call),
            mock.patch.object(library, "statistics_by_kernels", statistics),
        ):
            built(images)
    return list(found.values())


def _launches(operator: Operator, tensors: Tensors, static: Any, part: str) -> list[Launch]:
    bridge = importlib.import_module(f"fastvit_kernels.ops.{operator.name}.triton")
    if part == "statistics":
        return [lambda: bridge.launch_statistics(tensors, static)]
    found: list[Launch] = [lambda: bridge.launch(tensors, static)]
    if part == "gradients":
        ignored = RUNNING_STATISTICS.get(operator.name, ())
        needs = [t is not None and index not in ignored for index, t in enumerate(tensors)]
        grads = operator.fake(tensors, static)
        found.append(lambda: bridge.launch_backward(grads, tensors, needs, static))
    return found
