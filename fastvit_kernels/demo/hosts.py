"""The stock model: whose code, which weights, which class names."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastvit_kernels.demo.errors import UserError
from fastvit_kernels.models import CheckpointError, CheckpointReport, create_model, load_checkpoint
from fastvit_kernels.models.cvt_keys import from_transformers

HOSTS = ("fastvit", "transformers")
RANDOM_WEIGHTS = "random weights"
# What transformers' defaults, those of CvT-13, need to become the other variants.
_TRANSFORMERS_CVT: dict[str, dict[str, Any]] = {
    "cvt_13": {},
    "cvt_21": {"depth": [1, 4, 16]},
    "cvt_w24": {"depth": [2, 2, 20], "embed_dim": [192, 768, 1024], "num_heads": [3, 12, 16]},
}


@dataclass(frozen=True)
class Stock:
    """A model in eval mode and channels_last, where its weights come from, its class names where known, and remarks."""

    model: nn.Module
    weights: str
    labels: dict[int, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def stock_model(
    host: str, name: str, checkpoint: Path | None, num_classes: int | None, calibration: Sequence[Tensor]
) -> Stock:
    """Build the model that the demonstration accelerates.

    Without a checkpoint its weights are random (the same ones every time), and its batch-norm statistics are those of
    the calibration batches: freshly initialised ones would make batch normalisation the identity.

    Args:
        host: `"fastvit"` for this package's reference path, `"transformers"` for that library's classes.
        name: a registered model.
        checkpoint: weights in the official or the `transformers` format, which run with the activation that they have
            there; a `config.json` beside it names its classes.
        num_classes: width of the classifier; by default what that `config.json` says, else 1000.
        calibration: `[B, 3, H, W]` batches.

    Raises:
        UserError: an unknown model, or a checkpoint that is missing, broken or made for another model.
    """
    labels = _labels(checkpoint)
    classes = num_classes or len(labels) or 1000
    torch.manual_seed(0)
    build = _transformers_model if host == "transformers" else _own_model
    model = build(name, classes)
    if checkpoint is None:
        _calibrate(model, calibration)
        stock = Stock(model, RANDOM_WEIGHTS)
    else:
        report = _load(model, host, name, classes, checkpoint)
        notes = report.notes
        if host == "fastvit" and report.source == "transformers" and getattr(model, "activation", "gelu") != "gelu":
            model = _own_model(name, classes, activation="gelu")
            _load(model, host, name, classes, checkpoint)
            notes = ["transformers' names: the model has the exact GELU that transformers gives these weights"]
        stock = Stock(model, f"weights of {checkpoint.name}", labels, notes)
    model.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return stock


def _own_model(name: str, num_classes: int, **overrides: Any) -> nn.Module:
    try:
        return create_model(name, num_classes=num_classes, backend="reference", **overrides)
    except ValueError as error:
        raise UserError(str(error).replace("name: ", "model: ", 1)) from error


def _transformers_model(name: str, num_classes: int) -> nn.Module:
    from transformers import CvtConfig, CvtForImageClassification

    if name not in _TRANSFORMERS_CVT:
        raise UserError(f"model {name}: of transformers' models there are {', '.join(_TRANSFORMERS_CVT)}")
    return CvtForImageClassification(CvtConfig(num_labels=num_classes, **_TRANSFORMERS_CVT[name]))


def _calibrate(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """Set the running statistics of every batch normalisation to their mean over `batches`."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    model.train()
    with torch.no_grad():
        for step, batch in enumerate(batches, start=1):
            for norm in norms:
                norm.momentum = 1 / step
            model(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _load(model: nn.Module, host: str, name: str, num_classes: int, checkpoint: Path) -> CheckpointReport:
    """Fill the model from the file, whichever of the two formats either has."""
    # Names are translated towards our own model, so transformers' is filled from one of ours.
    target = _own_model(name, num_classes, activation="gelu") if host == "transformers" else model
    try:
        with warnings.catch_warnings():
            # The report has the same notes.
            warnings.simplefilter("ignore")
            report = load_checkpoint(target, checkpoint, strict=False)
    except FileNotFoundError as error:
        raise UserError(f"checkpoint {checkpoint}: no such file") from error
    except CheckpointError as error:
        raise UserError(f"checkpoint {_one_line(error)}") from error
    if not report.complete:
        raise UserError(f"checkpoint {checkpoint} does not fit {name}: {_one_line(report)}{_hint(report)}")
    if target is not model:
        values = target.state_dict()
        for key, entry in from_transformers(model.state_dict()).items():
            entry.copy_(values[key])
    return report


def _one_line(text: object) -> str:
    return "; ".join(line.strip() for line in str(text).splitlines())


def _hint(report: CheckpointReport) -> str:
    """The option that builds the checkpoint's classifier, where that is all that differs."""
    shapes = report.mismatching.get("head.bias")
    if shapes is None or report.missing or report.unexpected or len(report.mismatching) > 2:
        return ""
    return f"; --num-classes {shapes[0][0]} would fit"


def _labels(checkpoint: Path | None) -> dict[int, str]:
    """`id2label` of the `config.json` beside the checkpoint, as `transformers` saves it; empty without one."""
    path = checkpoint.parent / "config.json" if checkpoint is not None else None
    if path is None or not path.is_file():
        return {}
    try:
        return {int(index): str(label) for index, label in json.loads(path.read_text()).get("id2label", {}).items()}
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a transformers configuration ({error})") from error
