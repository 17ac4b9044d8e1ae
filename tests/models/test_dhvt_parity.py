"""All eight DHVTs compute in fp64 what their equations in plain PyTorch do, and a single mistake would show."""

from __future__ import annotations

import copy
import functools

import parity
import pytest
import torch
from cvt_pairs import image
from torch import nn

from fastvit_kernels import ops
from fastvit_kernels.bench import plain_dhvt
from fastvit_kernels.models import create_model
from fastvit_kernels.nn import DAFF, DenseConv2d
from fastvit_kernels.testing import relative_l2

VARIANTS = tuple(plain_dhvt.VARIANTS)
TINIEST = "dhvt_tiny_cifar_patch4"


def side(name):
    """Smaller images than the published ones do: nothing in the model depends on their size."""
    return 64 if name.endswith("patch16") else 16


@functools.lru_cache(maxsize=1)
def pair(name):
    """Put changes back: the next test gets the same pair."""
    return parity.pair(name, plain_dhvt.DHVT(**{**plain_dhvt.VARIANTS[name], "num_classes": 10}))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("dhvt_tiny_cifar_patch4", 6_008_650),
        ("dhvt_small_cifar_patch4", 23_425_450),
        ("dhvt_tiny_cifar_patch2", 5_845_162),
        ("dhvt_small_cifar_patch2", 22_766_698),
        ("dhvt_tiny_domain_patch16", 6_105_975),
        ("dhvt_small_domain_patch16", 23_788_431),
        ("dhvt_tiny_imagenet_patch16", 6_267_334),
        ("dhvt_small_imagenet_patch16", 24_040_606),
    ],
)
def test_entries_and_parameters(name, parameters):
    sizes = plain_dhvt.VARIANTS[name]
    with torch.device("meta"):
        model, plain = create_model(name, sizes["num_classes"]), plain_dhvt.DHVT(**sizes)
    assert sum(p.numel() for p in model.parameters()) == parameters
    state, shapes = model.state_dict(), {key: value.shape for key, value in plain.state_dict().items()}
    assert {key: value.shape for key, value in state.items()} == shapes


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "batch statistics"])
@pytest.mark.parametrize("name", VARIANTS, scope="module")
def test_logits_and_gradients(name, training):
    both = copy.deepcopy(pair(name))
    for model in both:
        model.train(training)
    parity.assert_same(both, image(2, side(name), side(name), dtype=torch.float64))


def test_the_published_size():
    ours, theirs = pair("dhvt_tiny_imagenet_patch16")
    x = image(1, 224, 224, dtype=torch.float64)
    with torch.no_grad():
        assert relative_l2(ours(x), theirs(x)) <= parity.TOLERANCE


def test_fp32_logits():
    exact, _ = pair(TINIEST)
    x = image(2, 32, 32)
    with torch.no_grad():
        assert relative_l2(copy.deepcopy(exact).float()(x), exact(x.double())) <= 1e-5


def test_bf16_logits_are_as_good_as_the_plain_models():
    exact, theirs = pair(TINIEST)
    ours, plain = copy.deepcopy(exact).float(), copy.deepcopy(theirs).float()
    x = image(4, 32, 32)
    with torch.no_grad():
        expected = exact(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            assert relative_l2(ours(x), expected) <= 2 * relative_l2(plain(x), expected)


def head_means_without_the_class_token(model, patch):
    head_tokens = ops.head_tokens

    def wrong(x, *arguments, num_heads, **named):
        right, other = (head_tokens(t, *arguments, num_heads=num_heads, **named) for t in (x, x[:, 1:]))
        return torch.cat([right[:, :-num_heads], other[:, -num_heads:]], 1)

    patch.setattr(ops, "head_tokens", wrong)


def sigmoid_gate(model, patch):
    gate = DAFF._gate
    patch.setattr(DAFF, "_gate", lambda self, mean: gate(self, mean).sigmoid())


@pytest.mark.parametrize("hooked", ["", "pre_affine", "post_affine", "proj", "proj.0", "proj.0.0"])
@pytest.mark.parametrize("name", ["dhvt_tiny_cifar_patch4", "dhvt_tiny_cifar_patch2"])
def test_the_stem_for_inference(name, hooked):
    stem = create_model(name).patch_embed.eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for affine in (stem.pre_affine, stem.post_affine):
            affine.alpha.normal_()
            affine.beta.normal_()
        x = image(2, 9, 11)
        expected = copy.deepcopy(stem).double()(x.double())
        called = []
        if hooked:
            stem.get_submodule(hooked).register_forward_hook(lambda *_: called.append(1))
        for module in stem.modules():
            if isinstance(module, DenseConv2d):
                module.prepare_inference(True)
        for _ in range(2):
            assert relative_l2(stem(x), expected) <= 2e-6
        stem.post_affine.beta.add_(1.0)
        assert relative_l2(stem(x), expected + 1.0) <= 2e-6
    assert len(called) == (3 if hooked else 0)


def shortcut_in_front_of_the_activation(model, patch):
    depthwise_mlp = ops.depthwise_mlp

    def wrong(*arguments, **named):
        assert named["inner_residual"] == "after_activation"
        return depthwise_mlp(*arguments, **{**named, "inner_residual": "before_activation"})

    patch.setattr(ops, "depthwise_mlp", wrong)


def tanh_gelu(model, patch):
    for module in model.modules():
        if isinstance(module, nn.GELU):
            patch.setattr(module, "approximate", "tanh")


def class_token_without_the_norm(model, patch):
    """The gate multiplies the normalised class token, not the residual's."""
    forward = DAFF.forward

    def wrong(self, x, *, grid=None, norm=None, residual=None):
        u = torch.cat([x[:, :1], norm(x[:, 1:])], 1)
        return forward(self, u, grid=grid, residual=residual)

    patch.setattr(DAFF, "forward", wrong)


def eps_off_by_ten(name):
    def mistake(model, patch):
        norm = model.get_submodule(name)
        patch.setattr(norm, "eps", 10 * norm.eps)

    mistake.__name__ = f"eps of {name}"
    return mistake


MISTAKES = [
    head_means_without_the_class_token,
    sigmoid_gate,
    shortcut_in_front_of_the_activation,
    tanh_gelu,
    class_token_without_the_norm,
    *(
        eps_off_by_ten(name)
        for name in (
            "patch_embed.proj.0.1",
            "blocks.0.norm1",
            "blocks.7.norm2",
            "blocks.3.attn.ht_norm",
            "blocks.5.mlp.bn1",
            "blocks.5.mlp.bn2",
            "blocks.11.mlp.bn3",
            "norm",
        )
    ),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_planted_mistake_breaks_parity(monkeypatch, mistake):
    def plant(model):
        mistake(model, monkeypatch)
        return monkeypatch.undo

    parity.assert_breaks(pair(TINIEST), image(1, 32, 32, dtype=torch.float64), plant)
