"""transformers' Segformer on fused operators, in the layouts of transformers 5 (installed) and 4 (a stand-in)."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest
import segformer_4
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
from transformers import SegformerConfig, SegformerForImageClassification, SegformerForSemanticSegmentation

import fastvit_kernels
from fastvit_kernels import ops
from fastvit_kernels.testing import relative_l2

LAYERS = ["segformer.stages.0.blocks.0", "segformer.stages.0.blocks.1", "segformer.stages.1.blocks.0"]
OPERATORS = ["patch_embedding", "global_attention", "depthwise_mlp"]
WEIGHTS_WANTED = "attention: its weights are asked for, which the fused operator never holds"
ADAPTER = "fastvit_kernels.integrations.transformers_segformer"


def make(cls=SegformerForImageClassification, **options):
    """Two layers with keys reduced by 3 on 8 x 8 pixels, one with all keys on 4 x 4."""
    small = {"num_encoder_blocks": 2, "depths": [2, 1], "hidden_sizes": [16, 32], "num_attention_heads": [1, 2]}
    small |= {
        "sr_ratios": [3, 1],
        "mlp_ratios": [2, 3],
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "drop_path_rate": 0.0,
    }
    small |= {"hidden_dropout_prob": 0.0, "classifier_dropout_prob": 0.0, "decoder_hidden_size": 16, "num_labels": 7}
    torch.manual_seed(0)
    return randomize(cls(SegformerConfig(**{**small, **options})))


@pytest.fixture
def transformers_4(monkeypatch):
    """transformers' module holds the classes of the stand-in, and the integration is imported for it."""
    host = ModuleType(segformer_4.HOST)
    for cls in segformer_4.CLASSES:
        setattr(host, cls.__name__, cls)
    monkeypatch.setattr(importlib.import_module("transformers.models.segformer"), "modeling_segformer", host)
    monkeypatch.setitem(sys.modules, segformer_4.HOST, host)
    monkeypatch.delitem(sys.modules, ADAPTER, raising=False)
    yield
    sys.modules.pop(ADAPTER, None)


def make_4(**options):
    torch.manual_seed(0)
    return randomize(segformer_4.Model(**options))


