"""Triton's interpreter, made to round bf16 like a GPU for all tests of the operators."""

from __future__ import annotations

import pytest

from fastvit_kernels.testing.triton_interpreter import rounded_bfloat16


@pytest.fixture(scope="session", autouse=True)
def _rounded_bfloat16():
    with rounded_bfloat16():
        yield
