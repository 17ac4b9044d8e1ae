"""Calls: which tensors are found, and what a copy shares."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastvit_kernels.testing import inputs
from fastvit_kernels.testing.calls import Call, cotangents, differentiate
from fastvit_kernels.testing.contract.base import check, pooled
from fastvit_kernels.testing.numerics import NumericsError
from fastvit_kernels.testing.raw import raw_call

TRAINING = next(case for case in inputs.CONV_PROJECTION if case.name == "bn_training")


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.bn = nn.Linear(4, 3), nn.BatchNorm1d(3)

    def forward(self, x):
        return self.bn(self.linear(x))


def test_every_tensor_has_a_name():
    call = TRAINING.call()
    branch = ("conv_weight", "weight", "bias", "bn.weight", "bn.bias")
    expected = {"x", "norm_weight", "norm_bias"} | {f"{n}.{f}" for n in ("query", "key", "value") for f in branch}
    assert set(call.leaves()) == expected
    statistics = ("bn.running_mean", "bn.running_var")
    assert set(call.buffers()) == {f"{n}.{s}" for n in ("query", "key", "value") for s in statistics}


def test_nothing_is_left_out_of_the_operators_tensors():
    for cases in inputs.CASES.values():
        for case in cases:
            call = case.call()
            given = sum(t is not None for t in raw_call(call)[0])
            if not (case.name.startswith("bn_training")):
                assert given == len(call.leaves()) + len(call.buffers()), case.name


def test_a_fresh_call_keeps_buffers_and_inputs_from_change():
    call = TRAINING.call()
    before = {name: t.clone() for name, t in call.buffers().items()}
    results = differentiate(call)
    for name, t in call.buffers().items():
        assert torch.equal(t, before[name])
        assert not torch.equal(results.buffers[name], before[name])
    assert not any(t.requires_grad for t in call.leaves().values())


def test_a_fresh_call_keeps_strides():
    for name, layout in inputs.LAYOUTS.items():
        call = TRAINING.call()
        call = call.with_leaves({"x": layout(call.leaves()["x"])})
        fresh = call.fresh().leaves()["x"]
        assert fresh.stride() == call.leaves()["x"].stride() and fresh.data_ptr() == call.leaves()["x"].data_ptr(), name


@pytest.mark.parametrize("name", inputs.LAYOUTS)
def test_layouts_keep_the_values(name):
    t = torch.randn(3, 4, 5)
    laid_out = inputs.LAYOUTS[name](t)
    assert torch.equal(laid_out, t[:1].expand(3, 4, 5) if name == "expand" else t)
    assert laid_out.is_contiguous() == (name in inputs.DENSE_LAYOUTS)
    assert laid_out.is_neg() == (name == "negative")
    assert laid_out.data_ptr() % 16 or name != "offset"


def test_the_seed_decides_and_precisions_share_values():
    one, same, other = TRAINING.call(), TRAINING.call(), TRAINING.call(seed=1)
    low = TRAINING.call(inputs.BF16)
    for name, t in one.leaves().items():
        assert torch.equal(t, same.leaves()[name])
        assert not torch.equal(t, other.leaves()[name])
        assert torch.equal(t.bfloat16(), low.leaves()[name])
    mixed = TRAINING.call(inputs.BF16_FP32).leaves()
    assert mixed["x"].dtype == torch.bfloat16 and mixed["query.weight"].dtype == torch.float32


def test_modules_are_copied_with_their_parameters():
    module = Scaled()
    call = Call(module, {"x": torch.randn(5, 4)})
    names = {"x", "module.linear.weight", "module.linear.bias", "module.bn.weight", "module.bn.bias"}
    assert set(call.leaves()) == names
    before = {name: t.clone() for name, t in module.state_dict().items()}
    results = differentiate(call.fp64())
    assert set(results.gradients) == names
    assert all(g.dtype == torch.float64 for g in results.gradients.values())
    assert set(results.buffers) == {"module.bn.running_mean", "module.bn.running_var"}
    for name, t in module.state_dict().items():
        assert torch.equal(t, before[name]) and t.dtype == before[name].dtype
    doubled = call.with_leaves({"module.linear.weight": module.linear.weight * 2})
    assert not torch.equal(doubled.function(**doubled.arguments), module(call.arguments["x"]))


def test_cotangents_are_the_same_for_every_precision():
    outputs = [torch.zeros(3, 4), torch.zeros(2)]
    for a, b in zip(cotangents(outputs), cotangents([o.double() for o in outputs]), strict=True):
        assert torch.equal(a, b.float())


def test_a_vanishing_gradient_may_hold_noise_only():
    call = Call(nn.functional.linear, {"input": torch.randn(3, 4), "weight": torch.randn(2, 4)})
    exact, low = differentiate(call.fp64()), differentiate(call)
    exact.gradients["weight"].zero_()
    low.gradients["weight"].fill_(1e-6)
    for noise, accepted in ((3e-6, True), (1e-4, False), (float("nan"), False)):
        found = low._replace(gradients={**low.gradients, "weight": torch.full((2, 4), noise)})
        if accepted:
            check(found, exact, low, vanishing={"weight"})
        else:
            with pytest.raises(NumericsError, match="gradient of weight: got .*, expected zero within"):
                check(found, exact, low, vanishing={"weight"})


def test_draws_are_judged_together():
    """A large error is as wrong in one draw of several, and one draw without any error of the reference's is not."""
    calls = [Call(torch.mul, {"input": torch.randn(8), "other": torch.randn(8)}) for _ in range(3)]
    exact, low = [differentiate(c.fp64()) for c in calls], [differentiate(c) for c in calls]
    check(pooled(low), pooled(exact), pooled(low))
    found = [*low[:2], low[2]._replace(outputs=[low[2].outputs[0] + 1e-5])]
    with pytest.raises(NumericsError, match="outside the numerics rule"):
        check(pooled(found), pooled(exact), pooled(low))
    low[1].gradients["other"] = None
    with pytest.raises(NumericsError, match="for some draws"):
        pooled(low)


def test_a_missing_gradient_is_noticed():
    call = Call(nn.functional.linear, {"input": torch.randn(3, 4), "weight": torch.randn(2, 4)})
    exact, low = differentiate(call.fp64()), differentiate(call)
    with pytest.raises(NumericsError, match="gradient of weight: got none, expected one"):
        check(low._replace(gradients={**low.gradients, "weight": None}), exact, low)
