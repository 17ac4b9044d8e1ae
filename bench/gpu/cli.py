"""`fastvit-kernels bench --device cuda`."""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from fastvit_kernels.bench.gpu import preferences, report
from fastvit_kernels.bench.gpu import rows as files
from fastvit_kernels.bench.gpu.device import Gpu
from fastvit_kernels.bench.gpu.jobs import (
    BATCHES,
    DTYPES,
    FORWARD,
    MODELS,
    MODES,
    OPERATORS,
    OPERATORS_OF,
    TRAINING,
    Job,
    all_jobs,
    core_jobs,
)
from fastvit_kernels.bench.gpu.peers import PEERS
from fastvit_kernels.bench.gpu.run import Part, Request, estimate, run
from fastvit_kernels.bench.gpu.worker import Worker
from fastvit_kernels.demo.errors import UserError
from fastvit_kernels.testing import device as checking
from fastvit_kernels.testing.inputs import BF16, BF16_FP32, FP16, FP32

_MOST_PROCESSES = 14
# Those of the rows: of bf16 beside weights in fp32 in training.
_PRECISIONS = {
    ("bf16", FORWARD): str(BF16),
    ("bf16", TRAINING): str(BF16_FP32),
    **{("fp16", mode): str(FP16) for mode in MODES},
    **{("fp32", mode): str(FP32) for mode in MODES},
}


def main(argv: Sequence[str]) -> int:
    """Run `fastvit-kernels bench --device cuda` with all arguments behind `bench`.

    Returns:
        0; or 1 when a check, or a row of ours, has failed.

    Raises:
        UserError: there is no GPU, or what was asked for makes no sense.
    """
    options = _parser().parse_args(argv)
    if options.report is not None:
        return _report(options.report, options.preferences)
    jobs = _chosen(options)
    problems = {} if options.list else _problems()
    parts = _parts([job for job in jobs if job.peer not in problems], problems)
    if options.list:
        for job in jobs:
            print(job)
        checks = {check for part in parts for check in part.checks}
        minutes_of_all = estimate(jobs, len(checks), options.processes)
        print(f"{len(checks)} checks and {len(jobs)} rows: about {minutes_of_all:.0f} minutes, by guess")
        return 0
    request = Request(
        parts=parts,
        output=options.output,
        minutes=options.minutes,
        processes=options.processes,
        retry=options.retry,
    )
    try:
        outcome = run(request, lambda: Worker(Gpu), print)
    except (RuntimeError, ValueError) as error:
        raise UserError(str(error)) from error
    print(outcome)
    if outcome.file.exists():
        _report(outcome.file, options.preferences)
    return 1 if outcome.checks_failed or outcome.ours_failed else 0


def _report(rows: Path, preferred: Path | None) -> int:
    """Write what follows from a file of rows, which takes no GPU."""
    try:
        records = files.read(rows)
        for path in report.write(records, rows):
            print(path)
        if preferred is not None:
            print(preferences.write(records, rows.name, preferred))
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastvit-kernels bench --device cuda",
        description="Times of models and operators on the GPU, forward and training, against eager, SDPA and "
        "torch.compile; operators, and models at batch 1, from CUDA graphs. Before the first row of a model or an "
        "operator its kernels are checked, in the row's dtype. Rows go to a file named after the GPU as they are "
        "finished; those of the same sources, versions and tuning entries are not repeated.",
    )
    add = parser.add_argument
    add("--device", choices=("cuda",), default="cuda")
    add("--minutes", type=minutes, default=30.0, help="nothing is started that would end later; default: %(default)g")
    add(
        "--all",
        action="store_true",
        help="also the other stages, shapes and batch sizes and torch.compile of operators: many hours",
    )
    add("--suite", nargs="+", choices=(*MODELS, *OPERATORS), metavar="NAME", help="default: every model and operator")
    add("--case", default="*", metavar="PATTERN", help="only these of a suite's shapes")
    add("--batch", nargs="+", type=int, choices=BATCHES, metavar="N", help=f"of {' '.join(map(str, BATCHES))}")
    add("--mode", nargs="+", choices=MODES, default=MODES, help="default: both")
    add("--dtype", nargs="+", choices=DTYPES, default=DTYPES[:1], help="each row in these; default: bf16")
    add("--peers", nargs="+", choices=PEERS, default=PEERS, metavar="NAME", help=f"default: {' '.join(PEERS)}")
    add("--retry", action="store_true", help="repeat rows and checks that failed or took too long")
    processes = min(_MOST_PROCESSES, os.cpu_count() or 1)
    add("--processes", type=int, default=processes, metavar="N", help="of the checks; default: %(default)s")
    add("--output", type=Path, default=Path("bench_output"), metavar="DIR", help="default: %(default)s")
    add(
        "--preferences",
        type=Path,
        metavar="FILE",
        help="also write which backend was measured fastest into this tuning file; see FASTVIT_TUNING",
    )
    add(
        "--report",
        type=Path,
        metavar="FILE",
        help="measure nothing: tables and pictures of a file of rows anew, beside it; takes no GPU",
    )
    add("--list", action="store_true", help="list the rows in their order and measure nothing")
    return parser


def minutes(text: str) -> float:
    """A positive number, as argparse takes it."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected minutes, got {text!r}")
    return value


def _problems() -> dict[str, str]:
    """The backends that cannot run here, each with its reason, which is printed."""
    if not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU")
    found = checking.problems(torch.device("cuda"))
    for name, problem in found.items():
        print(f"without {name}: {problem}")
    return found


def _parts(jobs: Sequence[Job], without: Collection[str]) -> list[Part]:
    """Neighbouring rows that need the same checks, with these."""
    kinds = sorted({_PRECISIONS[job.dtype, job.mode] for job in jobs})
    known = checking.checks([name for name in checking.BACKENDS if name not in without], kinds)
    parts = []
    for (suite, mode, dtype), group in itertools.groupby(jobs, key=lambda job: (job.suite, job.mode, job.dtype)):
        operators = OPERATORS_OF.get(suite) or (OPERATORS[suite],)
        kind = _PRECISIONS[dtype, mode], mode == TRAINING
        checks = [c for c in known if c.operator in operators and (c.precision, c.what in checking.OF_TRAINING) == kind]
        parts.append(Part(list(group), checks))
    return parts


def _chosen(options: argparse.Namespace) -> list[Job]:
    found = _matching(all_jobs() if options.all else core_jobs(), options)
    if found:
        return found
    asked = [f"--suite {' '.join(options.suite)}"] if options.suite else []
    asked += [f"--case {options.case}"] if options.case != "*" else []
    asked += [f"--batch {' '.join(map(str, options.batch))}"] if options.batch else []
    asked += [f"--mode {' '.join(options.mode)}"] if tuple(options.mode) != MODES else []
    asked += [f"--peers {' '.join(options.peers)}"] if tuple(options.peers) != PEERS else []
    others = 0 if options.all else len(_matching(all_jobs(), options))
    hint = f" without --all, which has {others}" if others else ""
    raise UserError(f"{' '.join(asked)}: no such row{hint}")


def _matching(jobs: Sequence[Job], options: argparse.Namespace) -> list[Job]:
    return [
        job._replace(dtype=dtype)
        for dtype in options.dtype
        for job in jobs
        if (options.suite is None or job.suite in options.suite)
        and (options.batch is None or job.batch in options.batch)
        and job.mode in options.mode
        and job.peer in options.peers
        and fnmatchcase(job.case, options.case)
    ]
