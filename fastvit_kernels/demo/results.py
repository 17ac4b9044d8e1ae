"""What a run found, as the tables, the picture and the JSON file show it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fastvit_kernels.bench.measure import Times
from fastvit_kernels.demo.measure import BlockTime
from fastvit_kernels.demo.memory import METHOD, Memory

STOCK, ACCELERATED = "stock", "accelerated"
TOP = 5
FP32_LIMIT = 1e-5


@dataclass(frozen=True)
class Agreement:
    """How far two sets of logits `[B, num_classes]` are from each other and from fp64.

    Attributes:
        stock, accelerated: the logits, fp32.
        difference: relative L2 of accelerated against stock.
        to_fp64: relative L2 of each variant against the stock model in fp64.
    """

    dtype: str
    stock: Tensor
    accelerated: Tensor
    difference: float
    to_fp64: dict[str, float]

    def top(self, variant: str) -> list[list[int]]:
        """The classes with the highest scores, best first, one list per image."""
        scores: Tensor = getattr(self, variant)
        return [[int(c) for c in row.topk(min(TOP, row.numel())).indices] for row in scores]

    @property
    def problems(self) -> list[str]:
        """What is out of bounds; empty when the variants agree.

        fp32: relative L2 at most 1e-5 and the same top classes. bf16, which rounds both variants visibly: an error
        against fp64 of at most twice the stock model's.
        """
        if self.dtype == "bf16":
            allowed = 2 * self.to_fp64[STOCK]
            error = self.to_fp64[ACCELERATED]
            return [] if error <= allowed else [f"error against fp64 {error:.2e}, allowed {allowed:.2e}"]
        found = []
        if not self.difference <= FP32_LIMIT:
            found.append(f"relative L2 error of the logits {self.difference:.2e}, allowed {FP32_LIMIT:.0e}")
        if self.top(STOCK) != self.top(ACCELERATED):
            found.append(f"top-{TOP} classes {self.top(ACCELERATED)}, expected {self.top(STOCK)}")
        return found


@dataclass(frozen=True)
class Setup:
    """What was run."""

    model: str
    host: str
    weights: str
    dtype: str
    size: int
    threads: int
    images: list[str]

    @property
    def conditions(self) -> str:
        """Precision, image size and threads, as text."""
        return f"{self.dtype}, {self.size} px, {self.threads} thread{'s' if self.threads > 1 else ''}"


@dataclass(frozen=True)
class Results:
    """Everything a run measured.

    Attributes:
        times: batch size -> variant -> seconds of one call.
        blocks: seconds per block at the largest batch size.
        memory: variant -> bytes at the largest batch size.
        replaced: modules that `accelerate` replaced.
    """

    setup: Setup
    agreement: Agreement
    times: dict[int, dict[str, Times]]
    blocks: list[BlockTime]
    memory: dict[str, Memory]
    replaced: int

    @property
    def batch(self) -> int:
        """The largest batch size timed."""
        return max(self.times)

    def speedup(self, batch: int) -> float:
        """Stock median over accelerated median."""
        return self.times[batch][STOCK].p50 / self.times[batch][ACCELERATED].p50

    def block_speedup(self, block: BlockTime) -> float:
        """Stock median over accelerated median of one block."""
        return block.seconds[STOCK] / block.seconds[ACCELERATED]

    def write(self, path: Path) -> None:
        """Save the figures as JSON."""
        path.write_text(json.dumps(self._figures(), indent=2) + "\n")

    def _figures(self) -> dict[str, Any]:
        return {
            "setup": asdict(self.setup),
            "relative_l2": {"accelerated_to_stock": self.agreement.difference, "to_fp64": self.agreement.to_fp64},
            "top": {variant: self.agreement.top(variant) for variant in (STOCK, ACCELERATED)},
            "seconds_per_call": {
                str(batch): {variant: times._asdict() for variant, times in variants.items()}
                for batch, variants in self.times.items()
            },
            "seconds_per_block": {"batch": self.batch, "blocks": [asdict(block) for block in self.blocks]},
            "memory": {
                "method": METHOD,
                "batch": self.batch,
                "bytes": {variant: asdict(memory) for variant, memory in self.memory.items()},
            },
            "modules_replaced": self.replaced,
        }
