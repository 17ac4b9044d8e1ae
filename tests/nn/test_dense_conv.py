"""DenseConv2d with what stands behind it: fused where it is prepared for inference, called one by one elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastvit_kernels import explain
from fastvit_kernels.nn import DenseConv2d
from fastvit_kernels.nn.dense_conv import convolve
from fastvit_kernels.testing.numerics import relative_l2


class Stem(nn.Module):
    def __init__(self, act, bn_after_activation):
        super().__init__()
        self.conv = DenseConv2d(3, 20, 3, 2, 1)
        self.act = act
        self.bn = nn.BatchNorm2d(20)
        self.after = bn_after_activation
        nn.init.normal_(self.bn.running_mean)
        nn.init.uniform_(self.bn.running_var, 0.5, 2.0)
        nn.init.normal_(self.bn.weight)

    def forward(self, x):
        return convolve(self.conv, x, act=self.act, bn=self.bn, bn_after_activation=self.after)

    def plain(self, x):
        maps = self.conv(x)
        return self.bn(self.act(maps)) if self.after else self.act(self.bn(maps))


def made(act=None, after=False):
    torch.manual_seed(0)
    return Stem(act or nn.GELU(), after).eval(), torch.randn(2, 3, 9, 11)


def operators(model, x):
    return [decision.operator for decision in explain(model, x).decisions]


@pytest.mark.parametrize("act", [nn.GELU(), nn.SiLU(), nn.ReLU()], ids=lambda act: type(act).__name__)
@pytest.mark.parametrize("after", [False, True])
def test_prepared_for_inference_it_is_one_operator(act, after):
    model, x = made(act, after)
    with torch.no_grad():
        expected = model.plain(x)
        assert relative_l2(model(x), expected) <= 1e-6 and not operators(model, x)
        model.conv.prepare_inference(True)
        for _ in range(2):
            assert relative_l2(model(x), expected) <= 2e-6
        assert operators(model, x) == ["patch_embedding"]
        model.bn.running_mean.add_(1.0)
        model.conv.weight.mul_(0.5)
        again = model(x)
        model.conv.prepare_inference(False)
        assert relative_l2(again, model(x)) <= 2e-6


@pytest.mark.parametrize("act", [None, nn.GELU()], ids=str)
def test_scales_and_shifts_around_it(act):
    model, x = made(act)
    generator = torch.Generator().manual_seed(1)
    before, behind = ((torch.randn(n, generator=generator), torch.randn(n, generator=generator)) for n in (3, 20))

    def convolved(conv):
        return convolve(conv, x, act=act, bn=model.bn, before=before, behind=behind)

    with torch.no_grad():
        scale, shift = (t[:, None, None] for t in before)
        maps = model.bn(nn.functional.conv2d(x * scale + shift, model.conv.weight, model.conv.bias, 2, 1))
        scale, shift = (t[:, None, None] for t in behind)
        expected = (maps if act is None else act(maps)) * scale + shift
        plain = nn.Conv2d(3, 20, 3, 2, 1)
        plain.load_state_dict(model.conv.state_dict())
        for conv in (plain, model.conv):
            assert relative_l2(convolved(conv), expected) <= 1e-6
        model.conv.prepare_inference(True)
        assert relative_l2(convolved(model.conv), expected) <= 2e-6
        for change in (*before, *behind):
            old = convolved(model.conv)
            change.mul_(1.5)
            assert relative_l2(convolved(model.conv), convolved(plain)) <= 2e-6
            assert relative_l2(convolved(model.conv), old) > 1e-3


def trains(model):
    model.bn.train()


def listens_to_the_convolution(model):
    model.conv.register_forward_hook(lambda module, args, output: 2 * output)


def listens_to_the_activation(model):
    model.act.register_forward_hook(lambda module, args, output: 2 * output)


def approximates(model):
    model.act = nn.GELU("tanh")


def replaces_the_convolution(model):
    model.conv = nn.Conv2d(3, 20, 3, 2, 1)


@pytest.mark.parametrize(
    "change",
    [trains, listens_to_the_convolution, listens_to_the_activation, approximates, replaces_the_convolution],
    ids=lambda change: change.__name__,
)
def test_what_cannot_be_fused_is_called(change):
    model, x = made()
    model.conv.prepare_inference(True)
    change(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x), model.plain(x))


def test_gradients_are_those_of_the_modules():
    model, x = made(after=True)
    model.double().train()
    model.conv.prepare_inference(True)
    x = x.double()
    inputs = x.requires_grad_(), *model.parameters()
    found, expected = model(x), model.plain(x)
    cotangent = torch.randn_like(expected)
    gradients = torch.autograd.grad(found, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent)
    for gradient, right in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, right)