@pytest.mark.parametrize("inference", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_same_numbers(dtype, inference):
    stock = make().to(dtype)
    fused, report = accelerated(stock, inference)
    assert blocks(report) == LAYERS and not report.left_alone
    assert_same(stock, fused, image(2, 3, 32, 32, dtype=dtype), image(1, 3, 45, 31, dtype=dtype))


def test_eager_attention():
    """In fp32: its softmax is fp32 whatever the dtype, the fused attention's is not."""
    stock = make()
    stock.set_attn_implementation("eager")
    fused, report = accelerated(stock)
    assert blocks(report) == LAYERS
    assert_same(stock, fused, image(1, 3, 45, 31, dtype=torch.float32))


@pytest.mark.parametrize("inference", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_same_numbers_in_the_layout_of_4(transformers_4, dtype, inference):
    stock = make_4().to(dtype)
    fused, report = accelerated(stock, inference)
    assert [entry.path for entry in report.replaced] == ["block.0", "block.1"] and not report.left_alone
    assert {entry.before for entry in report.replaced} == {"SegformerLayer"}
    assert_same(stock, fused, image(2, 3, 32, 32, dtype=dtype), image(1, 3, 45, 31, dtype=dtype))
    calls = operator_calls(fused, image(1, 3, 32, 32, dtype=dtype))
    assert list(calls) == ["block.0", "block.1"] and all(found[-2:] == OPERATORS[1:] for found in calls.values())


def test_every_layer_runs_its_operators():
    fused, _ = accelerated(make())
    assert operator_calls(fused, image(1, 3, 32, 32, dtype=torch.float32)) == dict.fromkeys(LAYERS, OPERATORS)


def test_embeddings():
    paths = [f"segformer.stages.{index}.patch_embeddings" for index in (0, 1)]
    assert_embeddings_fuse(make(), image(1, 3, 32, 32, dtype=torch.float32), paths)


def test_training_step():
    stock = make().double().train()
    fused, _ = accelerated(stock)
    assert_same_step(stock, fused, image(2, 3, 32, 32))


def test_training_step_in_the_layout_of_4(transformers_4):
    stock = make_4().double().train()
    fused, _ = accelerated(stock)
    assert_same_step(stock, fused, image(2, 3, 32, 32))


@pytest.mark.parametrize("rate", ["hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"])
def test_dropouts_draw_the_same_numbers(rate):
    assert_drops_the_same(lambda: make(**{rate: 0.4}), image(4, 3, 32, 32))


@pytest.mark.parametrize("rate", ["dropout", "attention_dropout", "drop_path"])
def test_dropouts_draw_the_same_numbers_in_the_layout_of_4(transformers_4, rate):
    assert_drops_the_same(lambda: make_4(**{rate: 0.4}), image(4, 3, 32, 32))


def test_attention_dropout_runs_the_attention_unfused_in_training_only():
    model = make(attention_probs_dropout_prob=0.3)
    report = fastvit_kernels.accelerate(model)
    assert blocks(report) == LAYERS and not any(entry.remarks for entry in report.replaced)
    x = image(1, 3, 32, 32, dtype=torch.float32)
    assert operator_calls(model, x) == dict.fromkeys(LAYERS, OPERATORS)
    explanation = fastvit_kernels.explain(model.train(), x)
    assert calls_in(explanation) == dict.fromkeys(LAYERS, ["depthwise_mlp"])
    assert {remark.reasons for remark in explanation.unfused} == {("attention: attention dropout is active",)}


@pytest.mark.parametrize("inference", [False, True])
def test_a_call_for_attention_weights_runs_the_attention_unfused(inference):
    stock = make()
    stock.set_attn_implementation("eager")
    fused, _ = accelerated(stock, inference)
    x = image(2, 3, 45, 31, dtype=torch.float32)
    with torch.no_grad():
        assert_same(stock, fused, x)
        expected, found = (model(x, output_attentions=True, output_hidden_states=True) for model in (stock, fused))
    assert len(found.attentions) == 3
    for a, b in zip(tree_leaves(found.to_tuple()), tree_leaves(expected.to_tuple()), strict=True):
        assert a.shape == b.shape and relative_l2(a, b) <= TOLERANCE[x.dtype]
    explanation = fastvit_kernels.explain(fused, x, output_attentions=True)
    assert [remark.reasons for remark in explanation.unfused] == [(WEIGHTS_WANTED,)] * 3
    assert calls_in(explanation) == dict.fromkeys(LAYERS, ["depthwise_mlp"])
    # That was this one call's, though transformers leaves its hooks where they are.
    assert fused.get_submodule(LAYERS[0]).attention._forward_hooks
    explanation = fastvit_kernels.explain(fused, x)
    assert not explanation.unfused
    assert {path: calls[-2:] for path, calls in calls_in(explanation).items()} == dict.fromkeys(LAYERS, OPERATORS[-2:])
    assert not fastvit_kernels.accelerate(fused, inference=inference)


def test_attention_weights_asked_for_by_the_configuration():
    stock = make()
    stock.set_attn_implementation("eager")
    stock.config.output_attentions = True
    fused, _ = accelerated(stock)
    x = image(1, 3, 32, 32, dtype=torch.float32)
    with torch.no_grad():
        expected, found = stock(x).attentions, fused(x).attentions
    assert len(found) == 3
    for a, b in zip(found, expected, strict=True):
        assert relative_l2(a, b) <= TOLERANCE[x.dtype]
    assert [remark.reasons for remark in fastvit_kernels.explain(fused, x).unfused] == [(WEIGHTS_WANTED,)] * 3


def test_attention_weights_in_the_layout_of_4(transformers_4):
    stock = make_4().double()
    fused, _ = accelerated(stock, inference=True)
    x = image(2, 3, 45, 31)
    with torch.no_grad():
        expected, found = (tree_leaves(model(x, output_attentions=True)) for model in (stock, fused))
    assert len(found) == 3
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and relative_l2(a, b) <= TOLERANCE[x.dtype]
    explanation = fastvit_kernels.explain(fused, x, output_attentions=True)
    assert [remark.reasons for remark in explanation.unfused] == [(WEIGHTS_WANTED,)] * 2
    assert not fastvit_kernels.explain(fused, x).unfused


def test_an_attention_mask_runs_the_attention_unfused():
    stock = make().double()
    fused, _ = accelerated(stock)
    stock, fused = stock.get_submodule(LAYERS[2]), fused.get_submodule(LAYERS[2])
    x, mask = image(1, 16, 32), image(1, 1, 16, 16, seed=2)
    with torch.no_grad():
        expected = stock(x, 4, 4, attention_mask=mask)
        assert relative_l2(expected, stock(x, 4, 4)) > 1e-3
        assert relative_l2(fused(x, 4, 4, attention_mask=mask), expected) <= TOLERANCE[x.dtype]
    (remark,) = fastvit_kernels.explain(fused, x, 4, 4, attention_mask=mask).unfused
    assert remark.reasons == ("attention: it is called with attention_mask",)


def test_what_a_trainer_says_about_the_loss_does_not_concern_a_layer():
    model = make()
    fastvit_kernels.accelerate(model)
    x, labels = image(1, 3, 32, 32, dtype=torch.float32), torch.tensor([3])
    assert not fastvit_kernels.explain(model, x, labels=labels, num_items_in_batch=1).unfused


def test_segmentation_which_always_records_its_features():
    stock = make(SegformerForSemanticSegmentation).double()
    fused, _ = accelerated(stock)
    assert_same(stock, fused, image(2, 3, 64, 32))
    assert operator_calls(fused, image(1, 3, 32, 32)) == dict.fromkeys(LAYERS, OPERATORS)


# transformers' norms have PyTorch's epsilon, 1e-5, all of them.
MISTAKES = {
    "query_norm_eps": ("global_attention", {"norm_eps": 1e-6}),
    "reduction_norm_eps": ("patch_embedding", {"norm_eps": 1e-6}),
    "reduction_input_norm_eps": ("patch_embedding", {"in_norm_eps": 1e-6}),
    "mlp_norm_eps": ("depthwise_mlp", {"norm_eps": 1e-6}),
    "scale": ("global_attention", {"scale": 16**-0.5 * 1.001}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_single_mistake_shows(monkeypatch, mistake):
    stock = make().double()
    fused, _ = accelerated(stock)
    function, arguments = MISTAKES[mistake]
    x = image(1, 3, 32, 32)
    with torch.no_grad(), planted(monkeypatch, ops, function, **arguments):
        assert relative_l2(logits(fused, x), logits(stock, x)) > 10 * TOLERANCE[x.dtype]


def test_autocast():
    assert_autocast_errs_no_more(make(), image(2, 3, 45, 31, dtype=torch.float32))


def test_reversible():
    assert_reversible(make(), image(1, 3, 32, 32, dtype=torch.float32))


def test_reversible_in_the_layout_of_4(transformers_4):
    assert_reversible(make_4(), image(1, 3, 32, 32, dtype=torch.float32))


def test_calls_are_repeated():
    assert_repeats(make(), image(1, 3, 32, 32, dtype=torch.float32))


def test_calls_are_repeated_in_the_layout_of_4(transformers_4):
    assert_repeats(make_4(), image(1, 3, 32, 32, dtype=torch.float32))


def test_gradient_checkpointing():
    stock = make(drop_path_rate=0.3).double().train()
    fused, _ = accelerated(stock)
    fused.gradient_checkpointing_enable()
    assert_same_step(stock, fused, image(4, 3, 32, 32))


def hook_on_the_attention(layer):
    layer.attention.register_forward_hook(lambda module, args, output: (2 * output[0], *output[1:]))


def hook_on_the_reduction(layer):
    layer.attention.sequence_reduction.register_forward_hook(lambda module, args, output: 2 * output)


def hook_on_the_filter(layer):
    layer.mlp.dwconv.register_forward_hook(lambda module, args, output: 2 * output)


def tanh_gelu(layer):
    layer.mlp.activation_fn = nn.GELU("tanh")


def another_norm(layer):
    layer.layernorm_before = nn.RMSNorm(16)


OBSTACLES = {
    hook_on_the_attention: "attention has hooks",
    hook_on_the_reduction: "attention.sequence_reduction has hooks",
    hook_on_the_filter: "mlp.dwconv has hooks",
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


def test_another_attention_implementation_is_left_alone():
    model = make()
    model.config._attn_implementation = "paged_attention_of_somebody"
    report = fastvit_kernels.accelerate(model)
    assert not blocks(report) and "known are 'eager' and 'sdpa'" in str(report)


def test_compiled():
    stock = make()
    fused, _ = accelerated(stock, inference=True)
    x = image(1, 3, 32, 32, dtype=torch.float32)
    with torch.no_grad():
        compiled = torch.compile(fused, fullgraph=True, backend="eager")
        assert relative_l2(compiled(x).logits, stock(x).logits) <= 1e-5
