"""One picture of a run: the photographs, the scores, the times, the memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from fastvit_kernels.demo.results import ACCELERATED, STOCK, Results

COLOURS = {STOCK: "#9aa5b1", ACCELERATED: "#d9480f"}
INK = "#1f2933"
MAXIMUM_PHOTOS = 3
_MIB = 2**20


def draw(results: Results, photos: Sequence[Image.Image], labels: Mapping[int, str], path: Path) -> None:
    """Save the comparison as a PNG.

    Args:
        results: what the run measured.
        photos: the crops that the logits belong to, in order; the first few are shown.
        labels: class names, where they are known.
        path: the file to write.
    """
    figure = Figure(figsize=(15, 10), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_title(results), fontsize=15, fontweight="bold", color=INK, ha="left", x=0.012)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    figure.legend(
        handles=[Patch(color=colour, label=variant) for variant, colour in COLOURS.items()],
        loc="upper right",
        ncols=len(COLOURS),
        frameon=False,
        fontsize=12,
    )
    top, bottom = figure.subfigures(2, 1, height_ratios=[1, 1.25], hspace=0.04)
    shown = list(photos[:MAXIMUM_PHOTOS])
    columns = top.subplots(1, len(shown) + 1, width_ratios=[1.0] * len(shown) + [1.15])
    for index, (axes, photo) in enumerate(zip(columns, shown, strict=False)):
        _photo(axes, results, index, photo, labels)
    _scores(columns[-1], results)
    layout = bottom.subplot_mosaic([["blocks", "time"], ["blocks", "memory"]], width_ratios=[1.5, 1])
    _blocks(layout["blocks"], results)
    _times(layout["time"], results)
    _memory(layout["memory"], results)
    figure.savefig(path, format="png")


def _title(results: Results) -> str:
    setup, batch = results.setup, results.batch
    scores = "the same scores" if setup.dtype == "fp32" else "scores within bf16 rounding"
    return f"{setup.model}: {scores} at {results.speedup(batch):.2f}x the speed  (batch {batch}, {setup.conditions})"


def _plain(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=11, loc="left", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9)


def _photo(axes: Axes, results: Results, index: int, photo: Image.Image, labels: Mapping[int, str]) -> None:
    axes.imshow(photo)
    axes.set_axis_off()
    axes.set_title(results.setup.images[index], fontsize=11, loc="left", color=INK)
    agreement = results.agreement
    stock, accelerated = (agreement.top(variant)[index] for variant in (STOCK, ACCELERATED))
    lines = [f"{'class':<22}{'stock':>10}{'accelerated':>14}"]
    for expected, found in zip(stock, accelerated, strict=True):
        name = labels.get(expected, f"class {expected}")[:21]
        scores = f"{agreement.stock[index, expected]:>10.4f}{agreement.accelerated[index, found]:>14.4f}"
        lines.append(f"{name:<22}{scores}{'' if expected == found else f' ({found})'}")
    axes.text(
        0, -0.04, "\n".join(lines), transform=axes.transAxes, va="top", family="monospace", fontsize=8.5, color=INK
    )


def _scores(axes: Axes, results: Results) -> None:
    agreement = results.agreement
    stock, accelerated = agreement.stock.flatten().tolist(), agreement.accelerated.flatten().tolist()
    bounds = min(stock), max(stock)
    axes.plot(bounds, bounds, color=COLOURS[STOCK], linewidth=1, zorder=1)
    axes.scatter(stock, accelerated, s=5, color=COLOURS[ACCELERATED], alpha=0.5, linewidths=0, zorder=2)
    axes.set_xlabel("stock score", fontsize=9, color=INK)
    axes.set_ylabel("accelerated score", fontsize=9, color=INK)
    axes.text(
        0.04,
        0.95,
        f"relative L2 difference {agreement.difference:.1e}\n"
        f"to fp64: stock {agreement.to_fp64[STOCK]:.1e}\n"
        f"         accelerated {agreement.to_fp64[ACCELERATED]:.1e}",
        transform=axes.transAxes,
        va="top",
        family="monospace",
        fontsize=8.5,
        color=INK,
    )
    _plain(axes, f"All {len(stock)} scores ({results.setup.weights})")
    inset = axes.inset_axes((0.62, 0.12, 0.36, 0.26))
    inset.hist([b - a for a, b in zip(stock, accelerated, strict=True)], bins=41, color=COLOURS[ACCELERATED])
    inset.set_yticks([])
    inset.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
    inset.tick_params(labelsize=7, colors=INK)
    inset.xaxis.get_offset_text().set_fontsize(7)
    inset.spines[["top", "right", "left"]].set_visible(False)
    inset.set_title("accelerated - stock", fontsize=8, color=INK)


def _blocks(axes: Axes, results: Results) -> None:
    height = 0.38
    for offset, variant in ((-height / 2, STOCK), (height / 2, ACCELERATED)):
        milliseconds = [1e3 * block.seconds[variant] for block in results.blocks]
        places = [index + offset for index in range(len(milliseconds))]
        axes.barh(places, milliseconds, height, color=COLOURS[variant])
    ends = [1e3 * max(block.seconds.values()) for block in results.blocks]
    for index, block in enumerate(results.blocks):
        axes.text(ends[index], index, f"  {results.block_speedup(block):.2f}x", va="center", fontsize=8, color=INK)
    axes.set_xlim(0, 1.12 * max(ends))
    axes.set_yticks(range(len(results.blocks)), [block.name for block in results.blocks])
    axes.invert_yaxis()
    _plain(axes, f"Time per block, batch {results.batch} (ms)")


def _times(axes: Axes, results: Results) -> None:
    width = 0.36
    for offset, variant in ((-width / 2, STOCK), (width / 2, ACCELERATED)):
        for place, (batch, found) in enumerate(results.times.items()):
            times = found[variant]
            middle, lower, upper = (1e3 * t / batch for t in (times.p50, times.p20, times.p80))
            axes.bar(place + offset, middle, width, color=COLOURS[variant])
            axes.errorbar(place + offset, middle, [[middle - lower], [upper - middle]], color=INK, capsize=4, lw=1)
            axes.annotate(
                f"{middle:.1f}", (place + offset, upper), (0, 4), textcoords="offset points", ha="center", fontsize=9
            )
    names = [f"batch {batch}\n{results.speedup(batch):.2f}x" for batch in results.times]
    axes.set_xticks(range(len(names)), names)
    axes.margins(y=0.15)
    _plain(axes, "Time per image (ms): median, 20th-80th percentile")


def _memory(axes: Axes, results: Results) -> None:
    for place, (variant, memory) in enumerate(results.memory.items()):
        axes.barh(place, memory.resting / _MIB, 0.6, color=COLOURS[variant], alpha=0.45)
        axes.barh(place, memory.rise / _MIB, 0.6, left=memory.resting / _MIB, color=COLOURS[variant])
        axes.annotate(
            f"{memory.peak / _MIB:.0f} ({memory.rise / _MIB:+.0f})",
            (memory.peak / _MIB, place),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axes.set_yticks(range(len(results.memory)), list(results.memory))
    axes.invert_yaxis()
    axes.margins(x=0.25)
    _plain(axes, f"Peak memory, batch {results.batch} (MiB); pale: before running")
