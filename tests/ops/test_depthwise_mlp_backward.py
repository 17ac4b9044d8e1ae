"""depthwise_mlp's C++ gradients on maps of several bands, several chunks of hidden channels, and hostile calls."""

from __future__ import annotations

import pytest
import torch

from fastvit_kernels import use_recompute
from fastvit_kernels.testing import inputs
from fastvit_kernels.testing.contract.base import backward_operators, check, reference_results, run
from fastvit_kernels.testing.inputs import BF16, FP32, depthwise_mlp_case
from fastvit_kernels.testing.raw import raw_call

NATIVE = {"fastvit.depthwise_mlp_backward.native"}
IRFFN = {
    "hidden_activation": "gelu",
    "inner_residual": "before_activation",
    "bn": "123",
    "bn_after_activation": True,
}
# A bias right in front of batch statistics has no effect.
DAFF = {"hidden_activation": "gelu", "inner_residual": "after_activation", "bn": "123", "prefix": 1}
DAFF_STEPS = {**DAFF, "vanishing": ["norm_bias", "fc1_bias", "dw_bias", "fc2_bias"]}
HAT = {"activation": "silu", "hidden_activation": "silu", "norm": "group", "bias": False, "out_norm": True}
LARGE = [
    depthwise_mlp_case("mix_ffn", grid=(27, 32), channels=20, hidden=165, batch=2),
    depthwise_mlp_case("odd_width", grid=(29, 33), channels=9, hidden=70, batch=1, kernel=5),
    depthwise_mlp_case("wider_filter", grid=(31, 33), channels=16, hidden=64, batch=1, kernel=7),
    depthwise_mlp_case("irffn", grid=(26, 33), channels=13, hidden=98, batch=2, **IRFFN),
    depthwise_mlp_case("daff", grid=(25, 31), channels=16, hidden=64, batch=2, return_mean=True, **DAFF),
    depthwise_mlp_case("hat", grid=(26, 32), channels=12, hidden=96, batch=2, return_statistics=True, **HAT),
    depthwise_mlp_case("groups_and_slices", grid=(3, 3), channels=96, hidden=600, batch=9),
    depthwise_mlp_case("steps_of_daff", grid=(25, 31), channels=16, hidden=64, bn_training=True, **DAFF_STEPS),
    depthwise_mlp_case("steps_of_irffn", grid=(9, 11), channels=13, hidden=98, bn_training=True, **IRFFN),
    # Few pixels and many hidden channels: chunks of them are tasks.
    depthwise_mlp_case("tasks_of_irffn", grid=(3, 4), channels=45, hidden=330, batch=3, bn_training=True, **IRFFN),
    depthwise_mlp_case("tasks_of_daff", grid=(5, 3), channels=37, hidden=301, batch=3, bn_training=True, **DAFF_STEPS),
]
# Those whose forward keeps maps for the gradients unless it is told not to.
KEEPING = ("hat", "steps_of_daff", "steps_of_irffn", "tasks_of_irffn", "tasks_of_daff")


@pytest.mark.parametrize("precision", [FP32, BF16], ids=str)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_every_gradient_keeps_the_numerics_rule(case, precision):
    call = case.call(precision)
    assert backward_operators(call, "cpu") == NATIVE
    check(run(call, "cpu"), *reference_results(call), case.vanishing)


@pytest.mark.parametrize("precision", [FP32, BF16], ids=str)
@pytest.mark.parametrize("case", [case for case in LARGE if case.name in KEEPING], ids=str)
def test_recomputed_gradients_keep_it_as_well(case, precision):
    call = case.call(precision)
    with use_recompute(True):
        assert backward_operators(call, "cpu") == NATIVE
        check(run(call, "cpu"), *reference_results(call), case.vanishing)


