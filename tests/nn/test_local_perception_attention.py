"""CMT's LPU and LMHSA on fused operators against plain PyTorch and against their own submodules."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastvit_kernels import explain
from fastvit_kernels.nn import LMHSA, LPU, attention_parts
from fastvit_kernels.testing.numerics import relative_l2

DTYPES = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=str)
MODES = pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])


def enlivened(module):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.3 if parameter.ndim < 2 else parameter[0].numel() ** -0.5)
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.normal_()
                part.running_var.uniform_(0.5, 2.0)
    return module


def hooked(module):
    """A copy that calls its submodules, because somebody listens to one of them."""
    plain = copy.deepcopy(module)
    plain.proj.register_forward_hook(lambda *args: None)
    assert plain.fusion_obstacles() and not module.fusion_obstacles()
    return plain


@DTYPES
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["nhwc", "nchw"])
def test_lpu(dtype, tolerance, layout):
    lpu = enlivened(LPU(20)).to(dtype)
    x = torch.randn(2, 20, 5, 7, dtype=dtype).to(memory_format=layout).requires_grad_()
    out = lpu(x)
    expected = x + F.conv2d(x, lpu.weight, lpu.bias, padding=1, groups=20)
    assert relative_l2(out, expected) <= tolerance and out.is_contiguous(memory_format=torch.channels_last)
    cotangent = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (x, *lpu.parameters()), cotangent)
    for gradient, right in zip(torch.autograd.grad(out, (x, *lpu.parameters()), cotangent), wanted, strict=True):
        assert relative_l2(gradient, right) <= 10 * tolerance
    (decision,) = explain(lpu, x).decisions
    assert decision.operator == "depthwise_conv"


def test_a_changed_lpu_runs_its_convolution():
    lpu = enlivened(LPU(8))
    lpu.padding_mode = "circular"
    lpu._reversed_padding_repeated_twice = [1, 1, 1, 1]
    x = torch.randn(1, 8, 4, 4)
    (reason,) = lpu.fusion_obstacles()
    assert "pads with 'circular'" in reason
    assert not explain(lpu, x).decisions
    padded = F.pad(x, (1, 1, 1, 1), mode="circular")
    torch.testing.assert_close(lpu(x), x + F.conv2d(padded, lpu.weight, lpu.bias, groups=8))


@DTYPES
@MODES
@pytest.mark.parametrize("ratio", [1, 2, 3])
@pytest.mark.parametrize("fuses_norm", [False, True], ids=["bare", "norm"])
def test_lmhsa_equals_its_submodules(dtype, tolerance, training, ratio, fuses_norm):
    h, w = 6, 12
    fused = enlivened(LMHSA(16, 2, qkv_bias=True, sr_ratio=ratio)).to(dtype).train(training)
    plain = hooked(fused)
    norm = enlivened(nn.LayerNorm(16, eps=1e-3)).to(dtype) if fuses_norm else None
    table = torch.randn(2, h * w, h * w // ratio**2, dtype=dtype)
    x = torch.randn(2, h * w, 16, dtype=dtype)
    results = []
    for module in (fused, plain):
        rows = x.clone().requires_grad_()
        out = module(rows, h, w, table, norm=norm, residual=rows)
        out.square().sum().backward()
        results.append((out, rows.grad))
    (out, gradient), (expected, expected_gradient) = results
    assert relative_l2(out, expected) <= tolerance
    assert relative_l2(gradient, expected_gradient) <= 10 * tolerance
    # A bias in front of the batch norm, or added to all of a query's scores, has no gradient but rounding noise.
    noise = 0.1 * max(float(parameter.grad.norm()) for parameter in plain.parameters())
    for (key, one), other in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert float((one.grad - other.grad).norm()) <= 20 * tolerance * (float(other.grad.norm()) + noise), key
    for (key, one), other in zip(fused.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(one, other, msg=key)


def test_the_reduction_is_fused():
    attention = enlivened(LMHSA(16, 2, sr_ratio=2)).eval()
    norm, table, x = nn.LayerNorm(16), torch.randn(2, 16, 4), torch.randn(1, 16, 16)
    with torch.no_grad():
        expected = hooked(attention)(x, 4, 4, table, norm=norm)
        attention.prepare_inference(True)
        for _ in range(2):
            assert relative_l2(attention(x, 4, 4, table, norm=norm), expected) <= 2e-6
    calls = [decision.operator for decision in explain(attention, x, 4, 4, table, norm=norm).decisions]
    assert list(dict.fromkeys(calls)) == ["depthwise_conv", "patch_embedding", "global_attention"]


def listens_to_the_reduction(attention):
    attention.sr[1].register_forward_hook(lambda module, args, output: 2 * output)


def activates_the_reduction(attention):
    attention.sr.append(nn.GELU())


@pytest.mark.parametrize("change", [listens_to_the_reduction, activates_the_reduction], ids=lambda c: c.__name__)
def test_a_changed_reduction_is_called(change):
    attention = enlivened(LMHSA(16, 2, sr_ratio=2)).eval()
    table, x = torch.randn(2, 16, 4), torch.randn(1, 16, 16)
    change(attention)
    assert any("reduction" in reason for reason in attention.fusion_obstacles())
    rows = attention.sr(x.mT.unflatten(2, (4, 4))).flatten(2).mT
    q, k, v = (
        layer(tokens).unflatten(2, (2, 8)).transpose(1, 2)
        for layer, tokens in ((attention.q, x), (attention.k, rows), (attention.v, rows))
    )
    expected = ((q @ k.mT * attention.scale + table).softmax(-1) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(x, 4, 4, table), attention.proj(expected))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", ["", "k", "v", "kv"])
def test_keys_and_values_are_one_linear_where_both_train_or_none(frozen, bias):
    attention = enlivened(LMHSA(16, 2, qkv_bias=bias, sr_ratio=2)).train()
    for name in frozen:
        getattr(attention, name).requires_grad_(False)
    x, table = torch.randn(2, 24, 16), torch.randn(2, 24, 6)
    with mock.patch.object(attention_parts, "linear_of_rows", wraps=attention_parts.linear_of_rows) as linear:
        attention(x, 4, 6, table)
    assert linear.call_count == (1 if frozen in ("", "kv") else 2)
    plain = hooked(attention)
    results = []
    for module in (attention, plain):
        module(x, 4, 6, table).square().sum().backward()
        results.append({name: parameter.grad for name, parameter in module.named_parameters()})
    for name, gradient in results[0].items():
        right = results[1][name]
        assert (gradient is None) == (right is None) == (name.split(".")[0] in tuple(frozen))
        assert right is None or right.norm() < 1e-3 or relative_l2(gradient, right) <= 2e-5
