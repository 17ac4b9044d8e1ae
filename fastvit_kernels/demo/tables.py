"""The results as tables and one paragraph for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from rich.table import Table

from fastvit_kernels import Explanation, Report
from fastvit_kernels.bench.measure import Times
from fastvit_kernels.demo.digits import DigitsResult
from fastvit_kernels.demo.hosts import RANDOM_WEIGHTS
from fastvit_kernels.demo.memory import METHOD
from fastvit_kernels.demo.results import ACCELERATED, FP32_LIMIT, STOCK, TOP, Agreement, Results, Setup

SHOWN_DIGITS = 16
_MIB = 2**20


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def setup_line(setup: Setup) -> str:
    """What is compared, and what random weights mean."""
    line = f"{setup.model} from {setup.host}, {setup.weights}, {setup.conditions}"
    if setup.weights == RANDOM_WEIGHTS:
        line += "\nrandom weights: the classes mean nothing, the numbers must agree (--checkpoint takes real ones)"
    return line


def report_table(report: Report) -> Table:
    """What `accelerate` did, equal entries together."""
    title = f"{report.action}: {len(report.replaced)} modules replaced, {len(report.left_alone)} left alone"
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in ("modules", "was", "is", "remarks"):
        table.add_column(column, justify="right" if column == "modules" else "left")
    entries = [(e.before, e.after, "\n".join(e.remarks)) for e in report.replaced]
    entries += [(e.module, "left alone", "\n".join(e.reasons)) for e in report.left_alone]
    for entry, count in Counter(entries).items():
        table.add_row(str(count), *entry)
    return table


def agreement_table(agreement: Agreement, images: list[str], labels: Mapping[int, str]) -> Table:
    """The top classes of both variants, one row per photograph."""
    table = _table(f"Top-{TOP} classes", "photograph", STOCK, ACCELERATED, "agree")
    tops = agreement.top(STOCK), agreement.top(ACCELERATED)
    for name, stock, accelerated in zip(images, *tops, strict=True):
        same = sum(a == b for a, b in zip(stock, accelerated, strict=True))
        found = (", ".join(labels.get(c, str(c)) for c in classes) for classes in (stock, accelerated))
        table.add_row(name, *found, f"{same} of {len(stock)}")
    return table


def error_lines(agreement: Agreement) -> list[str]:
    """The errors of the logits and what was allowed."""
    to_fp64 = agreement.to_fp64
    rule = f"at most {FP32_LIMIT:.0e}" if agreement.dtype == "fp32" else "bf16 rounds both; see below"
    doubled = "" if agreement.dtype == "fp32" else f" (at most {2 * to_fp64[STOCK]:.2e})"
    return [
        f"relative L2 error of the logits, accelerated against stock: {agreement.difference:.2e} ({rule})",
        f"distance to the stock model in fp64: stock {to_fp64[STOCK]:.2e}, "
        f"accelerated {to_fp64[ACCELERATED]:.2e}{doubled}",
    ]


def backend_table(explanation: Explanation) -> Table:
    """The calls of each operator by the backend that ran them, and why the other backends did not."""
    table = Table(title="Backends", title_justify="left", title_style="bold")
    for column in ("operator", "calls", "backend", "not"):
        table.add_column(column, justify="right" if column == "calls" else "left")
    calls = Counter(
        (d.operator, d.chosen, "\n".join(f"{name}: {', '.join(reasons)}" for name, reasons in d.rejected.items()))
        for d in explanation.decisions
    )
    for (operator, chosen, others), count in calls.items():
        table.add_row(operator, str(count), chosen, others)
    return table


def time_table(results: Results) -> Table:
    """Milliseconds per image, one row per batch size."""
    table = _table(
        "Milliseconds per image: median (20th-80th percentile), interleaved",
        "batch",
        STOCK,
        ACCELERATED,
        "speed",
        "rounds",
    )
    for batch, found in results.times.items():
        cells = (_per_image(found[variant], batch) for variant in (STOCK, ACCELERATED))
        table.add_row(str(batch), *cells, f"{results.speedup(batch):.2f}x", str(found[STOCK].rounds))
    return table


def _per_image(times: Times, batch: int) -> str:
    middle, lower, upper = (1e3 * t / batch for t in (times.p50, times.p20, times.p80))
    return f"{middle:.1f} ({lower:.1f}-{upper:.1f})"


def block_table(results: Results) -> Table:
    """Milliseconds per block of one call, with the share of the whole."""
    table = _table(
        f"Time per block, batch {results.batch}", "block", f"{STOCK} ms", "share", f"{ACCELERATED} ms", "share", "speed"
    )
    totals = {v: sum(block.seconds[v] for block in results.blocks) for v in (STOCK, ACCELERATED)}
    for block in results.blocks:
        cells = []
        for variant, total in totals.items():
            cells += [f"{1e3 * block.seconds[variant]:.2f}", f"{block.seconds[variant] / total:.1%}"]
        table.add_row(block.name, *cells, f"{results.block_speedup(block):.2f}x")
    return table


def memory_table(results: Results) -> Table:
    """Mebibytes resident, one row per variant."""
    table = _table(f"Memory, batch {results.batch}: {METHOD}", "MiB", "model loaded", "peak", "rise while running")
    for variant, memory in results.memory.items():
        cells = (f"{value / _MIB:.0f}" for value in (memory.resting, memory.peak, memory.rise))
        table.add_row(variant, *cells)
    return table


def digits_table(result: DigitsResult) -> Table:
    """Accuracy on the held-out digits, and the first of them as each variant sees them."""
    count = len(result.labels)
    table = _table(
        f"{count} held-out handwritten digits, seen by a {result.model} of {result.parameters / 1e3:.0f} k parameters "
        "trained with examples/train.py",
        "",
        "accuracy",
        f"the first {SHOWN_DIGITS}",
    )
    for name, digits in (("written", result.labels), *result.found.items()):
        shown = " ".join(str(digit) for digit in digits[:SHOWN_DIGITS].tolist())
        accuracy = f"{result.right(name) / count:.2%}" if name in result.found else ""
        table.add_row(name, accuracy, shown)
    return table


def summary(results: Results, written: list[Path]) -> str:
    """The whole run in one paragraph."""
    setup, batch = results.setup, results.batch
    stock, accelerated = (results.times[batch][variant].p50 / batch * 1e3 for variant in (STOCK, ACCELERATED))
    peaks = {variant: f"{memory.peak / _MIB:.0f}" for variant, memory in results.memory.items()}
    return (
        f"{setup.model} from {setup.host} with {setup.weights}, {setup.conditions}: {results.replaced} modules "
        f"replaced, logits within {results.agreement.difference:.1e} (relative L2) of the stock model's, "
        f"{accelerated:.1f} ms per image instead of {stock:.1f} ms at batch {batch} "
        f"({results.speedup(batch):.2f}x the speed), {peaks[ACCELERATED]} MiB peak memory against {peaks[STOCK]} MiB. "
        f"Written: {', '.join(str(path) for path in written)}."
    )
