"""What a training run leaves in its folder: checkpoint, log, plot, weights."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

COLUMNS = ("epoch", "step", "rate", "train_loss", "held_out_loss", "accuracy", "seconds")


class RunFolder:
    """Files of one run.

    Attributes:
        checkpoint: all that is needed to go on.
        log: one line per epoch.
        plot: the log as curves.
        weights: the trained model, in safetensors.
    """

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.checkpoint = path / "last.pt"
        self.log = path / "log.csv"
        self.plot = path / "curves.png"
        self.weights = path / "model.safetensors"

    def save(self, state: dict[str, Any]) -> None:
        """Write the checkpoint. A run killed in the middle of it leaves the previous one."""
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.checkpoint)

    def load(self) -> dict[str, Any]:
        """Read the checkpoint, on the CPU and without running code from it."""
        return torch.load(self.checkpoint, map_location="cpu", weights_only=True)

    def write_log(self, rows: list[dict[str, Any]]) -> None:
        """Write the log anew: an interrupted run may have logged more than its checkpoint knows."""
        with self.log.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)

    def draw(self, rows: list[dict[str, Any]]) -> None:
        """Plot losses and accuracy over the epochs."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.5), dpi=90, layout="constrained")
        FigureCanvasAgg(figure)
        losses, accuracy = figure.subplots(1, 2)
        epochs = [row["epoch"] for row in rows]
        for name in ("train_loss", "held_out_loss"):
            losses.plot(epochs, [row[name] for row in rows], label=name.replace("_", " "))
        losses.legend(frameon=False)
        accuracy.plot(epochs, [100 * row["accuracy"] for row in rows], color="tab:green")
        accuracy.set_title(f"held-out accuracy: {rows[-1]['accuracy']:.2%} at the end")
        for axes in (losses, accuracy):
            axes.set_xlabel("epoch")
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(self.plot)

    def export(self, weights: dict[str, Tensor], about: dict[str, Any]) -> None:
        """Write the weights, with what is needed to build their model."""
        from safetensors.torch import save_file

        dense = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        save_file(dense, self.weights, {"fastvit_kernels": json.dumps(about)})
