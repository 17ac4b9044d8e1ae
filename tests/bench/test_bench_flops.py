"""Counts against hand calculation, against torch's counter and against the published figures."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fastvit_kernels.bench import flops
from fastvit_kernels.bench.suites import SUITES, cvt
from fastvit_kernels.models import create_model


def test_conv_projection_by_hand() -> None:
    # 4 x 6 map and 1 class token, 8 channels, batch 2; k and v live on a 2 x 3 map.
    depthwise = 2 * 8 * 9 * (24 + 6 + 6)
    linear = 2 * 8 * 8 * (25 + 7 + 7)
    cost = flops.conv_projection(2, 8, (4, 6), num_prefix_tokens=1)
    assert cost.macs == depthwise + linear
    assert cost.weights == 2 * 8 + 3 * (9 * 8 + 4 * 8 + 8 * 8 + 8)
    assert cost.activations == 2 * 8 * (25 + 25 + 7 + 7)


def test_global_attention_by_hand() -> None:
    cost = flops.global_attention(2, 5, 3, 8)
    assert cost.macs == 2 * (5 * 3 * 8 + 5 * 3 * 8 + 5 * 8 * 8)
    assert cost.weights == 8 * 8 + 8
    # q, k, v, residual in; one result out.
    assert cost.activations == 2 * 8 * (5 + 3 + 3 + 5 + 5)


def test_pointwise_mlp_by_hand() -> None:
    cost = flops.pointwise_mlp(10, 8, 32)
    assert cost.macs == 10 * 8 * 32 + 10 * 32 * 8
    assert cost.weights == 8 + 8 + 8 * 32 + 32 + 32 * 8 + 8
    assert cost.activations == 10 * 8 * 2


def test_patch_embedding_by_hand() -> None:
    # 3 x 10 x 7 image; a 3 x 3 filter at stride 2 makes a 5 x 4 map.
    cost = flops.patch_embedding(2, 3, 8, (10, 7), kernel=3, stride=2, padding=1)
    assert cost.macs == 2 * 20 * 8 * 27
    assert cost.weights == 8 * 27 + 8 + 2 * 8
    assert cost.activations == 2 * (70 * 3 + 20 * 8)


def test_bytes_follow_the_dtype() -> None:
    cost = flops.Cost(macs=7, weights=30, activations=12)
    assert (cost.flops, cost.nbytes(4), cost.nbytes(2)) == (14, 168, 84)


@pytest.mark.parametrize(
    ("name", "size", "giga"),
    [
        ("cvt_13", 224, 4.566),
        ("cvt_13", 384, 16.269),
        ("cvt_21", 224, 7.178),
        ("cvt_21", 384, 24.849),
        ("cvt_w24", 384, 194.222),
    ],
)
def test_published_models(name: str, size: int, giga: float) -> None:
    assert round(cvt.case(name, 1, size).cost.macs / 1e9, 3) == giga


def _counted(module: nn.Module, *inputs: torch.Tensor) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("size", [224, 190])
def test_model_equals_torch_counter(size: int) -> None:
    model = create_model("cvt_13", backend="reference").eval()
    assert cvt.case("cvt_13", 1, size).cost.macs == _counted(model, torch.randn(1, 3, size, size))


@pytest.mark.parametrize("name", ["hat_net_tiny", "hat_net_medium"])
def test_hat_net_equals_torch_counter(name: str) -> None:
    (case,) = SUITES[name](2)
    assert case.cost.macs == _counted(case.build().eval(), *case.make_inputs())


@pytest.mark.parametrize("name", ["cvt_13", "cvt_21"])
def test_model_reads_every_weight_once(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
    state = [t for t in model.state_dict().values() if t.is_floating_point()]
    cost = cvt.case(name, 2).cost
    assert cost.weights == sum(t.numel() for t in state)
    assert cost.activations == 2 * (3 * 224 * 224 + 1000)


# How many shapes each suite has: CvT's nine stages, or the different ones of the HAT-Nets.
SHAPES = {
    "patch_embedding": 9,
    "conv_projection": 9,
    "global_attention": 9,
    "pointwise_mlp": 9,
    "local_attention": 9,
    "query_attention": 6,
}


@pytest.mark.parametrize("suite", SHAPES)
def test_operator_cases_equal_torch_counter(suite: str) -> None:
    cases = SUITES[suite](2)
    assert len(cases) == SHAPES[suite]
    for case in cases:
        with FakeTensorMode():
            module, inputs = case.build().eval(), case.make_inputs()
            assert _counted(module, *inputs) == case.cost.macs
            outputs = module(*inputs)
        weights = [t for t in module.state_dict().values() if t.is_floating_point()]
        assert sum(t.numel() for t in weights) == case.cost.weights
        results = [outputs] if isinstance(outputs, torch.Tensor) else outputs
        assert sum(t.numel() for t in (*inputs, *results)) == case.cost.activations


def test_long_keys_are_measured() -> None:
    shapes = {tuple(x.shape) for case in SUITES["global_attention"](1)[:1] for x in case.make_inputs()}
    assert shapes == {(1, 3136, 64), (1, 784, 64)}
