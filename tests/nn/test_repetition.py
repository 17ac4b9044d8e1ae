"""A block prepared for inference repeats its calls, and notices everything that would make a repetition wrong."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastvit_kernels
from fastvit_kernels.models import create_model
from fastvit_kernels.testing.numerics import relative_l2

SIZES = {"depths": (1, 1, 2), "embed_dims": (16, 32, 48), "num_heads": (1, 2, 3), "num_classes": 7}


def image(*size):
    return torch.randn(*size, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def stock():
    torch.manual_seed(0)
    model = create_model("cvt_13", backend="reference", **SIZES).eval()
    with torch.no_grad():
        # Weights so large that every layer matters.
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3 if parameter.ndim < 2 else 2.0 / parameter[0].numel() ** 0.5)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.uniform_(0.5, 2.0)
                module.running_mean.normal_()
    return model


@pytest.fixture
def fast(stock):
    """An accelerated copy whose blocks have run, so that the next call is a repetition."""
    model = copy.deepcopy(stock)
    fastvit_kernels.accelerate(model, inference=True)
    with torch.no_grad():
        model(image(2, 3, 64, 48))
    assert all(repetition_of(block) is not None for block in blocks(model))
    return model


def blocks(model):
    return [block for stage in (model.stage0, model.stage1, model.stage2) for block in stage.blocks]


def repetition_of(block):
    return block.attn._packed["conv_projection"].repetition


def count_repetitions(model, x):
    """How many blocks repeat their last call for this input."""
    taken = []
    for block in blocks(model):
        repetition = repetition_of(block)
        run = repetition.run
        repetition.run = lambda *args, run=run: taken.append(run(*args)) or taken[-1]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for block in blocks(model):
            if repetition_of(block) is not None:
                repetition_of(block).__dict__.pop("run", None)
    return sum(out is not None for out in taken)


def assert_same(stock, fast, x):
    with torch.no_grad():
        assert relative_l2(fast(x), stock(x)) < 1e-5


def test_the_same_call_is_repeated_to_the_bit(stock, fast):
    x = image(2, 3, 64, 48)
    with torch.no_grad():
        first = fast(x)
        assert count_repetitions(fast, x) == 4
        assert torch.equal(fast(x), first)
    assert_same(stock, fast, x)


def test_another_batch_is_a_repetition_and_another_size_is_not(stock, fast):
    assert count_repetitions(fast, image(3, 3, 64, 48)) == 4
    assert_same(stock, fast, image(0, 3, 64, 48))
    assert count_repetitions(fast, image(1, 3, 48, 64)) == 0
    for size in ((64, 48), (48, 64), (70, 45), (64, 48)):
        assert_same(stock, fast, image(1, 3, *size))


def block_of(model):
    return model.stage2.blocks[1]


def change_layer_norm_eps(model):
    block_of(model).norm1.eps = 0.3


def change_batch_norm_eps(model):
    block_of(model).attn.conv_proj_k.bn.eps = 0.7


def change_scale(model):
    block_of(model).attn.scale = 2.0


def replace_linear(model):
    torch.manual_seed(5)
    block_of(model).mlp.fc1 = nn.Linear(48, 192)


def replace_parameter(model):
    torch.manual_seed(5)
    block_of(model).attn.proj.weight = nn.Parameter(torch.randn(48, 48))


def replace_attention(model):
    block_of(model).attn = NoAttention()


def replace_activation(model):
    block_of(model).mlp.act = nn.ReLU()


def update_in_place(model):
    with torch.no_grad():
        block_of(model).mlp.fc2.weight.mul_(1.5)


def write_through_data(model):
    block_of(model).mlp.fc2.weight.data.mul_(1.5)


def update_running_variance(model):
    block_of(model).attn.conv_proj_v.bn.running_var.mul_(3.0)


def use_batch_statistics(model):
    for name in "qkv":
        getattr(block_of(model).attn, f"conv_proj_{name}").bn.train()


def replace_forward(model):
    block_of(model).norm2.forward = lambda x: x * 2


def watch_a_submodule(model):
    block_of(model).norm2.register_forward_hook(lambda module, args, out: out.flip(-1))


def watch_the_block(model):
    block_of(model).register_forward_hook(lambda module, args, out: out.flip(-1))


class NoAttention(nn.Module):
    def forward(self, x, h, w):
        return torch.zeros_like(x)


@pytest.mark.parametrize(
    "change",
    [
        change_layer_norm_eps,
        change_batch_norm_eps,
        change_scale,
        replace_linear,
        replace_parameter,
        replace_attention,
        replace_activation,
        update_in_place,
        write_through_data,
        update_running_variance,
        use_batch_statistics,
        replace_forward,
        watch_a_submodule,
        watch_the_block,
    ],
)
def test_a_change_between_two_calls_is_noticed(stock, fast, change):
    x = image(2, 3, 64, 48)
    with torch.no_grad():
        before = stock(x)
    change(stock)
    change(fast)
    with torch.no_grad():
        assert relative_l2(before, stock(x)) > 1e-4
    assert_same(stock, fast, x)
    assert_same(stock, fast, x)


def test_gradients_are_not_lost(stock, fast):
    x = image(2, 3, 64, 48).requires_grad_()
    (expected,) = torch.autograd.grad(stock(x).sum(), x)
    (found,) = torch.autograd.grad(fast(x).sum(), x)
    assert relative_l2(found, expected) < 1e-4


def test_a_chosen_backend_is_used(fast):
    x = image(2, 3, 64, 48)
    with fastvit_kernels.use_backend("reference"):
        assert count_repetitions(fast, x) == 0
        decisions = fastvit_kernels.explain(fast, x).decisions
    assert {decision.chosen for decision in decisions} == {"reference"}
    block_of(fast).attn.backend = "triton"
    with torch.no_grad():
        fast(x)
    assert {d.chosen for d in fastvit_kernels.explain(fast, x).decisions} == {"cpu", "triton"}


def test_dtype_and_autocast_are_noticed(stock, fast):
    x = image(2, 3, 64, 48)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        exact, low = stock(x), fast(x)
        assert low.dtype is exact.dtype and relative_l2(low, exact) < 0.1
    assert_same(stock, fast, x)
    assert_same(copy.deepcopy(stock).double(), copy.deepcopy(fast).double(), x.double())
    with torch.no_grad():
        low = fast.bfloat16()(x.bfloat16())
        assert low.dtype is torch.bfloat16 and relative_l2(low, stock(x)) < 0.2


def test_tensors_kept_as_attributes(fast):
    """A hook that stores what it sees, as feature extraction does."""
    x = image(2, 3, 64, 48)
    for block in blocks(fast):
        block.register_forward_hook(lambda module, args, out: setattr(module, "seen", out))
    with torch.no_grad():
        expected = fast(x)
        for _ in range(3):
            assert torch.equal(fast(x), expected)


def test_an_attribute_exchanged_for_another(fast):
    x, block = image(2, 3, 64, 48), blocks(fast)[0]
    with torch.no_grad():
        block.one = 1
        expected = fast(x)
        assert torch.equal(fast(x), expected)
        del block.one
        block.other = 1
        assert torch.equal(fast(x), expected)
        block.attn.scale = torch.full((3,), block.attn.scale)
        with pytest.raises(TypeError, match="scale"):
            fast(x)
