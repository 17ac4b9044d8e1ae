"""Rows of a GPU as Markdown and as pictures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fastvit_kernels.bench.gpu.jobs import BF16, GRAPH, MODELS
from fastvit_kernels.bench.gpu.measure import UNCAPTURED
from fastvit_kernels.bench.gpu.peers import OURS
from fastvit_kernels.bench.gpu.rows import Conditions, Row
from fastvit_kernels.bench.results import OK

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record = tuple[Row, Conditions]
HEADER = ("peer", "median ms", "p20 - p80", "x floor", "TFLOP/s", "TB/s", "peak MB", "vs eager", "vs compile", "error")
SUMMARY = ("fastvit", "median ms", "x floor", "vs eager", "vs compile", "vs sdpa", "peak MB of eager's")
_OURS_COLOUR, _OTHERS_COLOUR, _INK = "#d9480f", "#9aa5b1", "#1f2933"
_COLUMNS = 3
_SHOWN = 64
_MARKERS = {
    "fastvit": ("o", 6),
    "triton": ("^", 4),
    "cuda": ("s", 4),
    "fastvit_sdpa": ("D", 4),
    "eager": ("o", 4),
    "sdpa": ("^", 4),
    "compile": ("s", 4),
}


class Group(NamedTuple):
    """The rows of one call, whoever made it, and the conditions of each."""

    rows: list[Row]
    conditions: list[Conditions]

    @property
    def title(self) -> str:
        first = self.rows[0]
        case = first.case if first.suite == first.case else f"{first.suite} {first.case}"
        dtype = "" if first.dtype == BF16 else f", {first.dtype}"
        return f"{case}, batch {first.batch}, {first.mode}{dtype}" + (", in a graph" if first.launch == GRAPH else "")

    @property
    def ranked(self) -> list[Row]:
        """The timed rows, the fastest first."""
        return sorted((row for row in self.rows if row.status == OK), key=lambda row: row.p50_ms or 0.0)

    def of(self, peer: str) -> Row | None:
        """A peer's timed row."""
        return next((row for row in self.rows if row.peer == peer and row.status == OK), None)

    def speedup(self, row: Row, peer: str = "eager") -> float | None:
        """How many times as long as this row the peer takes."""
        other = self.of(peer)
        return other.p50_ms / row.p50_ms if other and other.p50_ms and row.p50_ms else None

    def memory(self, row: Row) -> float | None:
        """The share of eager's memory that this row takes."""
        eager = self.of("eager")
        return row.peak_mb / eager.peak_mb if eager and eager.peak_mb and row.peak_mb is not None else None

    def cells(self, row: Row) -> tuple[str, ...]:
        return (
            label(row),
            f"{row.p50_ms:.4g}",
            f"{row.p20_ms:.4g} - {row.p80_ms:.4g}",
            f"{row.floor_multiple:.2f}",
            f"{row.tflops:.3g}",
            f"{row.tbs:.3g}",
            "" if row.peak_mb is None else f"{row.peak_mb:.4g}",
            _ratio(self.speedup(row)),
            _ratio(self.speedup(row, "compile")),
            f"{row.error:.1e}",
        )

    def summary(self, row: Row) -> tuple[str, ...]:
        speedups = [_ratio(self.speedup(row, peer)) for peer in ("eager", "compile", "sdpa")]
        title = f"{self.title}, uncaptured" if uncaptured(row) else self.title
        return title, f"{row.p50_ms:.4g}", f"{row.floor_multiple:.2f}", *speedups, _ratio(self.memory(row))


def uncaptured(row: Row) -> bool:
    """Whether a row should come from a graph and does not: its time may be the host's."""
    return row.variant.endswith(UNCAPTURED)


def label(row: Row) -> str:
    return f"{row.peer}, uncaptured" if uncaptured(row) else row.peer


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def groups(records: Iterable[Record]) -> list[Group]:
    """Rows by call and conditions, those of several runs together, models first, in the order they come."""
    found: dict[tuple[object, ...], Group] = {}
    for row, conditions in records:
        key = (row.suite, row.case, row.batch, row.mode, row.launch, row.dtype, conditions.key)
        group = found.setdefault(key, Group([], []))
        group.rows.append(row)
        group.conditions.append(conditions)
    return sorted(found.values(), key=lambda group: group.rows[0].suite not in MODELS)


def describe(conditions: Conditions) -> str:
    """Device, its measured limits, software, tuning and date in one line."""
    parts = [
        f"{conditions.device} ({conditions.peak_tflops:.4g} TFLOP/s bf16, {conditions.copy_tbs:.3g} TB/s, measured)",
        *(f"{name} {value}" for name in ("torch", "triton", "fastvit_kernels") if (value := getattr(conditions, name))),
        *(f"{name} {value}" for name in ("tuning", "commit") if (value := getattr(conditions, name))),
        conditions.date,
    ]
    return ", ".join(parts)


