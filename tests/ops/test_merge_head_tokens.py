"""merge_head_tokens: the contract, its formula in plain PyTorch, and its messages."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from fastvit_kernels.bench import step_memory
from fastvit_kernels.ops import merge_head_tokens
from fastvit_kernels.testing import inputs
from fastvit_kernels.testing.calls import cotangents, differentiate
from fastvit_kernels.testing.contract import Contract, Rejection


def plain_pytorch(x, num_heads, residual=None):
    rows, heads = x[:, :-num_heads], x[:, -num_heads:]
    rows = torch.cat([rows[:, :1] + sum(heads.unbind(1)).unsqueeze(1) / num_heads, rows[:, 1:]], 1)
    return rows if residual is None else residual + rows


class TestMergeHeadTokens(Contract, Rejection):
    cases = inputs.MERGE_HEAD_TOKENS
    fused = ("merge_head_tokens",)
    precisions: ClassVar = {"cpu": (inputs.FP32, inputs.BF16), "triton": (inputs.FP32, inputs.FP16)}
    equivalent = staticmethod(plain_pytorch)
    resizable = frozenset({("x", 0), ("x", 1), ("x", 2)})
    reshaped = (
        [
            inputs.merge_head_tokens_case("small", batch=2, tokens=7),
            inputs.merge_head_tokens_case("other", batch=3, tokens=5),
            inputs.merge_head_tokens_case("large", batch=5, tokens=20),
        ],
        {"x": (0, 1), "residual": (0, 1)},
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 24)}, ValueError, r"x: expected 3 dimensions, got shape \(2, 24\)"),
        ({"x": torch.zeros(2, 3, 24)}, ValueError, r"x: expected more than 3 tokens, got shape \(2, 3, 24\)"),
        ({"num_heads": 0}, ValueError, "num_heads: expected"),
        ({"num_heads": 2.0}, TypeError, "num_heads: expected an integer, got float"),
        ({"residual": torch.zeros(2, 8, 24)}, ValueError, r"residual: expected shape \(2, 7, 24\), got \(2, 8, 24\)"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = inputs.tagged(inputs.MERGE_HEAD_TOKENS, "smallest")[0].call().arguments
    with pytest.raises(error, match=message):
        merge_head_tokens(**{**arguments, **change})


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
def test_nothing_is_kept_for_the_gradients(backend):
    x, residual = torch.randn(2, 10, 24, requires_grad=True), torch.randn(2, 7, 24, requires_grad=True)
    kept = step_memory.saved(lambda: merge_head_tokens(x, num_heads=3, residual=residual, backend=backend), ())
    assert kept <= 2 * x.element_size()


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_gradients_of_gradients(backend):
    x, residual, cotangent = torch.randn(2, 10, 24), torch.randn(2, 7, 24), torch.randn(2, 7, 24)
    found = {}
    for name in (backend, "reference"):
        leaves = [t.clone().requires_grad_() for t in (x, residual, cotangent)]
        out = merge_head_tokens(leaves[0].exp(), num_heads=3, residual=leaves[1], backend=name)
        first = torch.autograd.grad(out, leaves[:2], leaves[2], create_graph=True)
        found[name] = torch.autograd.grad(sum(g.square().sum() for g in first), [leaves[0], leaves[2]])
    torch.testing.assert_close(found[backend], found["reference"])


@pytest.mark.parametrize("overload", ["default", "triton"])
def test_gradients_do_not_read_what_is_not_kept(overload):
    """Of the tensors they take only shapes and dtypes."""
    call = inputs.tagged(inputs.MERGE_HEAD_TOKENS, "smallest")[0].call()
    expected = differentiate(call).gradients
    x, residual = call.arguments["x"], call.arguments["residual"]
    nothing = [torch.full((), torch.nan).expand(t.shape) for t in (x, residual)]
    (grad,) = cotangents([residual])
    backward = getattr(torch.ops.fastvit.merge_head_tokens_backward, overload)
    found = backward([grad], nothing, [True, True], call.arguments["num_heads"], x.dtype)
    torch.testing.assert_close(found, [expected["x"], expected["residual"]])
