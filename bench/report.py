"""What a run found, as a table, a picture and a fragment of Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from fastvit_kernels.bench.results import OK, Conditions, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import RenderableType
    from rich.table import Table

BASELINE = "eager"
OURS = "fastvit"
HEADER = ("peer", "median", "p20 - p80", "min", "x floor", "vs eager", "error")
TRAINING_HEADER = ("peer", "median", "p20 - p80", "x floor", "vs eager", "peak MB", "saved MB", "error")
FORMATS = (".png", ".svg")
_OURS_COLOUR, _OTHERS_COLOUR, _INK = "#d9480f", "#9aa5b1", "#1f2933"
_COLUMNS = 2


@dataclass(frozen=True)
class Group:
    """The rows of one case under one condition."""

    rows: list[Row]
    conditions: Conditions

    @property
    def title(self) -> str:
        first, where = self.rows[0], self.conditions
        case = first.suite if first.case == first.suite else f"{first.suite} {first.case}"
        threads = f"{where.threads} thread{'' if where.threads == 1 else 's'}"
        clock = "" if where.clock == "wall" else f", {where.clock} time"
        mode = "" if first.mode == "inference" else f"{first.mode} step, "
        return f"{case}, {mode}{first.dtype}, batch {first.batch}, {threads}{clock} (ms)"

    @property
    def limits(self) -> str:
        first, where = self.rows[0], self.conditions
        return (
            f"floor {first.floor_ms:.4g} ms: {first.gflop:.4g} GFLOP at {where.peak_gflops:.4g} GFLOP/s, "
            f"{first.least_mb:.4g} MB at {where.copy_gbs:.3g} GB/s"
        )

    @property
    def ranked(self) -> list[Row]:
        """The timed rows, the fastest first."""
        return sorted((row for row in self.rows if row.status == OK), key=lambda row: row.p50_ms or 0.0)

    def speedup(self, row: Row) -> float | None:
        """Median of the eager module over this row's; the faster one where eager has two ways to the dtype."""
        eager = [other.p50_ms for other in self.rows if other.peer == BASELINE and other.p50_ms is not None]
        return min(eager) / row.p50_ms if eager and row.p50_ms is not None else None

    @property
    def untimed(self) -> list[str]:
        """Who has no time, and why: one line per reason."""
        reasons: dict[str, list[str]] = {}
        for row in self.rows:
            if row.status != OK:
                reasons.setdefault(f"{row.status}: {row.reason}", []).append(row.label)
        return [f"{', '.join(labels)} {reason}" for reason, labels in reasons.items()]

    @property
    def header(self) -> tuple[str, ...]:
        """`HEADER` or `TRAINING_HEADER`."""
        return TRAINING_HEADER if self.rows[0].mode == "training" else HEADER

    def cells(self, row: Row) -> tuple[str, ...]:
        """A timed row as `header` has it."""
        speedup = self.speedup(row)
        found = {
            "peer": row.label,
            "median": f"{row.p50_ms:.4g}",
            "p20 - p80": f"{row.p20_ms:.4g} - {row.p80_ms:.4g}",
            "min": f"{row.min_ms:.4g}",
            "x floor": f"{row.floor_multiple:.2f}",
            "vs eager": "" if speedup is None else f"{speedup:.2f}x",
            "error": f"{row.error:.1e}",
            "peak MB": "" if row.peak_mb is None else f"{row.peak_mb:.4g}",
            "saved MB": "" if row.saved_mb is None else f"{row.saved_mb:.4g}",
        }
        return tuple(found[name] for name in self.header)


def groups(records: Iterable[tuple[Row, Conditions]]) -> list[Group]:
    """Rows by case and condition, in the order they come."""

    def key(record: tuple[Row, Conditions]) -> tuple[object, ...]:
        row, conditions = record
        return row.suite, row.case, row.mode, row.dtype, row.batch, conditions

    listed = [list(items) for _, items in groupby(records, key)]
    return [Group([row for row, _ in items], items[0][1]) for items in listed]


