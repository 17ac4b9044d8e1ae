"""`fastvit-kernels tune`."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from fastvit_kernels.bench.gpu.cli import minutes
from fastvit_kernels.bench.gpu.device import Gpu
from fastvit_kernels.bench.gpu.jobs import BF16, MODES
from fastvit_kernels.bench.gpu.worker import Worker
from fastvit_kernels.bench.tune.run import Request, all_calls, dry_run, run
from fastvit_kernels.demo.errors import UserError
from fastvit_kernels.ops import triton_support
from fastvit_kernels.ops.triton_configs import CONFIGS
from fastvit_kernels.ops.tuning import VARIABLE
from fastvit_kernels.testing.triton_aot import compiling_process

_ARCHITECTURE = "sm_90"
_DTYPES = (BF16, "fp32")
_ARCHITECTURES = r"sm_\d+|gfx[0-9a-f]+"


def main(argv: Sequence[str]) -> int:
    """Run `fastvit-kernels tune` with the arguments behind it.

    Raises:
        UserError: there is no GPU, or what was asked for makes no sense.
        ModuleNotFoundError: Triton is not installed.
    """
    options = _parser().parse_args(argv)
    known = all_calls()
    suites = list(dict.fromkeys(call.suite for call in known))
    if unknown := set(options.suite or ()) - set(suites):
        raise UserError(f"--suite {' '.join(sorted(unknown))}: expected some of {', '.join(suites)}")
    calls = [
        call._replace(dtype=dtype)
        for dtype in options.dtype
        for call in known
        if (options.suite is None or call.suite in options.suite)
        and call.mode in options.mode
        and fnmatchcase(call.case, options.case)
    ]
    if not calls:
        raise UserError(f"--case {options.case}: no such call")
    if options.dry_run:
        return _list(Request(calls, options.architecture or _architecture(), options.output, kernels=options.kernel))
    if not torch.cuda.is_available():
        raise UserError("tune: torch sees no GPU, and times are measured on one; --dry-run only lists candidates")
    problem = triton_support.machine_problem(torch.device("cuda"))
    if problem is not None or triton_support.interpreting():
        raise UserError(f"tune: {problem or 'TRITON_INTERPRET is set'}")
    architecture = triton_support.architecture(torch.device("cuda"))
    request = Request(calls, architecture, options.output, options.minutes, options.kernel, retry=options.retry)
    worker = Worker(Gpu)
    try:
        with compiling_process(options.processes) as pool:
            print(run(request, pool, worker, print))
    except (RuntimeError, ValueError) as error:
        raise UserError(str(error)) from error
    finally:
        worker.close()
    print(f"{options.output}: in force with {VARIABLE}={options.output}")
    return 0


def _architecture() -> str:
    if torch.cuda.is_available() and not triton_support.interpreting():
        return triton_support.architecture(torch.device("cuda"))
    return _ARCHITECTURE


def _list(request: Request) -> int:
    if not re.fullmatch(_ARCHITECTURES, request.architecture):
        raise UserError(f"--architecture {request.architecture}: expected one like sm_80, sm_90 or gfx942")
    try:
        with compiling_process() as pool:
            for call, place, surveyed in dry_run(request, pool):
                good = sum(not candidate.reason for candidate in surveyed)
                print(f"{place} ({call}): {good} of {len(surveyed)}")
                for config, reason in surveyed:
                    print(f"  {' '.join(map(str, config))}{f': {reason}' if reason else ''}")
    except RuntimeError as error:
        problem = " ".join(str(error).split())[:160]
        raise UserError(f"--architecture {request.architecture}: Triton compiles nothing for it: {problem}") from error
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastvit-kernels tune",
        description="Time launch configurations of the Triton kernels on this GPU, at the published shapes of every "
        "operator, and write the fastest to a file. Those that spill registers or need too much shared memory are left "
        "out by ahead-of-time compilation, those with wrong numbers by a comparison with the reference.",
    )
    add = parser.add_argument
    add("--output", type=Path, default=_output(), metavar="FILE", help=f"default: {VARIABLE}'s, else tuning.json")
    add("--minutes", type=minutes, default=10.0, help="nothing goes on longer; default: %(default)g")
    add("--retry", action="store_true", help="places whose usual configuration failed once more")
    add("--suite", nargs="+", metavar="NAME", help="of operators; default: all")
    add("--case", default="*", metavar="PATTERN", help="only these of a suite's shapes")
    add("--mode", nargs="+", choices=MODES, default=MODES, help="default: both")
    add(
        "--dtype", nargs="+", choices=_DTYPES, default=_DTYPES[:1], help="of the products; bf16's tiles are fp16's, too"
    )
    add("--kernel", nargs="+", choices=CONFIGS, metavar="NAME", help=f"of {', '.join(CONFIGS)}; default: all")
    add("--processes", type=int, default=os.cpu_count() or 1, metavar="N", help="that compile; default: %(default)s")
    add("--dry-run", action="store_true", help="list candidates and which compile well; takes no GPU")
    add("--architecture", metavar="NAME", help=f"of a dry run, default: this GPU's, without one {_ARCHITECTURE}")
    return parser


def _output() -> Path:
    return Path(os.environ.get(VARIABLE) or "tuning.json")
