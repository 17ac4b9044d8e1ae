"""transformers' PvtV2 on fused operators: the same numbers in every mode, its own code where that is impossible."""

from __future__ import annotations

import copy

import pytest
import torch
from host_parity import (
    TOLERANCE,
    accelerated,
    assert_autocast_errs_no_more,
    assert_drops_the_same,
    assert_embeddings_fuse,
    assert_repeats,
    assert_reversible,
    assert_same,
    assert_same_step,
    blocks,
    calls_in,
    image,
    logits,
    operator_calls,
    planted,
    randomize,
)
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import PvtV2Backbone, PvtV2Config, PvtV2ForImageClassification

import fastvit_kernels
from fastvit_kernels import ops
from fastvit_kernels.testing import relative_l2

LAYERS = ["pvt_v2.encoder.layers.0.blocks.0", "pvt_v2.encoder.layers.0.blocks.1", "pvt_v2.encoder.layers.1.blocks.0"]
OPERATORS = ["patch_embedding", "global_attention", "depthwise_mlp"]
WEIGHTS_WANTED = "attention: its weights are asked for, which the fused operator never holds"


def configuration(**options):
    """Two layers with keys reduced by 3 on 8 x 8 pixels, one with all keys on 4 x 4."""
    small = {"num_encoder_blocks": 2, "depths": [2, 1], "hidden_sizes": [16, 32], "num_attention_heads": [1, 2]}
    small |= {
        "sr_ratios": [3, 1],
        "mlp_ratios": [2, 3],
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "drop_path_rate": 0.0,
    }
    return PvtV2Config(**{**small, "num_labels": 7, **options})


def make(**options):
    torch.manual_seed(0)
    return randomize(PvtV2ForImageClassification(configuration(**options)))