def describe(conditions: Conditions) -> str:
    """Machine, software and date in one line."""
    packages = ("torch", "onnxruntime", "openvino", "transformers", "fastvit_kernels")
    versions = [f"{name} {version}" for name in packages if (version := getattr(conditions, name))]
    commit = [f"commit {conditions.commit}"] if conditions.commit else []
    return ", ".join([f"{conditions.cpu} ({conditions.cores} cores)", *versions, *commit, conditions.date])


def _descriptions(found: Sequence[Group]) -> list[str]:
    return list(dict.fromkeys(describe(group.conditions) for group in found))


def render(group: Group) -> RenderableType:
    """A group for a terminal: its table, its floor, and who is missing from it."""
    from rich.console import Group as Lines
    from rich.text import Text

    lines = [Text(line) for line in (group.limits, *group.untimed)]
    return Lines(Text(group.title, style="bold"), _table(group), *lines, Text())


def _table(group: Group) -> Table:
    from rich import box
    from rich.table import Table

    drawn = Table(box=box.SIMPLE, padding=0)
    for name in group.header:
        # Long labels wrap in a narrow terminal, figures never do.
        drawn.add_column(name, justify="left" if name == "peer" else "right", no_wrap=name != "peer", overflow="fold")
    for row in group.ranked:
        drawn.add_row(*group.cells(row), style="bold" if row.peer == OURS else None)
    return drawn


def markdown(found: Sequence[Group]) -> str:
    """One table per group and a line on where it was measured."""
    blocks = []
    for group in found:
        lines = [f"**{group.title}** ({group.limits})", ""]
        lines += [_pipes(group.header), _pipes(["---", *["---:"] * (len(group.header) - 1)])]
        for row in group.ranked:
            cells = group.cells(row)
            lines.append(_pipes([f"**{cell}**" if cell else "" for cell in cells] if row.peer == OURS else cells))
        lines += ["", *(f"- {line}" for line in group.untimed)] if group.untimed else []
        blocks.append("\n".join(lines))
    return "\n\n".join([*blocks, *_descriptions(found)]) + "\n"


def _pipes(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def plot(found: Sequence[Group], path: Path) -> None:
    """Save a bar chart of the medians, p20 to p80 as whiskers and the floor as a line, one panel per group.

    Raises:
        ValueError: the file is to be neither PNG nor SVG, or there is nothing to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if path.suffix not in FORMATS:
        raise ValueError(f"plot: expected a name in {' or '.join(FORMATS)}, got {path}")
    timed = [group for group in found if group.ranked]
    if not timed:
        raise ValueError("plot: no row has a time")
    columns = min(_COLUMNS, len(timed))
    lines = math.ceil(len(timed) / columns)
    height = max(len(group.rows) for group in timed) * 0.3 + 1.2
    figure = Figure(figsize=(7.5 * columns, height * lines + 0.4), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, squeeze=False).flat
    for axes, group in zip(panels, timed, strict=False):
        _panel(axes, group)
    for axes in list(panels)[len(timed) :]:
        axes.set_axis_off()
    figure.supxlabel("\n".join(_descriptions(timed)), fontsize=7, color=_INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _panel(axes: Axes, group: Group) -> None:
    rows = group.ranked
    for place, row in enumerate(rows):
        assert row.p20_ms is not None and row.p50_ms is not None and row.p80_ms is not None
        axes.barh(place, row.p50_ms, 0.7, color=_OURS_COLOUR if row.peer == OURS else _OTHERS_COLOUR)
        spread = [[row.p50_ms - row.p20_ms], [row.p80_ms - row.p50_ms]]
        axes.errorbar(row.p50_ms, place, xerr=spread, color=_INK, capsize=3, linewidth=1)
        axes.annotate(f"{row.p50_ms:.4g}", (row.p80_ms, place), (5, 0), textcoords="offset points", va="center", size=8)
    floor = rows[0].floor_ms
    assert floor is not None
    axes.axvline(floor, color=_INK, linewidth=1, linestyle="--")
    axes.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_title(f"{group.title}, dashed: floor", fontsize=9, loc="left", color=_INK)
    axes.spines[["top", "right"]].set_visible(False)
