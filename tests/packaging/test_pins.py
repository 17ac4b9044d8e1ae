"""The versions written in several places agree, and the commands written in several places exist."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
import timm_host
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
EXTRAS = {"run time": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
DECLARED = [Requirement(line) for lines in EXTRAS.values() for line in lines]


@pytest.fixture(scope="module")
def pins(root):
    found = {}
    for line in (root / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate():
                assert re.fullmatch(r"==[^*]+", str(requirement.specifier)), f"not an exact version: {line}"
                assert canonicalize_name(requirement.name) not in found, f"pinned twice: {line}"
                found[canonicalize_name(requirement.name)] = requirement
    return found


@pytest.mark.parametrize("requirement", DECLARED, ids=str)
def test_every_dependency_is_pinned_within_its_range(requirement, pins):
    name = canonicalize_name(requirement.name)
    if name == PROJECT["name"]:
        assert requirement.extras <= set(EXTRAS)
    else:
        (pin,) = pins[name].specifier
        assert pin.version in requirement.specifier


def _with_requirements(roots):
    """Names of everything that installing the `roots` brings in, as the installed distributions tell it."""
    found, waiting = set(), [(root.name, extra) for root in roots for extra in ("", *root.extras)]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in found:
            continue
        found.add((name, extra))
        for line in metadata.requires(name) or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                waiting += [(requirement.name, needed) for needed in ("", *requirement.extras)]
    return {canonicalize_name(name) for name, _ in found}


def _installed_for_the_tests():
    extras = ("run time", "bench", "demo", "test")
    roots = [Requirement(line) for extra in extras for line in EXTRAS[extra]]
    return _with_requirements(root for root in roots if root.name != PROJECT["name"])


def test_everything_installed_for_the_tests_is_pinned(pins):
    assert _installed_for_the_tests() <= set(pins)


def test_what_is_installed_without_its_requirements_has_them(root, pins):
    hosts = re.search(r"^HOSTS := (.+)", (root / "Makefile").read_text(), re.MULTILINE).group(1).split()
    timm_host.load_timm()
    installed = _installed_for_the_tests() | set(hosts)
    for host in hosts:
        assert f"=={metadata.version(host)}" == str(pins[host].specifier)
        for requirement in map(Requirement, metadata.requires(host)):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                (pin,) = pins[canonicalize_name(requirement.name)].specifier
                assert pin.version in requirement.specifier
                assert canonicalize_name(requirement.name) in installed


def test_pre_commit_uses_the_pinned_tools(root, pins):
    used = re.findall(r"([\w-]+)==([\w.]+)", (root / ".pre-commit-config.yaml").read_text())
    assert {name for name, _ in used} == {"clang-format", "ruff"}
    for name, version in used:
        assert str(pins[name].specifier) == f"=={version}"


@pytest.mark.parametrize("target", ["demo", "test", "bench", "lint", "clean", "help"])
def test_documented_targets_exist(root, target):
    assert re.search(rf"^{target}:", (root / "Makefile").read_text(), re.MULTILINE)
    assert f"make {target}" in (root / "README.md").read_text()


def test_check_script_runs_the_documented_commands(root):
    script = (root / ".ci" / "run").read_text()
    assert "make lint" in script and "make test" in script
