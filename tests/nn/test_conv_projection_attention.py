"""ConvProjectionAttention against CvT's attention in plain PyTorch."""

from __future__ import annotations

import copy
import io
import pickle

import plain_cvt
import pytest
import torch
from torch import nn

from fastvit_kernels.nn import ConvProjectionAttention, LayerNorm
from fastvit_kernels.testing import assert_within_rule, relative_l2

CONFIGURATIONS = {
    "cvt": {"qkv_bias": True, "stride_kv": 2},
    "no class token": {"stride_kv": 2, "with_cls_token": False},
    "defaults": {},
    "wide output": {"dim_out": 32, "qkv_bias": True},
    "kernel 5": {"kernel_size": 5, "padding_q": 2, "padding_kv": 2, "stride_kv": 2},
    "no padding": {"padding_kv": 0, "stride_kv": 3},
    "average pooling": {"method": "avg", "kernel_size": 2, "stride_kv": 2, "padding_kv": 0, "qkv_bias": True},
    "linear": {"method": "linear", "qkv_bias": True},
    "linear without class token": {"method": "linear", "with_cls_token": False},
}


def make(configuration="cvt", dtype=torch.float64, **changes):
    """Our module and the plain one with the same weights, and arguments for both."""
    arguments = {"dim_in": 24, "dim_out": 24, "num_heads": 2, **CONFIGURATIONS[configuration], **changes}
    plain = plain_cvt.randomize(plain_cvt.Attention(**arguments)).to(dtype)
    ours = ConvProjectionAttention(**arguments).to(dtype)
    ours.load_state_dict(plain.state_dict(), strict=True)
    return ours, plain


def tokens(h=5, w=6, prefix=1, batch=2, channels=24, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, prefix + h * w, channels, generator=generator, dtype=torch.float64)
    return x.to(dtype).requires_grad_(), h, w


def prefix_of(module):
    return int(module.with_cls_token)


def gradients(y, inputs, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.autograd.grad(y, inputs, torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype))


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_equals_the_original_with_all_gradients(configuration, mode):
    ours, plain = make(configuration)
    ours.train(mode), plain.train(mode)
    x, h, w = tokens(prefix=prefix_of(ours))
    y, expected = ours(x, h, w), plain(x, h, w)
    assert relative_l2(y, expected) <= 1e-13
    found = gradients(y, (x, *ours.parameters()))
    wanted = gradients(expected, (x, *plain.parameters()))
    for name, a, b in zip(("x", *dict(ours.named_parameters())), found, wanted, strict=True):
        # A key's bias shifts all scores of a query alike: its gradient is zero but for rounding.
        assert float((a - b).norm()) <= 1e-12 * max(float(b.norm()), 1.0), name


@pytest.mark.parametrize("configuration", ["cvt", "average pooling"])
def test_norm_and_residual_are_those_around_the_original(configuration):
    ours, plain = make(configuration)
    norm = plain_cvt.randomize(LayerNorm(24, eps=1e-3).double())
    x, h, w = tokens()
    y = ours(x, h, w, norm=norm, residual=x)
    expected = x + plain(nn.functional.layer_norm(x, (24,), norm.weight, norm.bias, norm.eps), h, w)
    assert relative_l2(y, expected) <= 1e-13
    parameters = (x, *norm.parameters())
    for a, b in zip(gradients(y, parameters), gradients(expected, parameters), strict=True):
        assert relative_l2(a, b) <= 1e-12


def test_the_cpu_kernels_keep_the_numerics_rule():
    ours, _ = make(dtype=torch.float32)
    ours.eval()
    exact = copy.deepcopy(ours).double()
    low = copy.deepcopy(ours)
    low.backend = "reference"
    ours.backend = "cpu"
    norm = LayerNorm(24)
    x, h, w = tokens(9, 7, dtype=torch.float32)
    with torch.no_grad():
        y = ours(x, h, w, norm=norm, residual=x)
        y64 = exact(x.double(), h, w, norm=copy.deepcopy(norm).double(), residual=x.double())
        assert_within_rule(y, (y64, low(x, h, w, norm=norm, residual=x)))


def test_state_dicts_load_strictly_both_ways():
    ours, plain = make()
    assert list(ours.state_dict()) == list(plain.state_dict())
    plain_cvt.randomize(ours, seed=5)
    plain.load_state_dict(ours.state_dict(), strict=True)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name


def test_initialisation_is_that_of_the_layers():
    torch.manual_seed(3)
    ours = ConvProjectionAttention(24, 24, 2, qkv_bias=True)
    torch.manual_seed(3)
    plain = plain_cvt.Attention(24, 24, 2, qkv_bias=True)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_keep_everything_but_the_packed_weights(copier):
    ours, _ = make(dtype=torch.float32)
    ours.eval().prepare_inference(True)
    ours.backend = "cpu"
    x, h, w = tokens(dtype=torch.float32)
    with torch.no_grad():
        expected = ours(x, h, w)
        packed = [weights.nbytes for weights in ours._packed.values()]
        twin = copier(ours)
        assert all(packed) and all(weights.nbytes == 0 for weights in twin._packed.values())
        assert torch.equal(twin(x, h, w), expected)


