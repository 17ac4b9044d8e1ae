"""The CUDA kernels under compute-sanitizer: what is missing is said first, then each tool runs the checks on a GPU."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from fastvit_kernels.testing.device import Check

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
SELECTED = "test_check and -cuda-forward"


@pytest.fixture
def sanitize(root, tmp_path):
    """Runs the script with stand-ins of Python, which says what it lacks, and of the tool; returns what it did."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("tail", "dirname"):
        (folder / name).symlink_to(shutil.which(name))

    def stand_in(name, body):
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)

    def call(problems="", tool=True, fails="none", python="python", importable=True, command=None, **environment):
        stand_in("python", f"printf '{problems}'\nexit {0 if importable else 1}")
        if tool:
            log = 'printf "%s|" "$PYTORCH_NO_CUDA_MEMORY_CACHING" "$@"; echo'
            stand_in("compute-sanitizer", f"{log}\n[ $2 != {fails} ] || exit 9")
        done = subprocess.run(
            command or ["/bin/sh", root / "tools" / "sanitize.sh", python, "-x"],
            env={"PATH": str(folder), **environment},
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()

    return call


def test_every_tool_runs_the_checks(sanitize):
    status, out, err = sanitize()
    assert (status, err) == (0, [])
    assert out[::2] == [f"compute-sanitizer --tool {tool}" for tool in TOOLS]
    options = ("--error-exitcode", "9", "python", "-m", "pytest", "tests/cuda/test_device.py", "-k", SELECTED, "-x")
    assert out[1::2] == ["|".join(("1", "--tool", tool, *options)) + "|" for tool in TOOLS]
    assert len(sanitize(TOOLS="racecheck")[1]) == 2


def test_one_that_finds_something_fails_and_the_others_run(sanitize):
    status, out, _ = sanitize(fails="racecheck")
    assert status == 1 and len(out) == 2 * len(TOOLS)


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        ({"problems": "a GPU: torch 2 sees none\\nthe CUDA part: not built"}, ["a GPU: torch 2", "the CUDA part: not"]),
        ({"problems": "Traceback\\nModuleNotFoundError: pytest", "importable": False}, ["ModuleNotFoundError: pytest"]),
        ({"python": "python-of-nobody"}, ["Python: there is no 'python-of-nobody'"]),
        ({"tool": False}, ["compute-sanitizer: it comes with the CUDA toolkit"]),
    ],
)
def test_what_is_missing_is_said(sanitize, options, messages):
    status, out, err = sanitize(**options)
    assert status == 1 and out == [] and len(err) == len(messages)
    assert all(line.startswith(f"missing: {message}") for line, message in zip(err, messages, strict=True))


def test_the_tests_on_a_gpu_say_the_same(sanitize, root):
    make = [shutil.which("make"), "--no-print-directory", "-C", str(root), "test-gpu", "PYTHON=python"]
    status, out, err = sanitize(problems="a GPU: torch 2 sees none", tool=False, command=make)
    assert status != 0 and out == [] and "missing: a GPU: torch 2 sees none" in err
    # Nothing is missing: the stand-in is asked for the tests.
    status, out, _ = sanitize(tool=False, command=make)
    assert status == 0 and "python -m pytest tests/cuda/test_device.py" in out[0]


def test_the_selection_means_the_cuda_kernels(tmp_path):
    calls = [("cuda", "forward"), ("cuda", "graph"), ("triton", "forward")]
    names = [str(Check("local_attention", "a case", "bfloat16", *call)) for call in calls]
    (tmp_path / "test_names.py").write_text(
        f"import pytest\n@pytest.mark.parametrize('check', {names})\ndef test_check(check):\n    pass\n"
        "def test_other():\n    pass\n"
    )
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-k", SELECTED]
    out = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.splitlines()
    assert [line for line in out if "::" in line] == [f"test_names.py::test_check[{names[0]}]"]
