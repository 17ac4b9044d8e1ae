"""SpatialReductionAttention on the fused operators against its own submodules, and what it does at the edges."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastvit_kernels.nn import MixFFN, SpatialReductionAttention
from fastvit_kernels.ops import library
from fastvit_kernels.testing import relative_l2

DIM, HEADS, H, W = 24, 3, 9, 7
VARIANTS = {
    "no reduction": {"sr_ratio": 1},
    # Neither height nor width is a multiple: what is left over is left out.
    "by 2": {"sr_ratio": 2},
    "by 4": {"sr_ratio": 4, "qkv_bias": False, "qk_scale": 0.3},
    "linear": {"linear": True},
}


def attention(variant, **options):
    torch.manual_seed(0)
    module = SpatialReductionAttention(DIM, HEADS, **{"qkv_bias": True, **VARIANTS[variant], **options})
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.3 if parameter.ndim < 2 else parameter[0].numel() ** -0.5)
    return module


def tokens(dtype=torch.float32, h=H, w=W):
    return torch.randn(2, h * w, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def layer_norm(dtype=torch.float32):
    norm = nn.LayerNorm(DIM, eps=1e-3).to(dtype)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_()
    return norm


def observed(module):
    """A twin that calls its submodules, for somebody watches."""
    twin = copy.deepcopy(module)
    twin.q.register_forward_hook(lambda *arguments: None)
    assert not module.fusion_obstacles() and twin.fusion_obstacles() == ["q has hooks"]
    return twin


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=str)
def test_fused_equals_submodules(variant, dtype, tolerance):
    fused = attention(variant).to(dtype)
    norm = layer_norm(dtype)
    results = []
    for module in (fused, observed(fused)):
        x = tokens(dtype).requires_grad_()
        out = module(x, H, W, norm=norm, residual=x)
        norm.zero_grad()
        out.square().sum().backward()
        results.append((out, x.grad, norm.weight.grad.clone(), [p.grad for p in module.parameters()]))
    scale = max(float(gradient.norm()) for gradient in results[1][3])
    for found, expected in zip(results[0][:3], results[1][:3], strict=True):
        assert relative_l2(found, expected) <= 10 * tolerance
    for found, expected in zip(results[0][3], results[1][3], strict=True):
        # A key's bias has no gradient but rounding noise.
        assert float((found - expected).norm()) <= 20 * tolerance * (float(expected.norm()) + 0.1 * scale)


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_for_inference(variant):
    module, norm, x = attention(variant), layer_norm(), tokens()
    with torch.no_grad():
        expected = observed(module)(x, H, W, norm=norm, residual=x)
        module.prepare_inference(True)
        for _ in range(2):
            assert relative_l2(module(x, H, W, norm=norm, residual=x), expected) <= 2e-6
        with torch.autocast("cpu", torch.bfloat16):
            assert relative_l2(module(x, H, W, norm=norm, residual=x), expected) <= 2e-2


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        # Without a reduction the keys' linear normalises its rows itself.
        ("no reduction", ["patch_embedding", "global_attention"]),
        ("by 4", ["patch_embedding", "patch_embedding", "global_attention"]),
        ("linear", ["patch_embedding", "patch_embedding", "global_attention"]),
    ],
)
def test_one_call_to_each_operator(monkeypatch, variant, expected):
    calls = []
    original = library.call

    def call(operator, tensors, static, **options):
        calls.append(operator.name)
        assert all(t is None or t.is_contiguous() for t in tensors), "an operator would copy"
        return original(operator, tensors, static, **options)

    module, x = attention(variant), tokens()
    module.prepare_inference(True)
    monkeypatch.setattr(library, "call", call)
    with torch.no_grad():
        module(x, H, W, norm=layer_norm(), residual=x)
    assert calls == expected


@pytest.mark.parametrize("variant", ["by 2", "linear"])
def test_dropouts(variant):
    dropping = attention(variant, attn_drop=0.5, proj_drop=0.5)
    plain = attention(variant)
    x = tokens()
    with torch.no_grad():
        assert "attention dropout is active" in dropping.fusion_obstacles()
        assert not torch.equal(dropping(x, H, W), dropping(x, H, W))
        assert (dropping(x, H, W, residual=x) == x).float().mean() > 0.3
        assert torch.equal(dropping.eval()(x, H, W), plain(x, H, W))


@pytest.mark.parametrize("part", ["q", "kv", "proj", "attn_drop", "sr", "norm"])
def test_a_watched_part_is_called(part):
    module, seen = attention("by 2"), []
    expected = module(tokens(), H, W)
    module.get_submodule(part).register_forward_hook(lambda *arguments: seen.append(part))
    assert len(module.fusion_obstacles()) == 1
    assert relative_l2(module(tokens(), H, W), expected) <= 2e-6 and seen == [part]


@pytest.mark.parametrize("part", ["pool", "act"])
def test_a_watched_part_of_the_linear_variant_is_called_without_a_detour(part):
    module, seen = attention("linear"), []
    module.get_submodule(part).register_forward_hook(lambda *arguments: seen.append(part))
    assert not module.fusion_obstacles()
    module(tokens(), H, W)
    assert seen == [part]


def test_backend_is_passed_on():
    module, x = attention("by 2"), tokens(torch.float64)
    module.backend = "cpu"
    with pytest.raises(RuntimeError, match="cpu"):
        module.double()(x, H, W)


@pytest.mark.parametrize(
    ("shape", "size", "message"),
    [
        ((2, 63, 24), (8, 7), r"x: expected \[B, 8 \* 7, 24\] tokens, got shape \(2, 63, 24\)"),
        ((2, 63, 23), (9, 7), r"x: expected \[B, 9 \* 7, 24\] tokens"),
        ((63, 24), (9, 7), r"x: expected \[B, 9 \* 7, 24\] tokens"),
        ((2, 15, 24), (5, 3), "h, w: expected at least sr_ratio = 4, got 5 x 3"),
    ],
)
def test_inputs_that_do_not_fit(shape, size, message):
    with pytest.raises(ValueError, match=message):
        attention("by 4")(torch.zeros(shape), *size)


def test_heads_that_do_not_fit():
    with pytest.raises(ValueError, match="num_heads: 5 does not divide dim = 24"):
        SpatialReductionAttention(24, 5)


@pytest.mark.parametrize("module", [MixFFN(64, 512), SpatialReductionAttention(64, sr_ratio=4)], ids=["mlp", "sra"])
def test_initialisation(module):
    """Truncated normals for linears, fan-out per group for convolutions, no biases."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            assert float(part.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
        elif isinstance(part, nn.Conv2d):
            outputs = part.weight.numel() / part.in_channels
            assert float(part.weight.detach().std()) == pytest.approx((2 / outputs) ** 0.5, rel=0.05)
        if isinstance(part, (nn.Linear, nn.Conv2d)) and part.bias is not None:
            assert not part.bias.any()
