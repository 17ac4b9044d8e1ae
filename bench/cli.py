"""`fastvit-kernels bench`: measure, or show what was measured."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from fastvit_kernels.bench import report, results
from fastvit_kernels.bench.measure import Plan
from fastvit_kernels.bench.modes import MODES, Mode
from fastvit_kernels.bench.run import run
from fastvit_kernels.bench.suites import BATCHES, SUITES
from fastvit_kernels.demo.errors import UserError

DEFAULT_SUITES = ("cvt_13",)


def main(argv: Sequence[str]) -> int:
    """Run `fastvit-kernels bench` with the arguments behind it.

    Returns:
        0; or 1 when one of our own peers has no time to show.

    Raises:
        UserError: what was asked for makes no sense or a file cannot be read.
        ModuleNotFoundError: an optional package that tables or pictures need is not installed.
    """
    arguments = list(argv)
    if any(argument == "--device" or argument.startswith("--device=") for argument in arguments):
        # Other options, other files; and the CUDA part of the benchmark stays unread on a CPU.
        from fastvit_kernels.bench.gpu.cli import main as on_device

        return on_device(arguments)
    if arguments[:1] == ["report"]:
        return _report(_report_parser().parse_args(arguments[1:]))
    return _run(_run_parser().parse_args(arguments))


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds, got {text!r}")
    return value


def _run_parser() -> argparse.ArgumentParser:
    plan = Plan()
    usual = {name: " ".join(_usual_peers(mode)) for name, mode in MODES.items()}
    parser = argparse.ArgumentParser(
        prog="fastvit-kernels bench",
        description="Every peer on the same calls, in turn: first its error against fp64, then its time. "
        "`fastvit-kernels bench report FILE...` shows the rows again.",
    )
    add = parser.add_argument
    add("--suite", nargs="+", choices=SUITES, default=DEFAULT_SUITES, help="default: cvt_13", metavar="NAME")
    add("--case", default="*", metavar="PATTERN", help="only these of a suite's shapes, such as 'cvt_13-224-*'")
    add(
        "--mode",
        choices=MODES,
        default="inference",
        help="a forward, or forward and backward; with memory columns for the latter. Default: %(default)s",
    )
    usual_batches = "; ".join(f"{name}: {' '.join(map(str, mode.batches))}" for name, mode in MODES.items())
    add(
        "--batch",
        nargs="+",
        type=_positive,
        metavar="N",
        help=f"default for {usual_batches}. All that the suites are meant for, some of which take minutes: "
        + " ".join(map(str, BATCHES)),
    )
    add("--dtype", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"], help="default: both")
    names = list(dict.fromkeys(name for mode in MODES.values() for name in mode.peers))
    default = "; ".join(f"{name}: {peers}" for name, peers in usual.items())
    add("--peers", nargs="+", choices=names, metavar="NAME", help=f"default for {default}")
    add("--rounds", type=_positive, default=plan.rounds, metavar="N", help="at most; default: %(default)s")
    add("--seconds", type=_seconds, default=plan.seconds, help="of timing per case; default: %(default)g")
    add("--threads", type=_positive, default=torch.get_num_threads(), metavar="N", help="default: %(default)s")
    add("--cpu-time", action="store_true", help="measure the CPU time of one thread instead of wall time")
    add("--output", type=Path, default=Path("bench_output"), metavar="DIR", help="for CSV; default: %(default)s")
    add("--device", choices=("cuda",), help="measure on a GPU; see `fastvit-kernels bench --device cuda --help`")
    add("--list", action="store_true", help="list suites, cases and peers and measure nothing")
    return parser


def _report_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastvit-kernels bench report", description="Show the rows of CSV files.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also save a picture, PNG or SVG")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also save the tables as Markdown")
    return parser


def _list() -> int:
    for name, suite in SUITES.items():
        print(f"suite {name}: {' '.join(case.name for case in suite(1))}")
    for mode in MODES.values():
        for peer in mode.peers.values():
            asked = " (when asked for)" if peer.optional else ""
            print(f"{mode.name} peer {peer.name}: {' '.join(peer.variants)}{asked}")
    return 0


def _usual_peers(mode: Mode) -> list[str]:
    return [name for name, peer in mode.peers.items() if not peer.optional]


def _run(options: argparse.Namespace) -> int:
    if options.list:
        return _list()
    from rich.console import Console

    mode = MODES[options.mode]
    names = options.peers or _usual_peers(mode)
    absent = [name for name in names if name not in mode.peers]
    if absent:
        raise UserError(f"--peers: nobody runs {mode.name} by {', '.join(absent)}; {', '.join(mode.peers)} do")
    peers = [mode.peers[name] for name in names]
    console = Console()
    threads = 1 if options.cpu_time else options.threads
    clock = time.process_time if options.cpu_time else time.perf_counter
    plan = replace(Plan(), rounds=options.rounds, seconds=options.seconds, clock=clock)
    complete = True
    measured = 0
    for name in options.suite:
        for batch in options.batch or mode.batches:
            # The cases serve both dtypes: their weights, fp64 results and exported graphs are made once.
            cases = [case for case in SUITES[name](batch) if fnmatchcase(case.name, options.case)]
            measured += len(cases)
            for dtype in options.dtype if cases else []:
                with console.status("") as status:
                    rows, conditions = run(cases, dtype, peers, threads, plan, status.update, mode)
                path = options.output / results.file_name(name, mode.name, dtype, batch, conditions)
                results.write(path, rows, conditions)
                for group in report.groups((row, conditions) for row in rows):
                    console.print(report.render(group))
                console.print(f"{path}\n")
                complete &= all(row.status == results.OK for row in rows if mode.peers[row.peer].ours)
    if not measured:
        raise UserError(f"--case {options.case}: no such case in {' '.join(options.suite)}")
    return 0 if complete else 1


def _report(options: argparse.Namespace) -> int:
    from rich.console import Console

    console = Console()
    try:
        found = report.groups(record for path in options.files for record in results.read(path))
        for group in found:
            console.print(report.render(group))
        for line in dict.fromkeys(report.describe(group.conditions) for group in found):
            console.print(line)
        if options.plot is not None:
            report.plot(found, options.plot)
        if options.markdown is not None:
            options.markdown.write_text(report.markdown(found))
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error
    return 0