def test_packed_weights_are_no_state_and_can_be_switched_off():
    ours, plain = make(dtype=torch.float32)
    ours.eval().prepare_inference(True)
    ours.backend = "cpu"
    assert list(ours.state_dict()) == list(plain.state_dict())
    x, h, w = tokens(dtype=torch.float32)
    with torch.no_grad():
        packed = ours(x, h, w)
        ours.prepare_inference(False)
        assert ours._packed is None
        assert torch.equal(ours(x, h, w), packed)
    saved = io.BytesIO()
    torch.save(ours, saved)
    saved.seek(0)
    with torch.no_grad():
        assert torch.equal(torch.load(saved, weights_only=False)(x, h, w), packed)


def test_a_weight_changed_after_packing_counts():
    ours, plain = make(dtype=torch.float32)
    ours.eval().prepare_inference(True)
    ours.backend = "cpu"
    plain.eval()
    x, h, w = tokens(dtype=torch.float32)
    with torch.no_grad():
        before = ours(x, h, w)
        for module in (ours, plain):
            module.proj_k.weight.mul_(-2)
        assert relative_l2(ours(x, h, w), before) > 1e-2
        assert relative_l2(ours(x, h, w), plain(x, h, w)) <= 1e-5


def test_attention_dropout_drops_probabilities():
    ours, plain = make(attn_drop=0.5)
    norm = LayerNorm(24).double()
    x, h, w = tokens(12, 12)
    assert ours.fusion_obstacles(norm) == ["attention dropout is active"]
    ones = torch.ones_like(x)
    with torch.no_grad():
        # Constant values: every row is the sum of its kept probabilities, doubled, whose mean is 1.
        for name in ("q", "k", "v"):
            getattr(ours, f"proj_{name}").weight.zero_()
        ours.proj_v.bias.fill_(1.0)
        ours.proj.weight.copy_(torch.eye(24))
        ours.proj.bias.zero_()
        torch.manual_seed(0)
        sums = torch.stack([ours(ones, h, w) for _ in range(20)])
        assert abs(float(sums.mean()) - 1.0) < 0.02
        variance = 1.0 / (1 + 6 * 6)
        assert abs(float(sums.var()) - variance) < 0.2 * variance
        assert torch.equal(ours.eval()(x, h, w), ours(x, h, w))
        assert ours.fusion_obstacles(norm) == []


def test_output_dropout_comes_before_the_residual():
    ours, _ = make(proj_drop=0.25)
    x, h, w = tokens(12, 12, batch=4)
    residual = torch.full_like(x, 3.0)
    assert ours.fusion_obstacles() == []
    with torch.no_grad():
        torch.manual_seed(0)
        dropped = ours(x, h, w, residual=residual) == residual
        assert abs(float(dropped.double().mean()) - 0.25) < 0.02
        ours.eval()
        assert not bool((ours(x, h, w, residual=residual) == residual).any())


def test_half_precision_parameters_run_throughout():
    ours, _ = make(dtype=torch.bfloat16)
    norm = LayerNorm(24).bfloat16()
    x, h, w = tokens(dtype=torch.bfloat16)
    for mode in (True, False):
        y = ours.train(mode)(x, h, w, norm=norm, residual=x)
        assert y.dtype == torch.bfloat16 and bool(y.isfinite().all())


@pytest.mark.parametrize("shape", [(0, 1, 1), (1, 1, 1), (3, 1, 9), (2, 2, 1)], ids=str)
def test_small_and_empty_batches(shape):
    batch, h, w = shape
    ours, plain = make()
    ours.eval(), plain.eval()
    x, h, w = tokens(h, w, batch=batch)
    y = ours(x, h, w)
    assert y.shape == x.shape
    assert relative_l2(y, plain(x, h, w)) <= 1e-13


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "dw"}, r"method: expected one of dw_bn, avg, linear, got 'dw'"),
        ({"num_heads": 5}, r"num_heads: 5 does not divide dim_out = 24"),
        ({"num_heads": 0}, r"num_heads: 0 does not divide"),
        ({"kernel_size": 0}, "kernel_size: expected at least 1, got 0"),
    ],
)
def test_constructor_errors(change, message):
    with pytest.raises(ValueError, match=message):
        ConvProjectionAttention(**{"dim_in": 24, "dim_out": 24, "num_heads": 2, **change})


@pytest.mark.parametrize("configuration", ["cvt", "average pooling"])
def test_a_map_that_does_not_fit_the_tokens(configuration):
    ours, _ = make(configuration)
    x, h, w = tokens()
    with pytest.raises(ValueError, match="tokens"):
        ours(x, h, w + 1)


def test_a_residual_of_another_shape():
    ours, _ = make()
    x, h, w = tokens()
    with pytest.raises(ValueError, match=r"residual: expected .*\(2, 31, 24\), got \(2, 30, 24\)"):
        ours(x, h, w, residual=x[:, 1:])
