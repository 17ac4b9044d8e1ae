"""CvT-13 and CvT-21 compute what transformers' implementation computes with the official activation, in fp64."""

from __future__ import annotations

import copy

import plain_cvt
import pytest
import torch
from cvt_pairs import image, load_quietly, transformers_cvt
from torch import nn

from fastvit_kernels import use_backend
from fastvit_kernels.models import create_model
from fastvit_kernels.models.cvt_keys import from_transformers
from fastvit_kernels.nn import ConvProjectionAttention
from fastvit_kernels.testing import relative_l2

TOLERANCE = 1e-12
SIZES = {"cvt_13": ((64, 96), (70, 45)), "cvt_21": ((64, 96), (70, 45))}
CASES = [(name, *size) for name, sizes in SIZES.items() for size in sizes]


@pytest.mark.parametrize(("name", "h", "w"), [*CASES, ("cvt_13", 224, 224)])
def test_evaluation(pairs, name, h, w):
    ours, theirs = pairs(name)
    x = image(1, h, w, dtype=torch.float64)
    with torch.no_grad():
        assert relative_l2(ours(x), theirs(x).logits) <= TOLERANCE


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("name", "h", "w"), CASES)
def test_gradients_and_batch_statistics(pairs, name, h, w, mode):
    ours, theirs = pairs(name)
    ours.train(mode), theirs.train(mode)
    buffers = [copy.deepcopy(dict(model.named_buffers())) for model in (ours, theirs)]
    # More than one image: for a single one PyTorch's CPU batch norm returns wrong gradients inside transformers' model.
    x = image(2, h, w, dtype=torch.float64)
    results = []
    try:
        for model in (ours, theirs):
            model.zero_grad()
            inputs = x.clone().requires_grad_()
            logits = model(inputs) if model is ours else model(inputs).logits
            (logits * torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view_as(logits)).sum().backward()
            grads = {key: p.grad for key, p in model.named_parameters()}
            results.append((logits, inputs.grad, grads, {key: b.clone() for key, b in model.named_buffers()}))
    finally:
        for model, saved in zip((ours, theirs), buffers, strict=True):
            for key, buffer in model.named_buffers():
                buffer.copy_(saved[key])
    (y, gx, grads, stats), (their_y, their_gx, their_grads, their_stats) = results
    assert relative_l2(y, their_y) <= TOLERANCE
    assert relative_l2(gx, their_gx) <= TOLERANCE
    their_grads, their_stats = from_transformers(their_grads), from_transformers(their_stats)
    scale = max(float(g.norm()) for g in their_grads.values())
    assert grads.keys() == their_grads.keys() and stats.keys() == their_stats.keys()
    for key, grad in grads.items():
        # Gradients of keys' biases are zero but for rounding: those are measured against the largest gradient.
        error = float((grad - their_grads[key]).norm())
        assert error <= TOLERANCE * float(their_grads[key].norm()) + 1e-16 * scale, key
    for key, buffer in stats.items():
        assert relative_l2(buffer, their_stats[key]) <= TOLERANCE, key


def test_the_exact_gelu_is_what_transformers_runs_unchanged(pairs):
    # transformers takes the drop path rate of every layer from place [stage] of a list as long as the stage.
    depths, widths, heads = [1, 2, 3], [16, 32, 48], [1, 2, 3]
    theirs = transformers_cvt(nn.GELU, depth=depths, embed_dim=widths, num_heads=heads).eval()
    ours = create_model("cvt_13", 10, depths=depths, embed_dims=widths, num_heads=heads, activation="gelu")
    ours = ours.double().eval()
    load_quietly(ours, theirs.state_dict())
    x = image(1, 70, 45, dtype=torch.float64)
    with torch.no_grad():
        assert relative_l2(ours(x), theirs(x).logits) <= TOLERANCE


def attentions(model):
    return [module for module in model.modules() if isinstance(module, ConvProjectionAttention)]


