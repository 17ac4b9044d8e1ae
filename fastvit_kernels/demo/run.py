"""The demonstration, step by step."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from fastvit_kernels import accelerate, explain, restore
from fastvit_kernels.bench.measure import Plan
from fastvit_kernels.demo import digits, images, tables
from fastvit_kernels.demo.errors import Disagreement, UserError
from fastvit_kernels.demo.hosts import stock_model
from fastvit_kernels.demo.measure import logits, measure, precision
from fastvit_kernels.demo.memory import Memory, peak_memory
from fastvit_kernels.demo.picture import draw
from fastvit_kernels.demo.results import ACCELERATED, STOCK, Agreement, Results, Setup
from fastvit_kernels.testing.numerics import relative_l2

# Seconds for one series of rounds, so that the whole run stays below two minutes on two busy cores.
ROUNDS_BUDGET = 10.0
MINIMUM_SIZE = 32
_CALIBRATION_VIEWS = 4


@dataclass(frozen=True)
class Options:
    """What to run; the command line's options.

    Attributes:
        model: a registered model.
        host: `"fastvit"` or `"transformers"`: whose implementation is the stock model.
        images: image files; scikit-learn's sample photographs when empty.
        checkpoint: weights; random ones when None.
        num_classes: width of the classifier; None takes the checkpoint's `config.json`, else 1000.
        output: the folder written to.
        size: side of the square crops.
        batches: batch sizes timed; blocks and memory are measured at the largest.
        rounds: timed rounds at most.
        threads: None for torch's default.
        dtype: `"fp32"`, or `"bf16"` for autocast.
    """

    model: str = "cvt_13"
    host: str = "fastvit"
    images: tuple[Path, ...] = ()
    checkpoint: Path | None = None
    num_classes: int | None = None
    output: Path = Path("demo_output")
    size: int = 224
    batches: tuple[int, ...] = (1, 8)
    rounds: int = 15
    threads: int | None = None
    dtype: str = "fp32"


def run(options: Options, console: Console) -> Results:
    """Compare the stock model with its accelerated copy; print, draw and return what was found.

    Raises:
        UserError: an input that cannot be used.
        Disagreement: the accelerated model gives other numbers, or `restore` does not give the stock ones back.
    """
    with _threads(options.threads), _progress(console) as progress:
        return _run(options, progress)


def _run(options: Options, progress: Progress) -> Results:
    say = progress.console.print
    if options.size < MINIMUM_SIZE:
        raise UserError(f"size: expected at least {MINIMUM_SIZE}, got {options.size}")
    with _step(progress, "Reading photographs"):
        folder = _folder(options.output)
        photos = [images.read_photo(path) for path in options.images] or images.sample_photos()
        crops = images.views(photos, options.size, len(photos))
        x = images.to_batch(crops)
        batch = images.to_batch(images.views(photos, options.size, max(options.batches)))
    with _step(progress, f"Building {options.model}"):
        calibration = images.to_batch(images.views(photos, options.size, _CALIBRATION_VIEWS)).chunk(2)
        stock = stock_model(options.host, options.model, options.checkpoint, options.num_classes, calibration)
    setup = Setup(
        options.model,
        options.host,
        stock.weights,
        options.dtype,
        options.size,
        torch.get_num_threads(),
        [photo.name for photo in photos],
    )
    say(tables.setup_line(setup))
    for note in stock.notes:
        say(note)

    with _step(progress, "Accelerating a copy"):
        accelerated = copy.deepcopy(stock.model)
        report = accelerate(accelerated, inference=True)
    say(tables.report_table(report))
    for note in report.notes:
        say(note)
    models = {STOCK: stock.model, ACCELERATED: accelerated}

    with _step(progress, "Comparing logits"):
        agreement = _agreement(models, x, options.dtype)
    for line in tables.error_lines(agreement):
        say(line)
    say(tables.agreement_table(agreement, setup.images, stock.labels))
    if agreement.problems:
        raise Disagreement(f"the accelerated model disagrees with the stock model: {'; '.join(agreement.problems)}")

    with precision(options.dtype):
        say(tables.backend_table(explain(accelerated, x)))
        plan = Plan(options.rounds, ROUNDS_BUDGET)
        times = {}
        for size in sorted(set(options.batches)):
            with _step(progress, f"Timing batch {size}", plan.rounds) as advance:
                # The largest comes last: the blocks are its.
                times[size], blocks = measure(models, batch[:size], plan, advance)
    with _step(progress, "Measuring memory", len(models)) as advance:
        memory = _memory(stock.model, batch, setup, advance)
    results = Results(setup, agreement, times, blocks, memory, len(report.replaced))
    for table in (tables.time_table, tables.block_table, tables.memory_table):
        say(table(results))

    with _step(progress, "Restoring the copy"):
        _check_restored(accelerated, stock.model, x, options.dtype)
    say("restore: the copy is the stock model again, logits identical bit for bit")
    with _step(progress, "Reading handwritten digits"):
        recognised = digits.recognise()
    say(tables.digits_table(recognised))
    if not torch.equal(recognised.found[ACCELERATED], recognised.found[STOCK]):
        raise Disagreement("the accelerated network recognises other handwritten digits than the stock network")
    picture, figures = folder / "comparison.png", folder / "results.json"
    with _step(progress, "Drawing"):
        draw(results, crops, stock.labels, picture)
        results.write(figures)
    say(tables.summary(results, [picture, figures]))
    return results


def _agreement(models: Mapping[str, nn.Module], x: Tensor, dtype: str) -> Agreement:
    with precision(dtype):
        found = {name: logits(model, x).float() for name, model in models.items()}
    with torch.inference_mode():
        exact = logits(copy.deepcopy(models[STOCK]).double(), x.double())
    return Agreement(
        dtype,
        found[STOCK],
        found[ACCELERATED],
        relative_l2(found[ACCELERATED], found[STOCK]),
        {name: relative_l2(scores, exact) for name, scores in found.items()},
    )


def _memory(stock: nn.Module, batch: Tensor, setup: Setup, advance: Callable[[], None]) -> dict[str, Memory]:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        model_file, input_file = Path(folder) / "model.pt", Path(folder) / "input.pt"
        torch.save(stock, model_file)
        torch.save(batch, input_file)
        for variant in (STOCK, ACCELERATED):
            found[variant] = peak_memory(model_file, input_file, variant, setup.dtype, setup.threads)
            advance()
    return found


def _check_restored(accelerated: nn.Module, stock: nn.Module, x: Tensor, dtype: str) -> None:
    restore(accelerated)
    with precision(dtype):
        same = torch.equal(logits(accelerated, x), logits(stock, x))
    if not same:
        raise Disagreement("restore: the restored model's logits are not the stock model's, bit for bit")


def _folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output {path}: cannot be made a folder ({error.strerror})") from error
    if not os.access(path, os.W_OK):
        raise UserError(f"output {path}: not writable")
    return path


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    previous = torch.get_num_threads()
    torch.set_num_threads(count or previous)
    try:
        yield
    finally:
        torch.set_num_threads(previous)


def _progress(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console
    )


@contextmanager
def _step(progress: Progress, description: str, total: int = 1) -> Iterator[Callable[[], None]]:
    task = progress.add_task(description, total=total)
    yield partial(progress.advance, task)
    progress.update(task, completed=total)
