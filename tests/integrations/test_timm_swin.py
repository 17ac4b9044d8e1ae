"""timm's Swin: its unshifted blocks on fused operators, the shifted ones as they are."""

from __future__ import annotations

import copy
import importlib
import pickle

import pytest
import torch
from host_parity import (
    TOLERANCE,
    accelerated,
    assert_autocast_errs_no_more,
    assert_drops_the_same,
    assert_repeats,
    assert_reversible,
    assert_same,
    assert_same_step,
    image,
    logits,
    operator_calls,
    planted,
    randomize,
)
from timm_host import load_timm
from torch import nn

import fastvit_kernels
from fastvit_kernels import ops
from fastvit_kernels.testing import relative_l2

load_timm()
swin = importlib.import_module("timm.models.swin_transformer")

OPERATORS = ["local_attention", "pointwise_mlp"]
SHIFT = "its windows are shifted by (2, 2), the fused operator has no shift"


def make(**options):
    """A shifted block between two others on 9 x 9 pixels, windows of 5; then one window that is the map of 5 x 5."""
    small = {"img_size": 36, "num_classes": 7, "embed_dim": 16, "num_heads": (1, 2), "depths": (3, 1), "mlp_ratio": 2}
    small |= {"window_size": 5, "drop_path_rate": 0.0}
    torch.manual_seed(0)
    return randomize(swin.SwinTransformer(**{**small, **options}))


