"""What the suites of whole models share."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit_kernels import accelerate
from fastvit_kernels.models import create_model

IMAGE = 224


def images(batch: int, size: int) -> Tensor:
    """Blotches of colour: plain noise looks the same to a model whatever its seed."""
    blotches = F.interpolate(torch.randn(batch, 3, 7, 7), size=(size, size), mode="bilinear")
    return torch.randn(batch, 3, 1, 1) + 1.5 * blotches + 0.3 * torch.randn(batch, 3, size, size)


def accelerated(model: nn.Module) -> nn.Module:
    """The model, all of it prepared for inference."""
    report = accelerate(model, inference=True)
    # A model that is only half accelerated must not be measured as ours.
    if not report or report.left_alone:
        raise RuntimeError(str(report))
    return model


def ours(name: str, plain: nn.Module, **overrides: Any) -> nn.Module:
    """Our model with a plain one's weights, in its dtype and memory format; `overrides` are for `create_model`."""
    with torch.device("meta"):
        model = create_model(name, **overrides)
    model.load_state_dict(plain.state_dict(), strict=True, assign=True)
    return model.requires_grad_(False).train(plain.training)
