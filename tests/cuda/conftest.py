"""The emulated CUDA kernels, compiled once for all tests here."""

from __future__ import annotations

import pytest
from cuda_emulator import Emulator, build


@pytest.fixture(scope="session")
def libraries(tmp_path_factory):
    return build(tmp_path_factory.mktemp("emulator"))


@pytest.fixture(scope="session")
def emulator(libraries):
    """Runs the operators."""
    emulator = Emulator(libraries[0])
    yield emulator
    emulator.close()


@pytest.fixture(scope="session")
def faults(libraries):
    """Runs kernels with planted mistakes."""
    faults = Emulator(libraries[1])
    yield faults
    faults.close()
