"""The CUDA C++ kernels on a GPU: the numerics rule, and capture in a CUDA graph. Needs a GPU and the CUDA part."""

from __future__ import annotations

import pytest
import torch
from cuda_cases import OPERATORS, taken

from fastvit_kernels import use_backend
from fastvit_kernels.testing import assert_within_rule
from fastvit_kernels.testing.calls import as_list
from fastvit_kernels.testing.inputs import BF16, CASES, FP16, FP32

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)


@pytest.mark.parametrize(("name", "case", "precision"), taken([FP32, BF16, FP16]))
def test_forward(name, case, precision):
    call = case.call(precision)
    with use_backend("cuda"), torch.no_grad():
        found = as_list(call.map(torch.Tensor.cuda)())
    with use_backend("reference"), torch.no_grad():
        exact, low = as_list(call.fp64()()), as_list(call.fresh()())
    assert_within_rule([t.cpu() for t in found], (exact, low))


@pytest.mark.parametrize("name", OPERATORS)
def test_captured_in_a_graph(name):
    """Nothing waits for the device, and a replay gives what the call gave."""
    case = next(case for case in CASES[name] if "smallest" in case.tags)
    call = case.call(BF16).map(torch.Tensor.cuda)
    with use_backend("cuda"), torch.no_grad():
        wanted = as_list(call())
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = as_list(call())
        for output in found:
            output.fill_(float("nan"))
        graph.replay()
    assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))