@pytest.mark.parametrize(
    "options",
    [{}, {"linear_attention": True}, {"qkv_bias": False}, {"hidden_act": "quick_gelu"}],
    ids=["reduced", "linear", "no_bias", "quick_gelu"],
)
@pytest.mark.parametrize("inference", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_same_numbers(dtype, inference, options):
    stock = make(**options).to(dtype)
    fused, report = accelerated(stock, inference)
    assert blocks(report) == LAYERS and not report.left_alone
    assert_same(stock, fused, image(2, 3, 32, 32, dtype=dtype), image(1, 3, 45, 31, dtype=dtype))


def test_every_layer_runs_its_operators():
    fused, report = accelerated(make())
    assert {entry.before for entry in report.replaced} == {"PvtV2BlockLayer", "PvtV2OverlapPatchEmbeddings"}
    assert operator_calls(fused, image(1, 3, 32, 32, dtype=torch.float32)) == dict.fromkeys(LAYERS, OPERATORS)


def test_embeddings():
    paths = [f"pvt_v2.encoder.layers.{index}.patch_embedding" for index in (0, 1)]
    assert_embeddings_fuse(make(), image(1, 3, 32, 32, dtype=torch.float32), paths)


@pytest.mark.parametrize("linear", [False, True])
def test_training_step(linear):
    stock = make(linear_attention=linear).double().train()
    fused, _ = accelerated(stock)
    assert_same_step(stock, fused, image(2, 3, 32, 32))


@pytest.mark.parametrize("rate", ["hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"])
def test_dropouts_draw_the_same_numbers(rate):
    assert_drops_the_same(lambda: make(**{rate: 0.4}), image(4, 3, 32, 32))


def test_dropouts_run_a_half_unfused_in_training_only():
    model = make(attention_probs_dropout_prob=0.3)
    assert blocks(fastvit_kernels.accelerate(model)) == LAYERS
    x = image(1, 3, 32, 32, dtype=torch.float32)
    assert operator_calls(model, x) == dict.fromkeys(LAYERS, OPERATORS)
    explanation = fastvit_kernels.explain(model.train(), x)
    assert calls_in(explanation) == dict.fromkeys(LAYERS, ["depthwise_mlp"])
    assert {remark.reasons for remark in explanation.unfused} == {("attention: attention dropout is active",)}


@pytest.mark.parametrize("inference", [False, True])
def test_a_call_for_attention_weights_runs_the_attention_unfused(inference):
    stock = make().double()
    fused, _ = accelerated(stock, inference)
    x = image(2, 3, 45, 31)
    with torch.no_grad():
        assert_same(stock, fused, x)
        expected, found = (model(x, output_attentions=True, output_hidden_states=True) for model in (stock, fused))
    # Attention weights of each layer, by stages.
    assert len(tree_leaves(found.attentions)) == 3
    for a, b in zip(tree_leaves(found.to_tuple()), tree_leaves(expected.to_tuple()), strict=True):
        assert a.shape == b.shape and relative_l2(a, b) <= TOLERANCE[x.dtype]
    explanation = fastvit_kernels.explain(fused, x, output_attentions=True)
    assert [remark.reasons for remark in explanation.unfused] == [(WEIGHTS_WANTED,)] * 3
    assert calls_in(explanation) == dict.fromkeys(LAYERS, ["depthwise_mlp"])
    # That was this one call's.
    assert not fastvit_kernels.explain(fused, x).unfused


# transformers has one epsilon for all norms, 1e-6.
MISTAKES = {
    "query_norm_eps": ("global_attention", {"norm_eps": 1e-5}),
    "reduction_norm_eps": ("patch_embedding", {"norm_eps": 1e-5}),
    "reduction_input_norm_eps": ("patch_embedding", {"in_norm_eps": 1e-5}),
    "mlp_norm_eps": ("depthwise_mlp", {"norm_eps": 1e-5}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_single_mistake_shows(monkeypatch, mistake):
    stock = make().double()
    fused, _ = accelerated(stock)
    function, arguments = MISTAKES[mistake]
    x = image(1, 3, 32, 32)
    with torch.no_grad(), planted(monkeypatch, ops, function, **arguments):
        assert relative_l2(logits(fused, x), logits(stock, x)) > 10 * TOLERANCE[x.dtype]


def test_a_backbone():
    torch.manual_seed(0)
    stock = randomize(PvtV2Backbone(configuration(out_features=["stage1", "stage2"])))
    fused, report = accelerated(stock, inference=True)
    assert len(blocks(report)) == 3
    x = image(1, 3, 32, 32, dtype=torch.float32)
    with torch.no_grad():
        for a, b in zip(fused(x).feature_maps, stock(x).feature_maps, strict=True):
            assert a.shape == b.shape and relative_l2(a, b) <= TOLERANCE[x.dtype]


@pytest.mark.parametrize("linear", [False, True])
def test_autocast(linear):
    assert_autocast_errs_no_more(make(linear_attention=linear), image(2, 3, 45, 31, dtype=torch.float32))


def test_reversible():
    assert_reversible(make(), image(1, 3, 32, 32, dtype=torch.float32))


def test_calls_are_repeated():
    assert_repeats(make(), image(1, 3, 32, 32, dtype=torch.float32))


def test_gradient_checkpointing():
    stock = make(drop_path_rate=0.3).double().train()
    fused, _ = accelerated(stock)
    fused.gradient_checkpointing_enable()
    assert_same_step(stock, fused, image(4, 3, 32, 32))


def hook_on_a_linear(layer):
    layer.attention.key.register_forward_hook(lambda module, args, output: 2 * output)


def hook_on_the_filter(layer):
    layer.mlp.dwconv.register_forward_hook(lambda module, args, output: 2 * output)


def hook_on_an_identity(layer):
    layer.mlp.relu.register_forward_hook(lambda module, args, output: 2 * output)


def tanh_gelu(layer):
    layer.mlp.intermediate_act_fn = nn.GELU("tanh")


def another_norm(layer):
    layer.layer_norm_1 = nn.RMSNorm(16)


OBSTACLES = {
    hook_on_a_linear: "the keys' and values' linear has hooks",
    hook_on_the_filter: "mlp.dwconv has hooks",
    hook_on_an_identity: "mlp.relu has hooks",
    tanh_gelu: "the activation is GELU(approximate='tanh')",
    another_norm: "the layer norm is a RMSNorm",
}


@pytest.mark.parametrize("change", OBSTACLES, ids=lambda change: change.__name__)
def test_obstacles_are_reported_and_noticed_later(change):
    stock = make()
    later, _ = accelerated(stock, inference=True)
    for model in (stock, later):
        change(model.get_submodule(LAYERS[1]))
    x = image(1, 3, 32, 32, dtype=torch.float32)
    now, report = accelerated(stock)
    (entry,) = report.left_alone
    (remark,) = fastvit_kernels.explain(later, x).unfused
    for path, reasons in ((entry.path, entry.reasons), (remark.path, remark.reasons)):
        assert path == LAYERS[1] and any(OBSTACLES[change] in reason for reason in reasons), reasons
    assert_same(stock, now, x)
    assert_same(stock, later, x)


def test_compiled():
    stock = make()
    fused, _ = accelerated(stock, inference=True)
    x = image(1, 3, 32, 32, dtype=torch.float32)
    with torch.no_grad():
        compiled = torch.compile(copy.deepcopy(fused), fullgraph=True, backend="eager")
        assert relative_l2(compiled(x).logits, stock(x).logits) <= 1e-5
