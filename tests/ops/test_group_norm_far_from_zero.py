"""GroupNorm(1) of maps whose mean is a thousand times their deviation, as residuals that only grow can make it.

A variance from the sum of squares has lost all its digits there, and so has a product with the map as it is in bf16. No
more than the rounding of the mean is unavoidable: one unit of it in fp32 shifts every normalised value by a thousand.
"""

from __future__ import annotations

import pytest
import torch

from fastvit_kernels import ops, use_backend
from fastvit_kernels.ops.normalization import group_statistics
from fastvit_kernels.testing import inputs, relative_l2
from fastvit_kernels.testing.calls import cotangents, differentiate

FAR = 1000.0
ROUNDING_OF_THE_MEAN = FAR * torch.finfo(torch.float32).eps
BACKENDS = ("cpu", "triton")
DTYPES = (torch.float32, torch.bfloat16)
_HAT = {"norm": "group", "activation": "silu", "hidden_activation": "silu", "bias": False, "return_statistics": True}
CASES = {
    "local_attention": inputs.local_attention_case(
        "far", grid=(6, 5), window=4, channels=16, norm="group", pad="mask", return_statistics=True
    ),
    "local_attention without projection": inputs.local_attention_case(
        "far", grid=(6, 5), window=4, channels=16, norm="group", pad="mask", proj=False, return_statistics=True
    ),
    "global_attention": inputs.global_attention_case(
        "far", queries=30, norm="group", query_in=16, return_statistics=True
    ),
    "depthwise_mlp": inputs.depthwise_mlp_case("far", **_HAT),
}


def far_from_zero(t):
    return (t.double() / t.double().std() + FAR).to(t.dtype)


def hold(call, backend, dtype):
    """Outputs and gradients err at most twice as much as the reference, and the rounding of the mean besides."""

    def run(backend):
        # The map stays in fp32: in bf16 there would be nothing left of its deviation.
        with use_backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            return differentiate(call)

    found, low = run(backend), run("reference")
    with use_backend("reference"):
        grads = [g.double() for g in cotangents(low.outputs)]
        exact = differentiate(call.fp64(), grads=lambda outputs: grads)
    names = ["output", "statistics", *exact.gradients]
    triples = [[*results.outputs, *results.gradients.values()] for results in (found, low, exact)]
    for name, a, b, c in zip(names, *triples, strict=True):
        fair = relative_l2(b, c)
        assert fair <= 16 * torch.finfo(dtype).eps + 4 * ROUNDING_OF_THE_MEAN, name
        assert relative_l2(a, c) <= 2 * fair + ROUNDING_OF_THE_MEAN, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("given", [False, True], ids=["own statistics", "given statistics"])
@pytest.mark.parametrize("name", CASES)
def test_consumers(name, given, backend, dtype):
    call = CASES[name].call()
    key = "q" if "q" in call.arguments else "x"
    call = call.with_leaves({key: far_from_zero(call.arguments[key])})
    if given:
        call.arguments["norm_statistics"] = group_statistics(call.arguments[key])
    hold(call, backend, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_producers(name, backend, dtype):
    call = CASES[name].call()
    call = call.with_leaves({"residual": far_from_zero(call.arguments["residual"])})
    hold(call, backend, dtype)
    with use_backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        out, statistics = call()
    mean, var = group_statistics(out.double()).unbind(1)
    assert float((mean / var.sqrt()).min()) > FAR / 4
    assert relative_l2(statistics[:, 0], mean) <= torch.finfo(torch.float32).eps
    assert relative_l2(statistics[:, 1], var) <= ROUNDING_OF_THE_MEAN


def test_large_maps():
    """As many values as a sample of HAT-Net's first stage has, of two samples that lie far apart."""
    generator = torch.Generator().manual_seed(0)
    residual = torch.randn(2, 56 * 56, 64, generator=generator) + torch.tensor([FAR, -FAR]).view(2, 1, 1)
    q, kv = torch.zeros(2, 56 * 56, 64), torch.zeros(2, 1, 128)
    options = {"num_heads": 1, "scale": 1.0, "residual": residual, "return_statistics": True, "backend": "cpu"}
    out, statistics = ops.global_attention(q, kv, **options)
    assert torch.equal(out, residual)
    mean, var = group_statistics(residual.double()).unbind(1)
    assert relative_l2(statistics[:, 0], mean) <= torch.finfo(torch.float32).eps
    assert relative_l2(statistics[:, 1], var) <= ROUNDING_OF_THE_MEAN
