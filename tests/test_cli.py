"""The `fastvit-kernels` command: its subcommands, exit codes and one-line errors."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import fastvit_kernels
from fastvit_kernels import cli
from fastvit_kernels.models import list_models


def test_info_prints_the_environment(capsys):
    assert cli.main(["info"]) == 0
    assert capsys.readouterr().out.strip() == str(fastvit_kernels.info())


def test_models_lists_every_model_with_its_parameters(capsys):
    assert cli.main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list_models()
    assert next(line for line in lines if line.startswith("cvt_13")).split()[1] == "20.0"


def test_explain_names_the_backend_of_every_operator(capsys):
    assert cli.main(["explain", "--model", "cvt_13", "--size", "32"]) == 0
    out = capsys.readouterr().out
    for operator in ("conv_projection", "global_attention", "pointwise_mlp"):
        assert sum(operator in line for line in out.splitlines()) == 13
    assert "reference" in out


def test_explain_takes_the_images_that_a_model_was_published_with(capsys):
    assert cli.main(["explain", "--model", "dhvt_tiny_cifar_patch4"]) == 0
    assert "(1, 65, 192) float32" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"fastvit-kernels {fastvit_kernels.__version__}\n"


def test_explain_names_who_computes_the_gradients(capsys):
    assert cli.main(["explain", "--model", "pvt_v2_b0", "--size", "32", "--training"]) == 0
    assert "gradients" in capsys.readouterr().out.splitlines()[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "--model", "cvt_99"], "--model: unknown model 'cvt_99'; did you mean cvt_21 or cvt_13 or"),
        (["explain", "--model", "hat_net"], "did you mean hat_net_"),
        (["explain", "--model", "nope"], "--model: unknown model 'nope', expected one of cmt_b, cmt_s, "),
        (["explain", "--size", "1"], "expected at least 3 x 3 pixels"),
        (["demo", "--model", "cvt_99", "--size", "32"], "model: unknown model 'cvt_99'; did you mean cvt_21"),
        (["demo", "--model", "cvt_99", "--size", "32", "--host", "transformers"], "cvt_13, cvt_21, cvt_w24"),
        (["demo", "--size", "8"], "size: expected at least 32, got 8"),
        (["demo", "--image", "no_such_file.png"], "image no_such_file.png: no such file"),
    ],
)
def test_a_user_error_is_one_line_and_exit_code_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("fastvit-kernels: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [[], ["unknown"], ["explain", "--size", "0"], ["demo", "--batch", "two"], ["demo", "--dtype", "fp8"]]
)
def test_usage_errors_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    assert "usage: fastvit-kernels" in capsys.readouterr().err


def test_an_impossible_backend_is_no_traceback(capsys):
    with fastvit_kernels.use_backend("cuda"):
        assert cli.main(["explain", "--size", "32"]) == 2
    assert "backend 'cuda' cannot run this call" in capsys.readouterr().err


def test_bench_gets_its_arguments_untouched(monkeypatch):
    received = []
    monkeypatch.setattr("fastvit_kernels.bench.cli.main", lambda argv: received.append(argv) or 1)
    assert cli.main(["bench", "--help", "report", "--", "x"]) == 1
    assert received == [["--help", "report", "--", "x"]]


# Blocks one package at a time, forgets what was imported on top of it, and reports exit code and stderr of the command.
MISSING = """
import contextlib, io, json, sys
from fastvit_kernels import cli
found = {}
for command, package in json.loads(sys.argv[1]):
    before = set(sys.modules)
    blocked = {name: sys.modules.pop(name) for name in before if name.partition(".")[0] == package}
    sys.modules[package] = None
    error = io.StringIO()
    with contextlib.redirect_stderr(error):
        code = cli.main(command)
    found[package] = [code, error.getvalue()]
    del sys.modules[package]
    for name in set(sys.modules) - before:
        if name.startswith("fastvit_kernels."):
            del sys.modules[name]
    sys.modules.update(blocked)
print(json.dumps(found))
"""


def test_a_missing_package_is_named_with_the_extra_that_installs_it(tmp_path):
    demo = ["demo", "--size", "32"]
    commands = [(demo, "rich"), (demo, "PIL"), (demo, "matplotlib"), (demo, "sklearn")]
    commands += [([*demo, "--host", "transformers"], "transformers"), (["bench"], "rich")]
    extras = {package: command[0] for command, package in commands}
    # One process for all: most of its time is importing torch.
    done = subprocess.run(
        [sys.executable, "-c", MISSING, json.dumps(commands)], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == set(extras)
    for package, (code, error) in found.items():
        assert code == 2
        expected = f'fastvit-kernels: {package} is not installed: pip install "fastvit_kernels[{extras[package]}]"\n'
        assert error == expected


def test_a_missing_module_of_our_own_is_not_hidden(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastvit_kernels.bench.cli", None)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["bench"])
