"""Which backend goes first on a GPU, as measured there."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastvit_kernels.ops.operator import Backend, Operator


class Row(NamedTuple):
    """What a measurement on one architecture says about one operator.

    Attributes:
        operator: its name.
        architecture: the compute capability it was measured on.
        order: the backends that were measured, fastest first.
        results: the file in `bench/results` that says so.
    """

    operator: str
    architecture: tuple[int, int]
    order: tuple[str, ...]
    results: str


# Empty: the CUDA C++ kernels have never run on a GPU. Without a row an operator's own order holds, in which they come
# behind Triton's: they run when asked for by name, or where Triton cannot.
ROWS: tuple[Row, ...] = ()


def in_order(operator: Operator, device: torch.device) -> list[Backend]:
    """The backends of `operator`, most preferred first."""
    rows = [row for row in ROWS if row.operator == operator.name] if device.type == "cuda" else []
    if rows:
        found = torch.cuda.get_device_capability(device)
        for row in rows:
            if row.architecture == found:
                places = {name: place for place, name in enumerate(row.order)}
                return sorted(operator.backends, key=lambda backend: places.get(backend.name, len(places)))
    return operator.backends
