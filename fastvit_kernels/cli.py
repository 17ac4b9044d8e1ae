"""The `fastvit-kernels` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from fastvit_kernels import BackendError, __version__
from fastvit_kernels.demo.errors import Disagreement, UserError
from fastvit_kernels.ops import tuning
from fastvit_kernels.ops.dispatch import requested_backend

OK, DISAGREES, USAGE = 0, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        argv: the arguments behind the program's name; `sys.argv[1:]` when None.

    Returns:
        0 for success, 1 when the demonstration found differing numbers, 2 for errors that the user can put right, each
        told in one line on stderr. argparse's own usage errors leave through `SystemExit(2)`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] in (["bench"], ["tune"]):
        # They parse their own options, --help included.
        run = _bench if arguments[0] == "bench" else _tune
        return _guarded(argparse.Namespace(run=run, arguments=arguments[1:], extra="bench"))
    return _guarded(_parser().parse_args(arguments))


def _guarded(options: argparse.Namespace) -> int:
    try:
        requested_backend()
        tuning.current()
    except ValueError as error:
        return _fail(str(error), USAGE)
    try:
        return int(options.run(options) or OK)
    except (UserError, BackendError) as error:
        return _fail(str(error), USAGE)
    except Disagreement as error:
        return _fail(str(error), DISAGREES)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "fastvit_kernels"):
            raise
        return _fail(f'{package} is not installed: pip install "fastvit_kernels[{options.extra}]"', USAGE)


def _fail(message: str, code: int) -> int:
    print(f"fastvit-kernels: {message}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastvit-kernels", description="Hybrid vision transformers, fused: the same numbers, sooner."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], purpose: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=purpose, description=f"{purpose[0].upper()}{purpose[1:]}.")
        added.set_defaults(run=run, extra="demo")
        return added

    command("info", _info, "what is built and available here, and why the rest is not")
    command("models", _models, "the reference models and their parameter counts")
    _add_demo_options(command("demo", _demo, "a stock model against its accelerated copy, on photographs"))
    # Listed for --help; `main` hands everything behind them on.
    command("bench", _bench, "the benchmarks")
    command("tune", _tune, "launch configurations of the Triton kernels, measured on this GPU")
    explain = command("explain", _explain, "which backend runs each operator of a model, and why not another")
    explain.add_argument("--model", default="cvt_13", help="default: %(default)s")
    explain.add_argument(
        "--training", action="store_true", help="the model trains: which backend computes the gradients as well"
    )
    explain.add_argument("--size", type=_positive, help="side of the input, pixels; default: the model's own")
    return parser


def _add_demo_options(demo: argparse.ArgumentParser) -> None:
    demo.add_argument("--model", default="cvt_13", help="see `fastvit-kernels models`; default: %(default)s")
    demo.add_argument(
        "--image",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="default: scikit-learn's sample photographs",
    )
    demo.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="official or transformers weights; default: random ones"
    )
    demo.add_argument(
        "--num-classes", type=_positive, metavar="N", help="default: the checkpoint's config.json or 1000"
    )
    demo.add_argument(
        "--host",
        choices=("fastvit", "transformers"),
        default="fastvit",
        help="whose implementation is the stock model; default: %(default)s",
    )
    demo.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16 autocasts; default: %(default)s")
    demo.add_argument("--size", type=_positive, help="side of the crops, pixels; default: the model's own")
    demo.add_argument("--batch", type=_positive, nargs="+", default=[1, 8], metavar="N", help="sizes; default: 1 8")
    demo.add_argument("--rounds", type=_positive, default=15, metavar="N", help="at most; default: %(default)s")
    demo.add_argument("--threads", type=_positive, metavar="N", help="default: torch's choice")
    demo.add_argument(
        "--output", type=Path, default=Path("demo_output"), metavar="DIR", help="written to; default: %(default)s"
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _info(options: argparse.Namespace) -> int:
    from fastvit_kernels import info

    print(info())
    return OK


def _models(options: argparse.Namespace) -> int:
    from fastvit_kernels.models import create_model, list_models

    for name in list_models():
        # On the meta device a model has its shapes and none of its memory.
        with torch.device("meta"):
            parameters = sum(p.numel() for p in create_model(name).parameters())
        print(f"{name:<12} {parameters / 1e6:8.1f} M parameters")
    return OK


def _explain(options: argparse.Namespace) -> int:
    from fastvit_kernels import explain
    from fastvit_kernels.models import create_model, image_size

    size = options.size or image_size(options.model)
    # Batch statistics of a single image may be of a single value.
    x = torch.randn(1 + options.training, 3, size, size).to(memory_format=torch.channels_last)
    try:
        print(explain(create_model(options.model).train(options.training), x, training=options.training))
    except ValueError as error:
        # An unknown model, or an image too small for it.
        raise UserError(str(error).replace("name: ", "--model: ", 1)) from error
    return OK


def _demo(options: argparse.Namespace) -> int:
    from rich.console import Console

    from fastvit_kernels.demo.run import Options, run
    from fastvit_kernels.models import image_size

    run(
        Options(
            model=options.model,
            host=options.host,
            images=tuple(options.image),
            checkpoint=options.checkpoint,
            num_classes=options.num_classes,
            output=options.output,
            size=options.size or image_size(options.model),
            batches=tuple(options.batch),
            rounds=options.rounds,
            threads=options.threads,
            dtype=options.dtype,
        ),
        # Class names and paths are shown as they are, brackets included.
        Console(markup=False, highlight=False),
    )
    return OK


def _bench(options: argparse.Namespace) -> int:
    from fastvit_kernels.bench.cli import main as bench_main

    return int(bench_main(options.arguments) or OK)


def _tune(options: argparse.Namespace) -> int:
    from fastvit_kernels.bench.tune.cli import main as tune_main

    return tune_main(options.arguments)


if __name__ == "__main__":
    sys.exit(main())