def usual_scale(model, monkeypatch):
    for attention in attentions(model):
        monkeypatch.setattr(attention, "scale", (attention.proj.in_features // attention.num_heads) ** -0.5)


def other_eps(model, monkeypatch):
    monkeypatch.setattr(model.stage2.blocks[9].norm2, "eps", 1e-6)


def other_batch_norm_eps(model, monkeypatch):
    monkeypatch.setattr(model.stage2.blocks[9].attn.conv_proj_v.bn, "eps", 1.1e-5)


def exact_gelu(model, monkeypatch):
    for stage in (model.stage0, model.stage1, model.stage2):
        for block in stage.blocks:
            monkeypatch.setitem(block.mlp._modules, "act", nn.GELU())


def batch_norm_on_the_class_token(model, monkeypatch):
    project = ConvProjectionAttention._project

    def wrong(self, x, h, w, norm):
        rows = list(project(self, x, h, w, norm))
        if self.with_cls_token:
            cls = norm(x)[:, 0]
            for index, name in enumerate("qkv"):
                bn, linear = getattr(self, f"conv_proj_{name}").bn, getattr(self, f"proj_{name}")
                rows[index] = torch.cat([linear(bn(cls[..., None, None]).flatten(1))[:, None], rows[index][:, 1:]], 1)
        return tuple(rows)

    monkeypatch.setattr(ConvProjectionAttention, "_project", wrong)


def batch_norm_folded_into_the_linear(model, monkeypatch):
    for attention in attentions(model):
        for name in "qkv":
            bn, linear = getattr(attention, f"conv_proj_{name}").bn, getattr(attention, f"proj_{name}")
            scale = bn.weight * (bn.running_var + bn.eps).rsqrt()
            shift = bn.bias - bn.running_mean * scale
            identity = nn.BatchNorm2d(len(scale), eps=0.0).double().eval()
            folded = nn.Linear(len(scale), len(scale)).double()
            folded.weight.copy_(linear.weight * scale)
            folded.bias.copy_(linear.bias + linear.weight @ shift)
            monkeypatch.setitem(getattr(attention, f"conv_proj_{name}")._modules, "bn", identity)
            monkeypatch.setitem(attention._modules, f"proj_{name}", folded)


def no_query_bias(model, monkeypatch):
    monkeypatch.setitem(model.stage2.blocks[9].attn.proj_q._parameters, "bias", None)


MISTAKES = [
    usual_scale,
    other_eps,
    other_batch_norm_eps,
    exact_gelu,
    batch_norm_on_the_class_token,
    batch_norm_folded_into_the_linear,
    no_query_bias,
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_planted_mistake_breaks_parity(pairs, monkeypatch, mistake):
    ours, theirs = pairs("cvt_13")
    x = image(1, 64, 48, dtype=torch.float64)
    with torch.no_grad():
        expected = theirs(x).logits
        assert relative_l2(ours(x), expected) <= TOLERANCE
        mistake(ours, monkeypatch)
        error = relative_l2(ours(x), expected)
        assert error > 100 * TOLERANCE
        monkeypatch.undo()
        assert relative_l2(ours(x), expected) <= TOLERANCE


def test_folding_into_the_linear_is_only_wrong_with_a_class_token(pairs, monkeypatch):
    # The planted mistake itself is sound algebra: without class tokens it changes nothing.
    ours, _ = pairs("cvt_13")
    x = image(1, 64, 48, dtype=torch.float64)
    with torch.no_grad():
        before = ours.stage0(x)[0]
        batch_norm_folded_into_the_linear(ours, monkeypatch)
        assert relative_l2(ours.stage0(x)[0], before) <= TOLERANCE


def test_fp32_logits(pairs):
    exact, _ = pairs("cvt_13")
    ours = copy.deepcopy(exact).float()
    x = image(2, 70, 45)
    with torch.no_grad():
        expected = exact(x.double())
        for backend in ("cpu", "reference"):
            with use_backend(backend):
                assert relative_l2(ours(x), expected) <= 1e-5


@pytest.mark.parametrize("prepared", [False, True], ids=["as they are", "packed weights"])
def test_bf16_logits_are_as_good_as_the_plain_models(pairs, prepared):
    exact, _ = pairs("cvt_13")
    ours = copy.deepcopy(exact).float()
    plain = plain_cvt.CvT(num_classes=10).eval()
    plain.load_state_dict(ours.state_dict(), strict=True)
    for module in ours.modules():
        if prepared and hasattr(module, "prepare_inference"):
            module.prepare_inference(True)
    x = image(4, 70, 45)
    with torch.no_grad():
        expected = exact(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            error, stock = relative_l2(ours(x), expected), relative_l2(plain(x), expected)
        assert error <= 2 * stock
