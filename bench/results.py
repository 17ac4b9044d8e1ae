"""Rows of a run and the CSV files that keep them."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

OK, UNAVAILABLE, FAILED = "ok", "unavailable", "failed"
_MODES_IN_NAMES = {"inference": "infer", "training": "train"}


@dataclass(frozen=True)
class Conditions:
    """What all rows of a file have in common: the machine, the software, the limits measured beside the times."""

    cpu: str
    cores: int
    threads: int
    clock: str
    peak_gflops: float
    copy_gbs: float
    python: str
    torch: str
    onnxruntime: str
    openvino: str
    transformers: str
    fastvit_kernels: str
    commit: str
    date: str


@dataclass(frozen=True)
class Row:
    """One peer on one case.

    `status` is `ok`; or `unavailable` or `failed` with its `reason` and without times. Times are milliseconds of one
    call over `rounds` rounds of `calls` calls. `error` is relative L2 against fp64 where the rule was kept.

    Of a training step only, in 1e6 bytes: `peak_mb` of tensors that it holds at once beside parameters, inputs and
    their gradients; `resident_mb` that the process grows by in the step; `saved_mb` of tensors that the forward keeps
    for the backward.
    """

    suite: str
    case: str
    dtype: str
    batch: int
    peer: str
    variant: str
    status: str
    reason: str = ""
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    min_ms: float | None = None
    rounds: int | None = None
    calls: int | None = None
    error: float | None = None
    error_allowed: float | None = None
    gflop: float | None = None
    least_mb: float | None = None
    floor_ms: float | None = None
    floor_multiple: float | None = None
    mode: str = "inference"
    peak_mb: float | None = None
    resident_mb: float | None = None
    saved_mb: float | None = None

    @property
    def label(self) -> str:
        """The peer, and how it reached the dtype where there are several ways."""
        return self.peer if self.variant == self.dtype else f"{self.peer} ({self.variant})"


Record = TypeVar("Record")
_KINDS = {"int": int, "float": float, "str": str}


def _parse(kind: str, text: str) -> Any:
    if text == "" and kind.endswith("| None"):
        return None
    return _KINDS[kind.removesuffix(" | None")](text)


def file_name(suite: str, mode: str, dtype: str, batch: int, conditions: Conditions) -> str:
    """Names a file by its condition, as in `cvt_13-infer-fp32-batch8-amd-epyc-2threads.csv`."""
    cpu = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", conditions.cpu.lower())).strip("-")
    clock = "" if conditions.clock == "wall" else f"-{conditions.clock}"
    return f"{suite}-{_MODES_IN_NAMES[mode]}-{dtype}-batch{batch}-{cpu}-{conditions.threads}threads{clock}.csv"


def write(path: Path, rows: Iterable[Row], conditions: Conditions) -> None:
    """Write the rows, each with all its conditions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [field.name for kind in (Row, Conditions) for field in fields(kind)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({**cells_of(row), **cells_of(conditions)})


def cells_of(record: Any) -> dict[str, str]:
    """The fields of a dataclass as a file has them."""
    cells = {}
    for field in fields(record):
        value = getattr(record, field.name)
        cells[field.name] = f"{value:.6g}" if isinstance(value, float) else "" if value is None else str(value)
    return cells


def read(path: Path) -> list[tuple[Row, Conditions]]:
    """The rows of a file.

    Raises:
        ValueError: the file is not one that `write` has written.
    """
    try:
        with path.open(newline="") as file:
            return [(record_of(Row, cells), record_of(Conditions, cells)) for cells in csv.DictReader(file)]
    except (KeyError, ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a file of benchmark rows ({error!r})") from error


def record_of(kind: type[Record], cells: Mapping[str, str]) -> Record:
    """A dataclass from the cells of a line; those that are not its fields are left out.

    Fields that have a default may be missing: older files do not have them all.
    """
    wanted = [field for field in fields(kind) if field.default is MISSING or field.name in cells]  # type: ignore[arg-type]
    return kind(**{field.name: _parse(str(field.type), cells[field.name]) for field in wanted})
