"""The calls that the CUDA C++ kernels take."""

from __future__ import annotations

import pytest

from fastvit_kernels.ops import library
from fastvit_kernels.testing.device import refusals
from fastvit_kernels.testing.inputs import CASES
from fastvit_kernels.testing.raw import raw_call

OPERATORS = ("conv_projection", "depthwise_mlp", "local_attention")


def backend(name):
    return next(backend for backend in library.operators[name].backends if backend.name == "cuda")


def reasons(name, tensors, static):
    """Those of the call itself, not of this machine."""
    return refusals("cuda", name, tensors, static)


def taken(precisions, wanted=lambda case: True):
    """Names and precisions of those wanted of the cases that the kernels take."""
    return [
        pytest.param(name, case, precision, id=f"{name}-{case}-{precision}")
        for name in OPERATORS
        for case in CASES[name]
        for precision in precisions
        if wanted(case) and not reasons(name, *raw_call(case.call(precision)))
    ]
