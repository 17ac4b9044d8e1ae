"""What is missing is said before anything is downloaded or compiled."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest


@pytest.fixture
def check(root, tmp_path):
    """Runs the script with nothing but `tools` on the path; returns its exit status and messages."""

    def call(python, tools=("uname",), **environment):
        folder = tmp_path / "bin"
        folder.mkdir()
        for tool in tools:
            (folder / tool).symlink_to(shutil.which(tool))
        done = subprocess.run(
            ["/bin/sh", root / "tools" / "prerequisites.sh", python],
            env={"PATH": str(folder), **environment},
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stderr.splitlines()

    return call


def _stand_in(tmp_path, body):
    path = tmp_path / "stand-in"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_nothing_missing(root):
    done = subprocess.run(["/bin/sh", root / "tools" / "prerequisites.sh", sys.executable], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def test_no_python_and_no_compiler(check):
    status, messages = check("python3")
    assert status != 0 and len(messages) == 2
    assert "Python 3.10 or newer: there is no 'python3'" in messages[0]
    assert "C++17 compiler" in messages[1]


def test_old_python(check, tmp_path):
    old = _stand_in(tmp_path, 'case "$2" in *platform*) echo 3.8.1 ;; *) exit 1 ;; esac')
    status, messages = check(old)
    assert status != 0 and f"Python 3.10 or newer: '{old}' is 3.8.1" in messages[0]


def test_no_venv_module(check, tmp_path):
    status, messages = check(_stand_in(tmp_path, 'case "$2" in *venv*) exit 1 ;; esac'))
    assert status != 0 and "venv" in messages[0]


def test_broken_compiler(check):
    status, messages = check(sys.executable, CXX="false")
    assert status != 0 and len(messages) == 1 and "CXX is 'false'" in messages[0]


def test_unsupported_platform(check, tmp_path, root):
    other = tmp_path / "other"
    other.mkdir()
    (other / "uname").write_text("#!/bin/sh\necho Darwin\n")
    (other / "uname").chmod(0o755)
    done = subprocess.run(
        ["/bin/sh", root / "tools" / "prerequisites.sh", sys.executable],
        env={"PATH": str(other)},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "this is Darwin" in done.stderr