def markdown(records: Sequence[Record]) -> str:
    """A line per call, then a table per call, what has no time or no graph and why, and where it was measured."""
    found = groups(records)
    ours = [group.summary(row) for group in found if (row := group.of("fastvit")) is not None]
    blocks = ["\n".join([*_head(SUMMARY), *map(_pipes, ours)])] if ours else []
    for group in found:
        lines = [f"**{group.title}**", "", *_head(HEADER)]
        for row in group.ranked:
            cells = group.cells(row)
            lines.append(_pipes([f"**{cell}**" if cell else "" for cell in cells] if row.peer in OURS else cells))
        notes = [f"- {row.peer} {row.status}: {row.reason}" for row in group.rows if row.status != OK]
        notes += [f"- {label(row)}: {row.reason}" for row in group.ranked if uncaptured(row)]
        blocks.append("\n".join([*lines, "", *notes] if notes else lines))
    described = dict.fromkeys(describe(conditions) for _, conditions in records)
    return "\n\n".join([*blocks, *described]) + "\n"


def _head(names: Sequence[str]) -> list[str]:
    return [_pipes(names), _pipes(["---", *["---:"] * (len(names) - 1)])]


def _pipes(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def write(records: Sequence[Record], rows: Path) -> list[Path]:
    """Tables and, where matplotlib is installed, pictures of models and of operators beside the file of the rows."""
    written = [rows.with_suffix(".md")]
    written[0].write_text(markdown(records))
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        return written
    timed = [group for group in groups(records) if group.ranked]
    for kind, wanted, draw in (("models", True, plot_times), ("operators", False, plot_floors)):
        chosen = [group for group in timed if (group.rows[0].suite in MODELS) is wanted]
        if chosen:
            written.append(rows.with_name(f"{rows.stem}-{kind}.png"))
            draw(chosen, written[-1])
    return written


def plot_floors(found: Sequence[Group], path: Path) -> None:
    """How far each peer is from the floor: one line per call at the larger batch sizes, which launches do not rule."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [group for group in found if group.rows[0].batch == _SHOWN] or list(found)
    figure = Figure(figsize=(11, 0.19 * len(shown) + 1.2), dpi=80, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for place, group in enumerate(shown):
        for row in group.ranked:
            marker, size = _MARKERS[row.peer]
            colour = _OURS_COLOUR if row.peer in OURS else _OTHERS_COLOUR
            # Hollow: the time of a call that no graph holds.
            filling = "full" if not uncaptured(row) else "none"
            axes.plot(row.floor_multiple, place, marker, color=colour, markersize=size, fillstyle=filling)
    for peer, (marker, size) in _MARKERS.items():
        colour = _OURS_COLOUR if peer in OURS else _OTHERS_COLOUR
        axes.plot([], [], marker, color=colour, markersize=size, label=peer)
    axes.set_yticks(range(len(shown)), [group.title for group in shown], fontsize=7)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.axvline(1.0, color=_INK, linewidth=1, linestyle="--")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(ncols=len(_MARKERS), loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize=8)
    axes.set_xlabel("multiple of the floor\n" + _described(shown), fontsize=7, color=_INK)
    figure.savefig(path)


def _described(found: Sequence[Group]) -> str:
    return "\n".join(dict.fromkeys(describe(conditions) for group in found for conditions in group.conditions))


def plot_times(found: Sequence[Group], path: Path) -> None:
    """Medians as bars, the floor as a line, one panel per call."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, len(found))
    lines = math.ceil(len(found) / columns)
    height = max(len(group.ranked) for group in found) * 0.3 + 0.9
    figure = Figure(figsize=(5.5 * columns, height * lines + 0.4), dpi=80, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes, group in zip(panels, found, strict=False):
        _panel(axes, group)
    for axes in panels[len(found) :]:
        axes.set_axis_off()
    figure.supxlabel(_described(found), fontsize=7, color=_INK)
    figure.savefig(path)


def _panel(axes: Axes, group: Group) -> None:
    rows = group.ranked
    for place, row in enumerate(rows):
        assert row.p50_ms is not None
        axes.barh(place, row.p50_ms, 0.7, color=_OURS_COLOUR if row.peer in OURS else _OTHERS_COLOUR)
        axes.annotate(f"{row.p50_ms:.4g}", (row.p50_ms, place), (4, 0), textcoords="offset points", va="center", size=8)
    assert rows[0].floor_ms is not None
    axes.axvline(rows[0].floor_ms, color=_INK, linewidth=1, linestyle="--")
    axes.set_yticks(range(len(rows)), list(map(label, rows)), fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_title(f"{group.title} (ms)", fontsize=8, loc="left", color=_INK)
    axes.spines[["top", "right"]].set_visible(False)
