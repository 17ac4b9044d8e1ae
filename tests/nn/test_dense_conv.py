"""DenseConv2d with what stands around it: fused where it is prepared for inference or trains."""

from __future__ import annotations

import copy
import dataclasses
from unittest import mock

import pytest
import torch
from torch import nn

from fastvit_kernels import _extension, explain, use_backend
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


def trained(model, x, run, dtype=None):
    """Result, gradients and statistics of a call."""
    model = copy.deepcopy(model)
    leaves = [x.detach().clone().requires_grad_(), *model.parameters()]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        out = run(model, leaves[0])
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    return [out, *torch.autograd.grad(out, leaves, cotangent.to(out.dtype)), *model.bn.buffers()]


def called(model, x):
    return model(x)


def plainly(model, x):
    return model.plain(x)


@pytest.mark.parametrize("momentum", [0.1, None, 1.5], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("after", [False, True], ids=["norm first", "activation first"])
@pytest.mark.parametrize("act", [nn.GELU(), nn.SiLU()], ids=lambda act: type(act).__name__)
def test_it_trains_as_the_modules_do(act, after, training, momentum):
    model, x = made(act, after)
    model.train(training)
    model.bn.momentum = momentum
    for memory_format in (torch.channels_last, torch.contiguous_format):
        images = x.contiguous(memory_format=memory_format)
        for found, expected in zip(trained(model, images, called), trained(model, images, plainly), strict=True):
            torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-5)
    decisions = explain(model, x, training=True).decisions
    fused = [(d.operator, d.chosen, d.gradients) for d in decisions]
    # PyTorch's module takes any momentum.
    assert fused == ([] if training and momentum == 1.5 else [("batch_norm_act", "cpu", "cpu")])


@pytest.mark.parametrize("after", [False, True])
def test_it_trains_under_autocast(after):
    model, x = made(after=after)
    model.train()
    found, plain = (trained(model, x, run, torch.bfloat16) for run in (called, plainly))
    exact = trained(model.double(), x.double(), plainly)
    assert found[0].dtype is plain[0].dtype is torch.bfloat16
    for ours, theirs, right in zip(found[:-1], plain[:-1], exact[:-1], strict=True):
        assert relative_l2(ours, right) <= 1.5 * relative_l2(theirs, right) + 1e-5


@pytest.mark.parametrize("autocast", [False, True])
def test_it_trains_with_scales_and_shifts_around_it(autocast):
    model, x = made()
    model.train()
    generator = torch.Generator().manual_seed(1)
    scales = [torch.randn(n, generator=generator).requires_grad_() for n in (3, 3, 20, 20)]

    def fused(x, scales):
        before, behind = (scales[0], scales[1]), (scales[2], scales[3])
        return convolve(model.conv, x, act=model.act, bn=model.bn, before=before, behind=behind)

    def plain(x, scales):
        a, b, c, d = (t[:, None, None] for t in scales)
        return model.plain(x * a + b) * c + d

    def gradients(run, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, *scales)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype is torch.float32):
            out = run(leaves[0], leaves[1:])
        return [out, *torch.autograd.grad(out.square().mean(), leaves)]

    found, expected = gradients(fused, torch.float32), gradients(plain, torch.float32)
    exact = gradients(plain, torch.float64) if model.double() else []
    for ours, theirs, right in zip(found, expected, exact, strict=True):
        assert ours.dtype is theirs.dtype
        assert relative_l2(ours, right) <= 1.5 * relative_l2(theirs, right) + 1e-6


def test_gradients_behind_running_statistics_survive_training():
    model, x = made()
    out = model(x)
    model.train()
    model(x)
    out.sum().backward()


@pytest.mark.parametrize("shape", [(0, 3, 9, 11), (1, 3, 1, 1)], ids=["no image", "one value"])
def test_few_values_are_the_modules_matter(shape):
    model, _ = made()
    model.train()
    results = []
    for run in (called, plainly):
        try:
            results.append(run(model, torch.zeros(shape)).shape)
        except ValueError as error:
            results.append(str(error))
    assert results[0] == results[1]


def by_reference():
    return use_backend("reference")


def without_the_extension():
    return mock.patch.dict(_extension.parts, cpu=dataclasses.replace(_extension.parts["cpu"], problem="not built"))


def in_fp16():
    return torch.autocast("cpu", torch.float16)


@pytest.mark.parametrize("where", [by_reference, without_the_extension, in_fp16], ids=lambda where: where.__name__)
def test_where_there_are_no_kernels_the_modules_are_called(where):
    model, x = made()
    model.train()
    with where():
        names = {str(node) for node in _nodes(model(x))}
    assert any("Gelu" in name for name in names) and not any("Fused" in name for name in names)


def _nodes(out):
    """Names of the steps that autograd has recorded."""
    found, left = set(), [out.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in found:
            found.add(node)
            left += [parent for parent, _ in node.next_functions]
    return {node.name() for node in found}


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_compiled_and_exported(training):
    model, x = made()
    model.train(training)
    found = trained(model, x, lambda model, x: torch.compile(model, fullgraph=True, backend="aot_eager")(x))
    for ours, right in zip(found, trained(model, x, called), strict=True):
        torch.testing.assert_close(ours, right)
    assert "fastvit" not in str(torch.export.export(model.eval(), (x,)).graph)


def test_torch_func_sees_the_modules():
    model, x = made()
    parameters = dict(model.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    expected = torch.autograd.grad(model.plain(x).square().sum(), list(parameters.values()))
    for found, right in zip(torch.func.grad(loss)(parameters).values(), expected, strict=True):
        torch.testing.assert_close(found, right)


def test_an_infinite_value_stays_where_it_is():
    model, x = made(nn.ReLU())
    scale, shift = torch.ones(3, requires_grad=True), torch.zeros(3)
    x[0, 0, 4, 5] = torch.inf
    model.conv.weight.data.abs_()
    found = convolve(model.conv, x, act=model.act, bn=model.bn, before=(scale, shift))
    expected = model.plain(x)
    assert torch.equal(found.isinf(), expected.isinf()) and torch.equal(found.isnan(), expected.isnan())
