"""What the source distribution and the wheel hold, and that installing and removing the wheel works."""

from __future__ import annotations

import json
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def names(build):
    with zipfile.ZipFile(build.wheel) as wheel:
        return set(wheel.namelist())


def test_any_python_and_torch(build):
    assert "-py3-none-linux_" in build.wheel.name


def test_everything_is_inside_the_package(names):
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"fastvit_kernels"}


def test_contents(names):
    needed = ("__init__.py", "py.typed", "_fk_cpu.so", "_build.json", "models/__init__.py", "bench/__init__.py")
    needed += ("demo/digits.safetensors", "ops/tuning.json")
    assert {f"fastvit_kernels/{name}" for name in needed} <= names
    assert not [name for name in names if "bench/results/" in name or name.endswith((".cpp", ".cu", ".h", ".pyc"))]


def test_every_source_file_is_there(root, names):
    packages = {
        "fastvit_kernels": "fastvit_kernels",
        "models": "fastvit_kernels/models",
        "bench": "fastvit_kernels/bench",
    }
    for source, installed in packages.items():
        for path in (root / source).rglob("*.py"):
            assert f"{installed}/{path.relative_to(root / source)}" in names


def test_licence(build, names):
    assert [name for name in names if name.endswith(".dist-info/licenses/LICENSE")]


def test_build_metadata(build):
    with zipfile.ZipFile(build.wheel) as wheel:
        metadata = json.loads(wheel.read("fastvit_kernels/_build.json"))
    assert metadata["torch"] == torch.__version__
    assert metadata["cpu_isas"].split()[0] == "generic"
    assert metadata["cuda_left_out"] == "FASTVIT_CUDA=0 at build time"
    assert "-std=c++17" in metadata["flags"]


def test_source_distribution(build):
    with tarfile.open(build.sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {
        "CMakeLists.txt",
        "LICENSE",
        "README.md",
        "csrc/common/checks.h",
        "csrc/cpu/isa_generic.cpp",
        "models/__init__.py",
        "fastvit_kernels/ops/tuning.json",
    } <= names
    assert not [name for name in names if name.startswith((".venv/", "build/", "dist/"))]


def test_install_and_uninstall(build, tmp_path, execute):
    environment = tmp_path / "environment"
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    packages = Path(
        execute(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    )
    # torch and its requirements come from the environment that runs the tests.
    (packages / "torch.pth").write_text(str(Path(torch.__file__).parents[1]) + "\n")
    before = sorted(environment.rglob("*"))

    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    execute(*pip, "install", "--no-index", "--no-deps", "--ignore-installed", build.wheel, cwd=tmp_path)
    check = """
import importlib.util, pathlib, sys
import torch, fastvit_kernels, fastvit_kernels.bench, fastvit_kernels.models
packages = pathlib.Path(sys.argv[1])
for module in (fastvit_kernels, fastvit_kernels.bench, fastvit_kernels.models):
    assert packages in pathlib.Path(module.__file__).parents, module
assert importlib.util.find_spec("models") is None and importlib.util.find_spec("bench") is None
with fastvit_kernels.use_backend("cpu"):
    tokens = torch.randn(1, 5, 8)
    fastvit_kernels.ops.global_attention(tokens, tokens, tokens, num_heads=1, scale=1.0)
print(fastvit_kernels.info())
"""
    table = execute(python, "-c", check, packages, cwd=tmp_path)
    assert "cpu left out" not in table
    assert execute(environment / "bin" / "fastvit-kernels", "info", cwd=tmp_path) == table
    assert execute(python, "-m", "fastvit_kernels", "info", cwd=tmp_path) == table

    execute(*pip, "uninstall", "--yes", "fastvit-kernels", cwd=tmp_path)
    assert sorted(environment.rglob("*")) == before
