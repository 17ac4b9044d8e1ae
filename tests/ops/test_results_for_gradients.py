"""Kernels of gradients that need the forward's results are handed them, and run the forward again without them."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from fastvit_kernels.ops.operator import GradientKernels
from fastvit_kernels.testing import inputs
from fastvit_kernels.testing.calls import differentiate
from fastvit_kernels.testing.inputs import FP32

CASES = {
    "local_attention": inputs.local_attention_case("statistics", norm="group", return_statistics=True),
    "global_attention": inputs.global_attention_case("statistics", norm="group", return_statistics=True),
    "depthwise_mlp": inputs.depthwise_mlp_case("statistics", norm="group", return_statistics=True),
    "prefix": inputs.depthwise_mlp_case("prefix", prefix=2, norm="group", return_statistics=True),
}


@pytest.fixture(params=CASES)
def asked(request):
    """Backend and arguments of the gradients' kernels."""
    found = []
    run = GradientKernels.run_backward

    def run_backward(self, *arguments):
        found.append((self, *arguments))
        return run(self, *arguments)

    with mock.patch.object(GradientKernels, "run_backward", run_backward):
        differentiate(CASES[request.param].call(FP32))
    (call,) = found
    return call


def test_the_same_with_and_without(asked):
    backend, grads, *rest = asked
    assert len(grads) == 4 and grads[1].any()
    given, again = backend.run_backward(grads, *rest), backend.run_backward(grads[:2], *rest)
    assert all(torch.equal(g, a) for g, a in zip(given, again, strict=True))


@pytest.mark.parametrize("at", [2, 3])
def test_other_results_are_refused(asked, at):
    backend, grads, *rest = asked
    for wrong in (grads[at][:, :1], grads[at].double()):
        with pytest.raises(RuntimeError, match="grads"):
            backend.run_backward([*grads[:at], wrong, *grads[at + 1 :]], *rest)
