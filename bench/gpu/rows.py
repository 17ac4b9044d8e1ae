"""Rows of a GPU and the CSV file, named after it, that keeps them and grows from run to run."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from fastvit_kernels.bench.gpu.device import slug
from fastvit_kernels.bench.gpu.jobs import Job
from fastvit_kernels.bench.results import cells_of, record_of
from fastvit_kernels.testing.device import Check


@dataclass(frozen=True)
class Conditions:
    """What rows must have in common to be compared: the device, its limits, the software.

    `sources` stands for the exact code of this package, `tuning` for what the tuning entries in force decide, empty for
    none; `commit` is empty where it was installed from a wheel.
    """

    device: str
    capability: str
    peak_tflops: float
    copy_tbs: float
    python: str
    torch: str
    triton: str
    cuda: str
    fastvit_kernels: str
    sources: str
    tuning: str
    commit: str
    date: str

    @property
    def key(self) -> tuple[str, ...]:
        """What tells measurements apart: not the limits and the date, which are another run's own."""
        return self.device, self.torch, self.triton, self.cuda, self.sources, self.tuning

    def repeats(self, other: Conditions) -> bool:
        """Whether a measurement under the other conditions would be the same again."""
        return self.key == other.key


@dataclass(frozen=True)
class Row:
    """One job and what came of it.

    `status` is `ok`; or `unavailable`, `failed` or `timed out` with its `reason` and without times. Times are
    milliseconds of one call. `error` is relative L2 against fp64, of the outputs or, in training, of all gradients
    together. `backends` are those that ran, with the widths of their calls, such as `global_attention:triton:64`.
    `tflops` and `tbs` are the case's arithmetic and least traffic over the median. `peak_mb` is the memory that a call
    needs beside its inputs, with all that a graph keeps for itself.
    """

    suite: str
    case: str
    batch: int
    mode: str
    peer: str
    launch: str
    dtype: str
    variant: str
    status: str
    reason: str = ""
    backends: str = ""
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    min_ms: float | None = None
    calls: int | None = None
    error: float | None = None
    error_allowed: float | None = None
    gflop: float | None = None
    least_mb: float | None = None
    floor_ms: float | None = None
    floor_multiple: float | None = None
    tflops: float | None = None
    tbs: float | None = None
    peak_mb: float | None = None

    @property
    def job(self) -> Job:
        return Job(self.suite, self.case, self.batch, self.mode, self.peer, self.launch, self.dtype)


@dataclass(frozen=True)
class CheckRow:
    """One check of correctness: `status` is `ok`; or `failed` or `timed out` with the `reason`."""

    operator: str
    case: str
    precision: str
    backend: str
    what: str
    status: str
    reason: str = ""

    @property
    def check(self) -> Check:
        return Check(self.operator, self.case, self.precision, self.backend, self.what)


# It took longer than anything of its kind may: a slow compiler, or a kernel that hangs.
TIMED_OUT = "timed out"
Kind = TypeVar("Kind", Row, CheckRow)


def rows_file(folder: Path, device: str) -> Path:
    return folder / f"{slug(device)}.csv"


def checks_file(folder: Path, device: str) -> Path:
    return folder / f"{slug(device)}-correctness.csv"


def append(path: Path, row: Row | CheckRow, conditions: Conditions) -> None:
    """Add a row to a file, which is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = {**cells_of(row), **cells_of(conditions)}
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(cells), lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow(cells)


def read(path: Path) -> list[tuple[Row, Conditions]]:
    """The rows of a file; of several for the same job and conditions the last.

    Raises:
        ValueError: the file is not one that `append` has written.
    """
    latest: dict[tuple[Job, tuple[str, ...]], tuple[Row, Conditions]] = {}
    for row, conditions in _read(path, Row):
        latest[row.job, conditions.key] = row, conditions
    return list(latest.values())


def read_checks(path: Path) -> list[tuple[CheckRow, Conditions]]:
    """The checks of a file. Raises as `read` does."""
    return _read(path, CheckRow)


def _read(path: Path, kind: type[Kind]) -> list[tuple[Kind, Conditions]]:
    try:
        with path.open(newline="") as file:
            return [(record_of(kind, cells), record_of(Conditions, cells)) for cells in csv.DictReader(file)]
    except (KeyError, ValueError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a file of rows of a GPU ({error!r})") from error
