"""Counts against hand calculation, against torch's counter and against the published figures."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fastvit_kernels.bench import flops, plain_cmt, plain_dhvt, plain_pvt_v2
from fastvit_kernels.bench.suites import SUITES, cmt, cvt, dhvt, pvt_v2
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


# Multiply-adds of one image, in units of 10^9, as published or counted from the papers' equations.
@pytest.mark.parametrize(
    ("name", "giga"),
    [
        ("cmt_s", 4.032),
        ("dhvt_small_imagenet_patch16", 5.033),
        ("pvt_v2_b2", 4.027),
        ("pvt_v2_b2_li", 3.889),
        ("pvt_v2_b5", 11.717),
        ("mit_b0", 0.452),
    ],
)
def test_published_figures_of_counted_models(name: str, giga: float) -> None:
    (case,) = SUITES[name](2)
    assert round(case.cost.macs / 2e9, 3) == giga
    assert case.cost.activations == 2 * (3 * 224 * 224 + 1000)


@pytest.mark.parametrize("name", [*cmt.MODELS, *dhvt.MODELS, *pvt_v2.MODELS])
def test_counted_models_have_the_weights_of_ours(name: str) -> None:
    (case,) = SUITES[name](1)
    with torch.device("meta"):
        plain = case.build()
        sizes = {**plain_cmt.VARIANTS, **plain_dhvt.VARIANTS, **plain_pvt_v2.VARIANTS}[name]
        model = create_model(name, sizes.get("num_classes", 1000))
    assert _shapes(plain) == _shapes(model)
    state = model.state_dict().values()
    assert case.cost.weights == sum(t.numel() for t in state if t.is_floating_point())


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def test_shapes_are_listed_once_under_their_first_name() -> None:
    names = {suite: [case.name for case in SUITES[suite](1)] for suite in SHAPES}
    assert all(len(set(found)) == len(found) for found in names.values())
    assert names["head_tokens"][0] == "dhvt_small_imagenet_patch16"
    assert {"cmt_ti-stage1", "pvt_v2_b2-stage1", "mit_b0-stage1", "pvt_v2_b2_li-stage1"} <= set(names["depthwise_mlp"])
    # CMT-Ti's and CMT-XS's odd widths; PVTv2-B1's stages are PVTv2-B2's.
    hidden = {case.name: case.build().fc1.out_features for case in SUITES["depthwise_mlp"](1) if "cmt" in case.name}
    assert [hidden[f"cmt_ti-stage{index}"] for index in (1, 2, 3, 4)] == [165, 331, 662, 1324]
    assert "pvt_v2_b1-stage1" not in names["depthwise_mlp"]


def test_segformers_floor_is_that_of_the_exchanged_head() -> None:
    model = create_model("segformer_b0", 150, backend="reference").eval()
    counted = flops.macs(model, torch.zeros(1, 3, 64, 64))
    # The products of the head's matrices do not depend on the image.
    products = 256 * 256 * (32 + 64 + 160 + 256)
    assert pvt_v2.case("segformer_b0", 1, 64).cost.macs == counted - products


@pytest.mark.parametrize(
    ("name", "hidden", "kernel"),
    [("hat_net_small-stage1", 512, 3), ("hat_net_medium-stage3", 1280, 5), ("cmt_s-stage2", 512, 3)],
)
def test_depthwise_mlp_by_hand(name: str, hidden: int, kernel: int) -> None:
    (case,) = (case for case in SUITES["depthwise_mlp"](2) if case.name == name)
    pixels, channels = {"stage1": (56 * 56, 64), "stage2": (28 * 28, 128), "stage3": (14 * 14, 320)}[name[-6:]]
    assert case.cost.macs == 2 * pixels * hidden * (2 * channels + kernel**2)
    assert case.cost.activations == 2 * 2 * pixels * channels


def test_prefix_rows_are_moved_and_not_multiplied() -> None:
    (case,) = (case for case in SUITES["depthwise_mlp"](2) if case.name == "dhvt_small_imagenet_patch16")
    assert case.cost.macs == 2 * 196 * 1536 * (2 * 384 + 9)
    # Tokens in and out, and the mean of each channel.
    assert case.cost.activations == 2 * 384 * (197 + 197 + 1)


def test_query_attention_by_hand() -> None:
    costs = {case.name: case.cost for case in SUITES["query_attention"](2)}
    assert costs["hat_net_small-stage2"] == flops.query_attention(2, 28 * 28, 49, 128)
    table = 4 * 196 * 49
    cmt = flops.query_attention(2, 14 * 14, 49, 256)
    assert costs["cmt_s-stage3"] == cmt + flops.Cost(0, table, 0)
    # 196 patches, the class token and six heads; neither norm nor residual.
    dhvt = flops.query_attention(2, 203, 203, 384)
    assert costs["dhvt_small_imagenet_patch16"] == dhvt + flops.Cost(0, -2 * 384, -2 * 203 * 384)


def test_reduction_of_keys_by_hand() -> None:
    (case,) = (case for case in SUITES["patch_embedding"](2) if case.name == "pvt_v2_b2-stage2-keys")
    expected = flops.patch_embedding(2, 128, 128, (28, 28), kernel=4, stride=4, padding=0)
    assert case.cost == expected + flops.Cost(0, 2 * 128, 0)


def test_depthwise_conv_by_hand() -> None:
    cases = {case.name: case for case in SUITES["depthwise_conv"](2)}
    assert cases["cmt_s-stage1"].cost == flops.Cost(2 * 56**2 * 64 * 9, 64 * 10, 2 * 2 * 56**2 * 64)
    # One multiply-add per pixel and channel; filter, bias, and the parameters of both norms.
    keys = flops.Cost(2 * 28**2 * 128, 128 * (16 + 1 + 2 + 4), 2 * (28**2 + 7**2) * 128)
    assert cases["cmt_s-stage2-keys"].cost == keys


def test_pooled_projection_by_hand() -> None:
    costs = {case.name: case.cost for case in SUITES["pooled_projection"](2)}
    weights = 4 * 128 + 256 * 129
    assert costs["hat_net_small-stage2"] == flops.Cost(2 * 49 * 128 * 256, weights, 2 * (28**2 * 128 + 49 * 256))


def test_head_tokens_by_hand() -> None:
    costs = {case.name: case.cost for case in SUITES["head_tokens"](2)}
    weights = 2 * 384 + 384 * 65 + 2 * 64 + 6 * 384
    activations = 2 * (197 + 203) * 384
    assert costs["dhvt_small_imagenet_patch16"] == flops.Cost(2 * 6 * 64 * 384, weights, activations)


# How many different shapes each suite has: CvT's, the HAT-Nets', the CMTs', the DHVTs', the pyramids', those of other
# libraries' models.
SHAPES = {
    "patch_embedding": 9 + 4 * 4 + 4 * (4 + 3) + 4,
    "conv_projection": 9,
    "global_attention": 9,
    "pointwise_mlp": 9,
    "local_attention": 9 + 4 + 4,
    "query_attention": 6 + 4 * 4 + 7 + 4 * 4 + 4,
    "depthwise_conv": 4 * (4 + 3),
    "depthwise_mlp": 9 + 2 + 4 * 4 + 6 + 2 * 4 + 2 + 2 + 4 + 2 * 4 + 21,
    "pooled_projection": 6,
    "head_tokens": 7,
}


@pytest.mark.parametrize("suite", SHAPES)
def test_operator_cases_equal_torch_counter(suite: str) -> None:
    cases = SUITES[suite](2)
    assert len(cases) == SHAPES[suite]
    for case in cases:
        cost = case.cost
        with FakeTensorMode():
            module, inputs = case.build().eval(), case.make_inputs()
            assert _counted(module, *inputs) == cost.macs
            outputs = module(*inputs)
        weights = [t for t in module.state_dict().values() if t.is_floating_point()]
        assert sum(t.numel() for t in weights) == cost.weights
        results = [outputs] if isinstance(outputs, torch.Tensor) else outputs
        assert sum(t.numel() for t in (*inputs, *results)) == cost.activations


def test_long_keys_are_measured() -> None:
    shapes = {tuple(x.shape) for case in SUITES["global_attention"](1)[:1] for x in case.make_inputs()}
    assert shapes == {(1, 3136, 64), (1, 784, 64)}
