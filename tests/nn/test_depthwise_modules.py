"""IRFFN, DAFF and MixFFN on the fused operator against their own submodules, which a hook makes them call."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastvit_kernels.nn import DAFF, IRFFN, MixFFN
from fastvit_kernels.testing.numerics import relative_l2

GRID = (5, 5)
MODULES = {
    "irffn": (lambda: IRFFN(16, 45), 25, {"h": 5, "w": 5}, "conv1"),
    "daff": (lambda: DAFF(16, 40, 16), 26, {}, "conv1"),
    "mix_ffn": (lambda: MixFFN(16, 45), 25, {"h": 5, "w": 5}, "dwconv"),
    "mix_ffn_with_relu": (lambda: MixFFN(16, 40, linear=True), 25, {"h": 5, "w": 5}, "relu"),
}


def _enlivened(module):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.3 if parameter.ndim < 2 else parameter[0].numel() ** -0.5)
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.normal_()
                part.running_var.uniform_(0.5, 2.0)
    return module


def _pair(name, dtype, training):
    """The fused module and an unfused twin."""
    make, tokens, options, part = MODULES[name]
    fused = _enlivened(make()).to(dtype).train(training)
    plain = copy.deepcopy(fused)
    plain.get_submodule(part).register_forward_hook(lambda *args: None)
    assert not fused.fusion_obstacles() and plain.fusion_obstacles()
    torch.manual_seed(1)
    return fused, plain, torch.randn(2, tokens, 16, dtype=dtype), options


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_fused_equals_submodules(name, dtype, tolerance, training):
    fused, plain, x, options = _pair(name, dtype, training)
    norm = nn.LayerNorm(16, eps=1e-3).to(dtype)
    results = []
    for module in (fused, plain):
        inputs = x.clone().requires_grad_()
        out = module(inputs, **options, norm=norm, residual=inputs)
        out.square().sum().backward()
        results.append((out, inputs.grad, module))
    (out, gradient, _), (expected, expected_gradient, _) = results
    assert relative_l2(out, expected) <= tolerance
    assert relative_l2(gradient, expected_gradient) <= 10 * tolerance
    # A bias right in front of batch statistics has no gradient but rounding noise of the others' size.
    noise = 0.1 * max(float(parameter.grad.norm()) for parameter in plain.parameters())
    for (key, one), other in zip(fused.named_parameters(), plain.parameters(), strict=True):
        scale = float(other.grad.norm()) + noise
        assert float((one.grad - other.grad).norm()) <= 20 * tolerance * scale, key
    for (key, one), other in zip(fused.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(one, other, msg=key)


@pytest.mark.parametrize("name", MODULES)
def test_packed_for_inference(name):
    fused, plain, x, options = _pair(name, torch.float32, False)
    fused.prepare_inference(True)
    with torch.no_grad():
        for _ in range(2):
            assert relative_l2(fused(x, **options), plain(x, **options)) <= 2e-6
