"""All four HAT-Nets compute in fp64 what their equations in plain PyTorch do, and a single mistake would show."""

from __future__ import annotations

import copy
import importlib

import plain_hat_net
import pytest
import torch
from cvt_pairs import image
from hat_net_pairs import pair
from torch import nn

from fastvit_kernels import ops, use_backend
from fastvit_kernels.models import create_model
from fastvit_kernels.nn import HierarchicalAttention
from fastvit_kernels.testing import relative_l2

TOLERANCE = 1e-12
VARIANTS = tuple(plain_hat_net.VARIANTS)


@pytest.mark.parametrize(
    ("name", "entries", "parameters", "unused"),
    [
        ("hat_net_tiny", 295, 12_655_912, 5_760),
        ("hat_net_small", 364, 25_747_784, 9_216),
        ("hat_net_medium", 686, 42_942_472, 16_512),
        ("hat_net_large", 939, 63_132_488, 23_552),
    ],
)
def test_entries_and_parameters(name, entries, parameters, unused):
    with torch.device("meta"):
        model, plain = create_model(name), plain_hat_net.HATNet(**plain_hat_net.VARIANTS[name])
    state = model.state_dict()
    assert len(state) == entries and sum(p.numel() for p in model.parameters()) == parameters
    assert [(k, v.shape) for k, v in state.items()] == [(k, v.shape) for k, v in plain.state_dict().items()]
    frozen = {key: p.numel() for key, p in model.named_parameters() if not p.requires_grad}
    assert all(".attn.proj_norm." in key for key in frozen) and sum(frozen.values()) == unused


@pytest.mark.parametrize("name", VARIANTS, scope="module")
def test_evaluation_and_gradients(name):
    ours, theirs = pair(name)
    # No stage's map is made of whole windows alone.
    x = image(2, 72, 90, dtype=torch.float64)
    results = []
    for model in (ours, theirs):
        model.zero_grad()
        inputs = x.clone().requires_grad_()
        logits = model(inputs)
        (logits * torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view_as(logits)).sum().backward()
        results.append((logits, inputs.grad, {key: p.grad for key, p in model.named_parameters()}))
        model.zero_grad()
    (y, gx, grads), (their_y, their_gx, their_grads) = results
    assert relative_l2(y, their_y) <= TOLERANCE and relative_l2(gx, their_gx) <= TOLERANCE
    assert grads.keys() == their_grads.keys()
    scale = max(float(g.norm()) for g in grads.values() if g is not None)
    for key, grad in grads.items():
        if ".proj_norm." in key:
            assert grad is None and their_grads[key] is None
        else:
            error = float((grad - their_grads[key]).norm())
            assert error <= TOLERANCE * float(their_grads[key].norm()) + 1e-16 * scale, key


@pytest.mark.parametrize("name", VARIANTS, scope="module")
def test_the_official_size(name):
    ours, theirs = pair(name)
    x = image(1, 224, 224, dtype=torch.float64)
    with torch.no_grad():
        assert relative_l2(ours(x), theirs(x)) <= TOLERANCE


@pytest.mark.parametrize(("h", "w"), [(224, 448), (192, 160), (33, 250), (1, 1)])
def test_other_sizes(h, w):
    ours, theirs = pair("hat_net_tiny")
    x = image(1, h, w, dtype=torch.float64)
    with torch.no_grad():
        assert relative_l2(ours(x), theirs(x)) <= TOLERANCE


def test_windows_at_once_and_one_by_one_are_the_same_in_the_yardstick():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 6, 8, 12, generator=generator, dtype=torch.float64) for _ in range(3))
    whole, sliced = plain_hat_net.attend_in_windows, plain_hat_net.attend_in_window_slices
    assert relative_l2(whole(q, k, v, 3, 4), sliced(q, k, v, 3, 4)) <= 1e-15


def reference_of(operator):
    # The package's attribute of this name is the function.
    return importlib.import_module(f"fastvit_kernels.ops.{operator}.reference")


def normalised_residual(model, monkeypatch):
    local_attention = ops.local_attention

    def wrong(x, *, residual=None, norm_weight, norm_bias, norm_eps, **arguments):
        # Stage 4 has one level, whose residual is that of the block.
        if arguments.get("proj_weight") is None:
            residual = nn.functional.group_norm(x.mT, 1, norm_weight, norm_bias, norm_eps).mT
        norm = {"norm_weight": norm_weight, "norm_bias": norm_bias, "norm_eps": norm_eps}
        return local_attention(x, residual=residual, **norm, **arguments)

    monkeypatch.setattr(ops, "local_attention", wrong)


def _layer_norm_in(operator, monkeypatch):
    module = reference_of(operator)
    correct = module.normalize_by
    monkeypatch.setattr(
        module,
        "normalize_by",
        lambda kind, *rest, **options: correct("layer" if kind == "group" else kind, *rest, **options),
    )


def layer_norm_in_the_windows(model, monkeypatch):
    _layer_norm_in("local_attention", monkeypatch)