@pytest.mark.parametrize("precision", [FP32, BF16], ids=str)
@pytest.mark.parametrize("name", ["steps_of_irffn", "tasks_of_irffn", "tasks_of_daff"])
def test_threads_decide_nothing(name, precision):
    (case,) = (case for case in LARGE if case.name == name)
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3, 8, 2):
            torch.set_num_threads(number)
            found.append(run(case.call(precision), "cpu").gradients)
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(gradient, other[name]) for name, gradient in found[0].items() if gradient is not None)


def test_what_a_forward_kept_is_checked():
    (case,) = (case for case in LARGE if case.name == "steps_of_daff")
    tensors, static = raw_call(case.call())
    ops = torch.ops.fastvit
    statistics, kept, branch = ops.depthwise_mlp_statistics.default(tensors, *static, True)
    hidden, out = tensors[4].shape[0], tensors[16].shape[0]
    for first, mean, variance in zip(
        (6, 12, 18), *(row.split([hidden, hidden, out]) for row in statistics), strict=True
    ):
        tensors[first + 2], tensors[first + 3] = mean.clone(), variance.clone()
    outputs = ops.depthwise_mlp_finish.default(tensors, branch, *static)
    whole = ops.depthwise_mlp.default(tensors, None, *static)
    torch.testing.assert_close(outputs, whole)
    grads = [torch.ones_like(output) for output in outputs]
    needs = [t is not None and index not in (8, 9, 14, 15, 20, 21) for index, t in enumerate(tensors)]
    found = ops.depthwise_mlp_backward.native([*grads, kept, branch], tensors, needs, *static)
    again = ops.depthwise_mlp_backward.native(grads, tensors, needs, *static)
    assert [t.shape for t in found] == [t.shape for t in again]
    for wrong in (kept[:, :-1].contiguous(), kept.double(), kept.bfloat16(), kept.mT, kept.to("meta")):
        _raises([*grads, wrong, branch], tensors, needs, static)
    for wrong in (branch[:, 1:].contiguous(), branch.bfloat16(), branch.to("meta")):
        _raises([*grads, kept, wrong], tensors, needs, static)
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            ops.depthwise_mlp_finish.default(tensors, wrong, *static)
    _raises([*grads, kept], tensors, needs, static)
    without = [None if index in range(18, 22) else t for index, t in enumerate(tensors)]
    assert [t.numel() for t in ops.depthwise_mlp_statistics.default(without, *static, True)[1:]] == [0, 0]
    with pytest.raises(RuntimeError, match="branch"):
        ops.depthwise_mlp_finish.default(without, branch, *static)


def _backward_call():
    tensors, static = raw_call(inputs.tagged(inputs.DEPTHWISE_MLP, "smallest")[0].call())
    outputs = torch.ops.fastvit.depthwise_mlp.default(tensors, None, *static)
    return [torch.ones_like(output) for output in outputs], tensors, [t is not None for t in tensors], static


def _raises(grads, tensors, needs, static):
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        torch.ops.fastvit.depthwise_mlp_backward.native(grads, tensors, needs, *static)


def test_hostile_calls_of_the_backward_are_refused():
    grads, tensors, needs, static = _backward_call()
    for wrong in (
        grads[0].double(),
        grads[0][:, :-1].contiguous(),
        grads[0].mT,
        grads[0].to("meta"),
        grads[0].bfloat16(),
    ):
        _raises([wrong, grads[1]], tensors, needs, static)
    _raises(grads[:1], tensors, needs, static)
    _raises(grads, tensors, needs[:-1], static)
    absent = next(index for index, need in enumerate(needs) if not need)
    _raises(grads, tensors, [True if index == absent else need for index, need in enumerate(needs)], static)
    _raises(grads, tensors, needs, static._replace(height=2**62))
    for index, tensor in enumerate(tensors):
        if tensor is not None:
            for wrong in (tensor.double(), tensor.to("meta"), tensor[..., :0]):
                _raises(grads, [*tensors[:index], wrong, *tensors[index + 1 :]], needs, static)