@pytest.mark.parametrize("inference", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_same_numbers(dtype, inference):
    stock = make().to(dtype)
    fused, report = accelerated(stock, inference)
    assert [entry.path for entry in report.replaced] == ["layers.0.blocks.0", "layers.0.blocks.2", "layers.1.blocks.0"]
    assert_same(stock, fused, image(2, 3, 36, 36, dtype=dtype), image(1, 3, 36, 36, dtype=dtype, seed=2))


def test_shifted_blocks_are_left_alone_with_the_reason():
    fused, report = accelerated(make())
    (entry,) = report.left_alone
    assert (entry.path, entry.module) == ("layers.0.blocks.1", "SwinTransformerBlock") and SHIFT in entry.reasons
    assert SHIFT in str(report)
    x = image(1, 3, 36, 36, dtype=torch.float32)
    assert operator_calls(fused, x) == {entry.path: OPERATORS for entry in report.replaced}
    (entry,) = fastvit_kernels.explain(fused, x).not_accelerated
    assert entry.path == "layers.0.blocks.1" and SHIFT in entry.reasons


def test_another_input_size_brings_another_window():
    """With a window that no longer is the map, the last block becomes one of several windows, and stays accelerated."""
    stock = make()
    fused, _ = accelerated(stock, inference=True)
    for model in (stock, fused):
        model.set_input_size(img_size=(44, 52))
    assert stock.layers[1].blocks[0].window_size == (6, 7) and not any(stock.layers[1].blocks[0].shift_size)
    assert_same(stock, fused, image(1, 3, 44, 52, dtype=torch.float32))


def test_a_shift_that_comes_later():
    stock = make(depths=(1, 2), window_size=5).double()
    fused, report = accelerated(stock, inference=True)
    # The map of the second stage is one window, which is not shifted.
    assert len(report.replaced) == 3
    for model in (stock, fused):
        model.set_input_size(img_size=(72, 72), window_size=5)
    x = image(1, 3, 72, 72)
    assert_same(stock, fused, x)
    (entry,) = fastvit_kernels.explain(fused, x).unfused
    assert entry.path == "layers.1.blocks.1" and entry.reasons == (f"attention: {SHIFT}",)


def test_training_step():
    stock = make().double().train()
    fused, _ = accelerated(stock)
    assert_same_step(stock, fused, image(2, 3, 36, 36))


@pytest.mark.parametrize("rate", ["proj_drop_rate", "attn_drop_rate", "drop_path_rate"])
def test_dropouts_draw_the_same_numbers(rate):
    assert_drops_the_same(lambda: make(**{rate: 0.4}), image(4, 3, 36, 36))


@pytest.mark.parametrize("rate", ["proj_drop_rate", "attn_drop_rate"])
def test_dropouts_run_the_attention_unfused_in_training_only(rate):
    model = make(**{rate: 0.3})
    assert len(fastvit_kernels.accelerate(model).replaced) == 3
    x = image(1, 3, 36, 36, dtype=torch.float32)
    assert operator_calls(model, x)["layers.0.blocks.0"] == OPERATORS
    assert "local_attention" not in {
        decision.operator for decision in fastvit_kernels.explain(model.train(), x).decisions
    }


MISTAKES = {
    "padding_masked": ("local_attention", {"pad": "mask"}),
    "norm_eps": ("local_attention", {"norm_eps": 1e-6}),
    "scale": ("local_attention", {"scale": 16**-0.5 * 1.001}),
    "mlp_norm_eps": ("pointwise_mlp", {"norm_eps": 1e-6}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_single_mistake_shows(monkeypatch, mistake):
    stock = make().double()
    fused, _ = accelerated(stock)
    function, arguments = MISTAKES[mistake]
    x = image(1, 3, 36, 36)
    with torch.no_grad(), planted(monkeypatch, ops, function, **arguments):
        assert relative_l2(logits(fused, x), logits(stock, x)) > 10 * TOLERANCE[x.dtype]


def test_the_bias_matters_and_keeps_its_orientation():
    """Rows of the bias are queries, columns are keys: of the transposed one the difference would be seen."""
    stock = make().double()
    fused, _ = accelerated(stock)
    for index in (0, 2):
        attention = fused.layers[0].blocks[index].attn
        attention.relative_position_index = attention.relative_position_index.T.contiguous()
    x = image(1, 3, 36, 36)
    with torch.no_grad():
        assert relative_l2(logits(fused, x), logits(stock, x)) > 1e-6


def test_autocast():
    assert_autocast_errs_no_more(make(), image(2, 3, 36, 36, dtype=torch.float32))


def test_reversible():
    assert_reversible(make(), image(1, 3, 36, 36, dtype=torch.float32))


@pytest.mark.parametrize("fused_attention", [False, True])
def test_either_attention_of_timm(fused_attention):
    stock = make(head_dim=12).double()
    for module in stock.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn, module.scale = fused_attention, 0.5
    fused, report = accelerated(stock)
    assert len(report.replaced) == 3
    assert_same(stock, fused, image(1, 3, 36, 36))


def oblong_windows(block):
    block.set_input_size((9, 9), (5, 3))


def another_norm(block):
    block.norm1 = nn.RMSNorm(16)


def hook_on_the_softmax(block):
    block.attn.softmax.register_forward_hook(lambda module, args, output: 2 * output)


OBSTACLES = {
    oblong_windows: "its windows are 5 x 3, the fused operator needs square ones",
    another_norm: "the layer norm is a RMSNorm",
    hook_on_the_softmax: "attn.softmax has hooks",
}


@pytest.mark.parametrize("change", OBSTACLES, ids=lambda change: change.__name__)
def test_left_alone_with_reason(change):
    stock = make()
    change(stock.layers[0].blocks[0])
    fused, report = accelerated(stock.double())
    assert [entry.path for entry in report.left_alone] == ["layers.0.blocks.0", "layers.0.blocks.1"]
    assert any(OBSTACLES[change] in reason for reason in report.left_alone[0].reasons)
    assert_same(stock, fused, image(1, 3, 36, 36))


def changed_in_place(table):
    with torch.no_grad():
        table.mul_(0.5)


def written_behind_its_back(table):
    table.data[3] += 1


@pytest.mark.parametrize("change", [changed_in_place, written_behind_its_back])
def test_a_changed_bias_is_noticed_by_a_packed_model(change):
    stock = make()
    fused, _ = accelerated(stock, inference=True)
    x = image(1, 3, 36, 36, dtype=torch.float32)
    assert_same(stock, fused, x)
    for model in (stock, fused):
        change(model.layers[0].blocks[0].attn.relative_position_bias_table)
    assert_same(stock, fused, x)


def test_weights_are_packed_once():
    fused, _ = accelerated(make(), inference=True)
    x = image(1, 3, 36, 36, dtype=torch.float32)
    site = fused.layers[0].blocks[0].__dict__["_fastvit"].packed["local_attention"]
    packed = site._entry
    with torch.no_grad():
        fused(x)
    assert packed is not None and site._entry is packed


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_accelerated(duplicate):
    stock = make()
    fused, _ = accelerated(stock, inference=True)
    twin = duplicate(fused)
    assert all(type(a) is type(b) for a, b in zip(fused.modules(), twin.modules(), strict=True))
    assert_same(stock, twin, image(1, 3, 36, 36, dtype=torch.float32))


def test_compiled():
    stock = make()
    fused, _ = accelerated(stock, inference=True)
    x = image(1, 3, 36, 36, dtype=torch.float32)
    with torch.no_grad():
        assert relative_l2(torch.compile(fused, fullgraph=True, backend="eager")(x), stock(x)) <= 1e-5


def test_calls_are_repeated():
    assert_repeats(make(), image(1, 3, 36, 36, dtype=torch.float32))
