"""PatchEmbedding against CvT's strided convolution and LayerNorm in plain PyTorch."""

from __future__ import annotations

import copy

import plain_cvt
import pytest
import torch
from torch import nn

from fastvit_kernels.nn import PatchEmbedding
from fastvit_kernels.testing import assert_within_rule, relative_l2


def make(patch_size=3, in_chans=4, embed_dim=8, stride=2, padding=1, dtype=torch.float64):
    plain = plain_cvt.randomize(plain_cvt.Embed(patch_size, in_chans, embed_dim, stride, padding)).to(dtype)
    ours = PatchEmbedding(patch_size, in_chans, embed_dim, stride, padding).to(dtype)
    ours.load_state_dict(plain.state_dict(), strict=True)
    plain.load_state_dict(ours.state_dict(), strict=True)
    return ours, plain


def image(channels=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, channels, 9, 12, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


@pytest.mark.parametrize("hooked", [False, True], ids=["fused", "hooked"])
@pytest.mark.parametrize(
    "geometry", [{}, {"patch_size": 7, "in_chans": 3, "stride": 4, "padding": 2}], ids=["3x3", "7x7"]
)
def test_equals_the_original_with_all_gradients(geometry, hooked):
    ours, plain = make(**geometry)
    if hooked:
        ours.proj.register_forward_hook(lambda *_: None)
    assert ours.fusion_obstacles() == (["the convolution has hooks"] if hooked else [])
    x = image(ours.proj.in_channels)
    y, (tokens, h, w) = ours(x), plain(x)
    assert y.is_contiguous(memory_format=torch.channels_last) and y.shape[2:] == (h, w)
    expected = tokens.transpose(1, 2).unflatten(2, (h, w))
    assert relative_l2(y, expected) <= 1e-14
    g = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape)
    found = torch.autograd.grad(y, (x, *ours.parameters()), g)
    wanted = torch.autograd.grad(expected, (x, *plain.parameters()), g)
    for a, b in zip(found, wanted, strict=True):
        assert relative_l2(a, b) <= 1e-13


def test_the_cpu_kernels_keep_the_numerics_rule():
    ours, _ = make(dtype=torch.float32)
    exact, low = copy.deepcopy(ours).double(), copy.deepcopy(ours)
    ours.backend, low.backend = "cpu", "reference"
    x = image(dtype=torch.float32)
    with torch.no_grad():
        assert_within_rule(ours(x), (exact(x.double()), low(x)))


def replace_conv(**arguments):
    arguments = {"kernel_size": 3, "stride": 2, "padding": 1, **arguments}
    return lambda m: setattr(m, "proj", nn.Conv2d(4, 8, **arguments).double())


OBSTACLES = {
    "grouped": (replace_conv(groups=2), "the convolution has 2 groups, expected 1"),
    "dilated": (replace_conv(dilation=2), "the convolution is dilated by (2, 2)"),
    "circular": (replace_conv(padding_mode="circular"), "the convolution pads with 'circular', expected zeros"),
    "hooked norm": (lambda m: m.norm.register_forward_hook(lambda *_: None), "the layer norm has hooks"),
    "other norm": (
        lambda m: setattr(m, "norm", nn.Identity()),
        "the layer norm is a Identity, expected LayerNorm",
    ),
}


@pytest.mark.parametrize("case", OBSTACLES)
def test_what_cannot_be_fused_is_called(case):
    ours, _ = make()
    change, reason = OBSTACLES[case]
    change(ours)
    assert ours.fusion_obstacles() == [reason]
    x = image()
    expected = ours.norm(ours.proj(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert relative_l2(ours(x), expected) <= 1e-14


def test_autocast_gives_the_same_dtype_fused_or_not():
    ours, _ = make(dtype=torch.float32)
    hooked = copy.deepcopy(ours)
    hooked.norm.register_forward_hook(lambda *_: None)
    x = image(dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y, called = ours(x), hooked(x)
    assert y.dtype == called.dtype == torch.float32
    assert relative_l2(y, called) < 1e-2


def test_packed_weights_are_no_state_and_copies_start_without():
    ours, plain = make(dtype=torch.float32)
    ours.backend = "cpu"
    x = image(dtype=torch.float32)
    with torch.no_grad():
        expected = ours(x)
        ours.prepare_inference(True)
        assert torch.equal(ours(x), expected)
        twin = copy.deepcopy(ours)
        assert ours._packed["patch_embedding"].nbytes > 0 == twin._packed["patch_embedding"].nbytes
        assert torch.equal(twin(x), expected)
    assert list(ours.state_dict()) == list(plain.state_dict())
    ours.prepare_inference(False)
    assert ours._packed is None


def test_initialisation_is_that_of_the_layers():
    torch.manual_seed(3)
    ours = PatchEmbedding(3, 4, 8, 2, 1)
    torch.manual_seed(3)
    plain = plain_cvt.Embed(3, 4, 8, 2, 1)
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in plain.state_dict().items())


@pytest.mark.parametrize("hooked", [False, True], ids=["fused", "hooked"])
@pytest.mark.parametrize("prepared", [False, True], ids=["plain", "prepared"])
def test_a_norm_in_front(prepared, hooked):
    ours, plain = make(dtype=torch.float32)
    norm = nn.LayerNorm(4, eps=1e-3)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    called = []
    if hooked:
        norm.register_forward_hook(lambda *_: called.append(1))
    ours.prepare_inference(prepared)
    x = image(dtype=torch.float32).detach()
    normed = copy.deepcopy(norm)(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    called.clear()
    tokens, h, w = plain(normed)
    assert not ours.fuses(norm)
    with torch.no_grad():
        assert ours.fuses(norm) is (prepared and not hooked)
        found = ours(x, in_norm=norm)
    assert len(called) == hooked
    assert relative_l2(found, tokens.transpose(1, 2).unflatten(2, (h, w))) <= 2e-6
