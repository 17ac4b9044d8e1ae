"""The compiled libraries depend on the stable ABI and nothing else."""

from __future__ import annotations

import re

import pytest

from fastvit_kernels import _extension

LIBRARIES = {name: part.path for name, part in _extension.parts.items() if part.path is not None}
ALLOWED = re.compile(
    r"""
    (aoti_)?torch_\w+$                          # the stable ABI
    | \S+@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+$    # the C and C++ runtimes
    | (__gmon_start__|_ITM_\w+|__cxa_finalize)  # hooks of the C runtime, weak
    """,
    re.VERBOSE,
)
NEEDED = re.compile(r"(libtorch|libtorch_cpu|libstdc\+\+|libgcc_s|libm|libc|ld-linux-\S+)\.so(\.\d+)?$")


def test_cpu_library_is_loaded():
    assert _extension.parts["cpu"].problem is None


@pytest.mark.parametrize("name", LIBRARIES)
def test_undefined_symbols(name, root, execute):
    lines = execute("nm", "-D", "--undefined-only", LIBRARIES[name], cwd=root).splitlines()
    symbols = [line.split()[-1].replace("@@", "@") for line in lines]
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols)
    assert [symbol for symbol in symbols if not ALLOWED.match(symbol)] == []


@pytest.mark.parametrize("name", LIBRARIES)
def test_needed_libraries(name, root, execute):
    text = execute("readelf", "--dynamic", "--wide", LIBRARIES[name], cwd=root)
    needed = re.findall(r"\(NEEDED\)\s+Shared library: \[(.+?)\]", text)
    assert "libtorch_cpu.so" in needed
    assert [library for library in needed if not NEEDED.match(library)] == []
    assert "RPATH" not in text and "RUNPATH" not in text


def test_instruction_sets_stay_in_their_files(build, root, execute):
    """A weak function compiled for AVX-512 could be the copy that the linker keeps, and crash older processors."""
    objects = {stem: path for stem, path in build.objects.items() if stem.startswith("isa_")}
    assert "isa_generic" in objects
    for stem, path in objects.items():
        lines = execute("nm", "--defined-only", path, cwd=root).splitlines()
        shared = [line.split()[-1] for line in lines if re.search(r" [A-TV-Zuvw] ", line)]
        assert len(shared) == 1 and stem.removeprefix("isa_") in shared[0], f"{stem}: {shared}"
