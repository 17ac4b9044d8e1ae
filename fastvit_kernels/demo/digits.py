"""Handwritten digits, and a small network that was trained on them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit_kernels import accelerate
from fastvit_kernels.demo.results import ACCELERATED, STOCK
from fastvit_kernels.models import create_model

# Made by examples/train.py; examples/digits has the command and the log.
CHECKPOINT = Path(__file__).with_name("digits.safetensors")
HELD_OUT = 360
MEAN, STD = 0.3, 0.38


class Split(NamedTuple):
    """Images `[N, 1, 8, 8]` in fp32 from 0 to 1, and their classes `[N]`."""

    images: Tensor
    labels: Tensor


def read_digits() -> tuple[Split, Split]:
    """scikit-learn's 1,797 digits in two parts, the same at every call: for training, and held out.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(found.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(found.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, held_out = order[HELD_OUT:], order[:HELD_OUT]
    return Split(images[train], labels[train]), Split(images[held_out], labels[held_out])


def enlarged(images: Tensor, size: int) -> Tensor:
    """Digits `[N, 1, 8, 8]` as the network takes them: `[N, 1, size, size]`, normalised."""
    return (F.interpolate(images, (size, size), mode="bilinear", align_corners=False) - MEAN) / STD


def load_network(path: Path = CHECKPOINT, backend: str | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """A network exported by examples/train.py, in eval mode, and what the file says about it.

    Args:
        path: a safetensors file.
        backend: of the network's operators; None for the usual choice.

    Raises:
        ModuleNotFoundError: safetensors is not installed.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["fastvit_kernels"])
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    model = create_model(about["model"], len(about["classes"]), backend=backend, **about["overrides"])
    model.load_state_dict(weights)
    return model.eval(), about


@torch.inference_mode()
def classify(model: nn.Module, images: Tensor, size: int) -> Tensor:
    """The digits `[N]` that a network sees in images `[N, 1, 8, 8]`."""
    return model(enlarged(images, size)).argmax(1)


@dataclass(frozen=True)
class DigitsResult:
    """What the trained network sees in the held-out digits.

    Attributes:
        model: whose variant the network is.
        parameters: how many it has.
        labels: the true digits `[N]`.
        found: variant -> the digits `[N]` it sees.
    """

    model: str
    parameters: int
    labels: Tensor
    found: dict[str, Tensor]

    def right(self, variant: str) -> int:
        """How many digits a variant recognises."""
        return int((self.found[variant] == self.labels).sum())


def recognise() -> DigitsResult:
    """Let the trained network, as it is and accelerated, classify the digits that it was not trained on."""
    model, about = load_network(backend="reference")
    accelerated, _ = load_network()
    accelerate(accelerated, inference=True)
    _, held_out = read_digits()
    found = {
        STOCK: classify(model, held_out.images, about["size"]),
        ACCELERATED: classify(accelerated, held_out.images, about["size"]),
    }
    return DigitsResult(about["model"], sum(p.numel() for p in model.parameters()), held_out.labels, found)