def layer_norm_behind_the_windows(model, monkeypatch):
    _layer_norm_in("global_attention", monkeypatch)


def layer_norm_in_the_mlp(model, monkeypatch):
    _layer_norm_in("depthwise_mlp", monkeypatch)


def layer_norm_of_the_pooled_map(model, monkeypatch):
    module = reference_of("pooled_projection")
    normalize_by = module.normalize_by

    def wrong(kind, x, statistics, *rest):
        # Only the norm in front of the pooling comes with statistics.
        return normalize_by("layer" if statistics is None else kind, x, statistics, *rest)

    monkeypatch.setattr(module, "normalize_by", wrong)


def dilated_windows(model, monkeypatch):
    """Every window spread over the whole map, as MaxViT's grid attention has it."""
    module = reference_of("local_attention")

    def partition(tokens, static):
        g = static.window_size
        maps = tokens.unflatten(1, (static.height, static.width))
        return maps.unflatten(2, (g, -1)).unflatten(1, (g, -1)).permute(0, 2, 4, 1, 3, 5).flatten(3, 4)

    def reverse(windows, static):
        g = static.window_size
        maps = windows.unflatten(3, (g, g)).permute(0, 3, 1, 4, 2, 5)
        return maps.flatten(3, 4).flatten(1, 2).flatten(1, 2)

    monkeypatch.setattr(module, "partition", partition)
    monkeypatch.setattr(module, "reverse", reverse)


def nothing_added_in_front_of_the_projection(model, monkeypatch):
    global_attention = ops.global_attention
    monkeypatch.setattr(
        ops, "global_attention", lambda *args, **named: global_attention(*args, **{**named, "add_query_input": False})
    )


def the_scale_of_all_channels(model, monkeypatch):
    for module in model.modules():
        if isinstance(module, HierarchicalAttention):
            monkeypatch.setattr(module, "scale", module.proj.in_channels**-0.5)


def other_eps(name):
    def mistake(model, monkeypatch):
        monkeypatch.setattr(model.get_submodule(name), "eps", 1e-5)

    mistake.__name__ = f"eps 1e-5 in {name}"
    return mistake


MISTAKES = [
    normalised_residual,
    layer_norm_in_the_windows,
    layer_norm_behind_the_windows,
    layer_norm_in_the_mlp,
    layer_norm_of_the_pooled_map,
    dilated_windows,
    nothing_added_in_front_of_the_projection,
    the_scale_of_all_channels,
    *(
        other_eps(name)
        for name in (
            "patch_embed.1",
            "blocks.1.0.attn.norm",
            "blocks.1.0.attn.grid_norm",
            "blocks.1.0.attn.ds_norm",
            "blocks.3.2.attn.norm",
            "blocks.2.5.conv.conv1.0",
            "blocks.2.5.conv.conv3.1",
            "ds3.norm",
        )
    ),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_planted_mistake_breaks_parity(monkeypatch, mistake):
    ours, theirs = pair("hat_net_tiny")
    x = image(1, 224, 224, dtype=torch.float64)
    with torch.no_grad():
        expected = theirs(x)
        mistake(ours, monkeypatch)
        error = relative_l2(ours(x), expected)
        assert error > 100 * TOLERANCE
        monkeypatch.undo()
        assert relative_l2(ours(x), expected) <= TOLERANCE


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_fp32_logits_of_cut_windows(backend):
    exact, _ = pair("hat_net_tiny")
    x = image(2, 70, 45)
    with torch.no_grad(), use_backend(backend):
        assert relative_l2(copy.deepcopy(exact).float()(x), exact(x.double())) <= 1e-5


@pytest.mark.parametrize("prepared", [False, True], ids=["as they are", "packed weights"])
def test_bf16_logits_of_cut_windows(prepared):
    assert_bf16_logits(*pair("hat_net_tiny"), prepared, image(4, 70, 45))


@pytest.mark.parametrize("name", VARIANTS, scope="module")
def test_fp32_logits(name):
    """All blocks, at the official size."""
    exact, theirs = pair(name)
    x = image(1, 224, 224)
    with torch.no_grad():
        assert relative_l2(copy.deepcopy(exact).float()(x), theirs(x.double())) <= 1e-5


@pytest.mark.parametrize("name", VARIANTS, scope="module")
@pytest.mark.parametrize("prepared", [False, True], ids=["as they are", "packed weights"])
def test_bf16_logits_are_as_good_as_the_plain_models(name, prepared):
    assert_bf16_logits(*pair(name), prepared, image(1, 224, 224))


def assert_bf16_logits(exact, theirs, prepared, x):
    ours, plain = copy.deepcopy(exact).float(), copy.deepcopy(theirs).float()
    for module in ours.modules():
        if prepared and hasattr(module, "prepare_inference"):
            module.prepare_inference(True)
    with torch.no_grad():
        expected = exact(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            error, stock = relative_l2(ours(x), expected), relative_l2(plain(x), expected)
        assert error <= 2 * stock
