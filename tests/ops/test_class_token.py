"""The gate of DHVT's class token, in place: its formula in plain PyTorch, and what the kernel refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastvit_kernels import use_backend
from fastvit_kernels.ops import class_token
from fastvit_kernels.testing import relative_l2


def call(batch=2, tokens=5, channels=19, hidden=7, dtype=torch.float32, parameters=None, norm=True, bias=True):
    generator = torch.Generator().manual_seed(0)

    def random(*size, like=parameters or dtype):
        return torch.randn(size, generator=generator).to(like)

    weights = [random(hidden, channels), random(hidden) if bias else None, random(channels, hidden)]
    weights += [random(channels) if bias else None]
    norms = [random(channels), random(channels)] if norm else [None, None]
    x = random(batch, tokens, channels, like=dtype)
    out = random(batch, tokens, channels, like=dtype)
    return out, [x, random(batch, channels, like=torch.float32), *norms, *weights], 1e-5 if norm else None


def plain_pytorch(out, tensors, eps, activation):
    out, (x, mean, norm_weight, norm_bias, weight1, bias1, weight2, bias2) = (
        out.double(),
        (None if t is None else t.double() for t in tensors),
    )
    gate = F.linear({"gelu": F.gelu, "relu": F.relu}[activation](F.linear(mean, weight1, bias1)), weight2, bias2)
    cls = x[:, 0] if eps is None else F.layer_norm(x[:, 0], x.shape[2:], norm_weight, norm_bias, eps)
    out[:, 0] += cls * gate
    return out


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": torch.bfloat16},
        {"dtype": torch.bfloat16, "parameters": torch.float32},
        {"norm": False, "bias": False},
        {"channels": 1, "hidden": 1, "tokens": 1},
        {"channels": 96, "hidden": 48, "batch": 3},
        {"batch": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_formula(options, activation):
    out, tensors, eps = call(**options)
    expected = plain_pytorch(out, tensors, eps, activation)
    before = out.clone()
    class_token.gate_class_token(out, tensors, norm_eps=eps, activation=activation)
    assert torch.equal(out[:, 1:], before[:, 1:])
    torch.testing.assert_close(out.double(), expected, rtol=1e-5 if out.dtype is torch.float32 else 8e-3, atol=1e-5)
    if out.numel():
        assert relative_l2(before, expected) > 1e-2


def test_registration():
    out, tensors, eps = call()
    torch.library.opcheck(torch.ops.fastvit.gate_class_token.default, (out, tensors, eps, "gelu"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(2, 19)}, "x: expected"),
        ({0: None}, "x: expected a tensor"),
        ({0: torch.zeros(2, 4, 19)}, "out: unexpected shape"),
        ({1: torch.zeros(2, 18)}, "mean: unexpected shape"),
        ({4: torch.zeros(7, 18)}, "weight1: unexpected shape"),
        ({6: torch.zeros(7, 19)}, "weight2: unexpected shape"),
        ({7: torch.zeros(7)}, "bias2: unexpected shape"),
        ({4: torch.zeros(19, 7).t()}, "weight1: expected a dense row-major tensor"),
        ({2: torch.zeros(19, dtype=torch.float64)}, "the CPU kernels take float32 and bfloat16"),
    ],
)
def test_what_the_kernel_refuses(change, message):
    out, tensors, eps = call()
    tensors = [change.get(index, t) for index, t in enumerate(tensors)]
    with pytest.raises(RuntimeError, match=message):
        class_token.gate_class_token(out, tensors, norm_eps=eps, activation="gelu")


def test_when_it_can_be_used():
    out, tensors, _ = call()
    with torch.no_grad():
        assert class_token.can_gate(tensors, out.dtype, None)
        assert not class_token.can_gate(tensors, out.dtype, "reference")
        assert not class_token.can_gate(tensors, torch.float64, None)
        assert not class_token.can_gate([t.double() for t in tensors], out.dtype, None)
        assert not class_token.can_gate([tensors[0].mT, *tensors[1:]], out.dtype, None)
        with use_backend("triton"):
            assert not class_token.can_gate(tensors, out.dtype, None)
    assert not class_token.can_gate(tensors, out.dtype, None)
