"""What the suites of whole models share."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit_kernels import accelerate
from fastvit_kernels.bench.cases import deterministic
from fastvit_kernels.models import create_model

IMAGE = 224


def images(batch: int, size: int) -> Tensor:
    """Blotches of colour: plain noise looks the same to a model whatever its seed."""
    blotches = F.interpolate(torch.randn(batch, 3, 7, 7), size=(size, size), mode="bilinear")
    return torch.randn(batch, 3, 1, 1) + 1.5 * blotches + 0.3 * torch.randn(batch, 3, size, size)


def accelerated(model: nn.Module) -> nn.Module:
    """The model, all of it; prepared for inference unless it trains."""
    report = accelerate(model, inference=not model.training, frozen=not model.training)
    # A model that is only half accelerated must not be measured as ours.
    left = [entry for entry in report.left_alone if not (model.training and entry.reasons[0] == "already accelerated")]
    if left or not (report.replaced or model.training):
        raise RuntimeError(str(report))
    return model


def ours(name: str, plain: nn.Module, **overrides: Any) -> nn.Module:
    """Our model with a plain one's weights, in its dtype and memory format; `overrides` are for `create_model`.

    Nothing in it is random: a plain model has neither dropout nor stochastic depth that is on.
    """
    with torch.device("meta"):
        model = create_model(name, **overrides)
    model.load_state_dict(plain.state_dict(), strict=True, assign=True)
    model.requires_grad_(any(parameter.requires_grad for parameter in plain.parameters())).train(plain.training)
    return deterministic(model)
