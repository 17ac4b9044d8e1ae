"""A model prepared for inference repeats its calls, and notices everything that would make a repetition wrong."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves

import fastvit_kernels
from fastvit_kernels.models import create_model
from fastvit_kernels.nn.recording import Program
from fastvit_kernels.nn.repetition import Repeating
from fastvit_kernels.nn.watch import Watch
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
    """An accelerated copy that has recorded its calls, so that the next call is a repetition."""
    model = copy.deepcopy(stock)
    fastvit_kernels.accelerate(model, inference=True)
    record(model, image(2, 3, 64, 48))
    return model


def record(model, x):
    """Two calls: the second of its kind is recorded."""
    before = model._repeater.recorded
    with torch.no_grad():
        model(x)
        model(x)
    assert model._repeater.recorded == before + 1


def blocks(model):
    return [block for stage in (model.stage0, model.stage1, model.stage2) for block in stage.blocks]


def repeats(model, x):
    """Whether the model calls for this input what it recorded, without its own Python."""
    ran = []
    with (
        mock.patch.object(Program, "run", lambda self, inputs, run=Program.run: ran.append(self) or run(self, inputs)),
        torch.no_grad(),
    ):
        model(x)
    return bool(ran)


def assert_same(stock, fast, x):
    with torch.no_grad():
        assert relative_l2(fast(x), stock(x)) < 1e-5


def test_the_same_call_is_repeated_to_the_bit(stock, fast):
    x = image(2, 3, 64, 48)
    with torch.no_grad():
        first = fast._forward(x)
        assert repeats(fast, x)
        assert torch.equal(fast(x), first)
    assert_same(stock, fast, x)


def test_every_size_has_its_record(stock, fast):
    for size in ((64, 48), (48, 64), (70, 45)):
        x = image(1, 3, *size)
        assert not repeats(fast, x)
        record(fast, x)
    for size in ((64, 48), (48, 64), (70, 45), (64, 48)):
        x = image(1, 3, *size)
        assert repeats(fast, x)
        assert_same(stock, fast, x)
    assert_same(stock, fast, image(0, 3, 64, 48))


def test_records_are_limited(fast):
    for width in range(33, 33 + 9):
        record(fast, image(1, 3, 40, width)) if fast._repeater.recorded < 8 else fast(image(1, 3, 40, width))
    assert fast._repeater.recorded <= 8


def test_sizes_that_never_repeat_are_not_recorded(fast):
    before = fast._repeater.recorded
    with torch.no_grad():
        for width in range(33, 40):
            fast(image(1, 3, 40, width))
    assert fast._repeater.recorded == before


def test_memory_layouts_are_told_apart(stock, fast):
    x = image(2, 3, 64, 48).contiguous(memory_format=torch.channels_last)
    assert not repeats(fast, x)
    assert_same(stock, fast, x)
    record_again = image(2, 3, 64, 48)
    assert repeats(fast, record_again)


def test_copies_and_pickles_record_for_themselves(stock, fast):
    x = image(2, 3, 64, 48)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert not repeats(other, x)
        with torch.no_grad():
            other.stage0.blocks[0].mlp.fc1.weight.mul_(2.0)
            changed = other(x)
            assert relative_l2(other(x), changed) == 0 and relative_l2(changed, stock(x)) > 1e-4
    assert_same(stock, fast, x)


def test_threads_share_a_record(stock, fast):
    images = [image(2, 3, 64, 48) * (number + 1) for number in range(4)]
    with torch.no_grad():
        wanted = [fast(x) for x in images]

    def run(number):
        with torch.no_grad():
            return all(torch.equal(fast(images[number]), wanted[number]) for _ in range(5))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(4)))


def test_restored_models_repeat_nothing(stock, fast):
    fastvit_kernels.restore(fast)
    assert fast._repeater is None and "_repeater" not in fast.__dict__
    assert not repeats(fast, image(2, 3, 64, 48))


def test_maps_come_back_in_their_list(stock):
    torch.manual_seed(0)
    model = create_model("cvt_13", features_only=True, **{k: v for k, v in SIZES.items() if k != "num_classes"}).eval()
    fastvit_kernels.accelerate(model, inference=True)
    x = image(2, 3, 64, 48)
    record(model, x)
    with torch.no_grad():
        expected, found = model._forward(x), model(x)
    assert isinstance(found, list) and all(map(torch.equal, found, expected))
    assert [m.stride() for m in found] == [m.stride() for m in expected]


class Watched(Repeating):
    """A module with a forward of the test's choice, said to be one of ours."""

    __module__ = "fastvit_kernels.somewhere"

    def __init__(self, compute):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.register_buffer("count", torch.zeros(()))
        self.compute = compute

    def forward(self, *inputs):
        return self.repeat(lambda *x: self.compute(self, *x), *inputs)


UNKNOWN = torch.randn(4)


def counts(module, x):
    module.count += 1
    return x * module.count


@pytest.mark.parametrize(
    "compute",
    [
        lambda module, x: x + torch.rand_like(x),
        lambda module, x: torch.nn.functional.dropout(x, 0.5),
        lambda module, x: x * float(x.sum()),
        lambda module, x: x if x.sum() > 0 else -x,
        lambda module, x: x[x > 0],
        lambda module, x: x + UNKNOWN,
        lambda module, x: x.add_(1.0),
        lambda module, x: x.view(-1).mul_(2.0),
        lambda module, x: module.weight,
        counts,
    ],
)
def test_what_cannot_be_repeated_is_computed_each_time(compute):
    module = Watched(compute)
    module.prepare_repetition(True)
    with torch.no_grad():
        for number in range(5):
            x = torch.full((3, 4), number - 2.0)
            torch.manual_seed(number)
            found = module(x.clone())
            torch.manual_seed(number)
            if compute is counts:
                assert torch.equal(found, x * (number + 1))
            else:
                assert torch.equal(found, compute(module, x.clone()))
    assert module._repeater.recorded == 0


@pytest.mark.parametrize(
    "compute",
    [
        lambda module, x: x @ module.weight.t(),
        lambda module, x: (x + 1).mul_(2.0).chunk(2, dim=1),
        lambda module, x: {"x": x, "twice": [2 * x, None, "text"]},
        lambda module, x: torch.nn.functional.dropout(x, 0.5, training=False),
        lambda module, x: torch.nn.functional.linear(x, module.weight),
        lambda module, x: torch.cat([x, x.new_zeros(1, 4)]).sort(0),
    ],
)
def test_what_can_be_repeated(compute):
    module = Watched(compute)
    module.prepare_repetition(True)
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(3, 4)
            found, expected = tree_flatten(module(x)), tree_flatten(compute(module, x))
            assert found[1] == expected[1]
            for a, b in zip(found[0], expected[0], strict=True):
                assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
            module.weight.mul_(1.5)
        module.weight.data = torch.randn(4, 4)
        assert all(map(_equal, tree_leaves(module(x)), tree_leaves(compute(module, x))))
    assert module._repeater.recorded == 1


def _equal(a, b):
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_inputs_that_were_one_tensor():
    module = Watched(lambda module, x, y: x - 2 * y)
    module.prepare_repetition(True)
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(module(x, x), -x)
            module(x, x)
            assert torch.equal(module(x, y), x - 2 * y)
            module(x, y)
    assert module._repeater.recorded == 2


def test_arguments_that_are_no_tensors():
    module = Watched(lambda module, x, factor: x * factor)
    module.prepare_repetition(True)
    x = torch.randn(3, 4)
    with torch.no_grad():
        for factor in (2, 2, 2, 3, 3, 2):
            assert torch.equal(module(x, factor), x * factor)
    assert module._repeater.recorded == 2


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


@pytest.mark.parametrize("change", [update_in_place, update_running_variance, write_through_data])
def test_a_frozen_model_notices_new_values_of_its_weights(stock, fast, change):
    fastvit_kernels.accelerate(fast, inference=True, frozen=True)
    x = image(2, 3, 64, 48)
    record(fast, x)
    change(fast)
    change(stock)
    assert_same(stock, fast, x)


def test_a_frozen_model_looks_at_nothing_else_until_it_is_no_longer(stock, fast, monkeypatch):
    fastvit_kernels.accelerate(fast, inference=True, frozen=True)
    x = image(2, 3, 64, 48)
    record(fast, x)
    monkeypatch.setattr(Watch, "unchanged", lambda watch: pytest.fail("looked"))
    with torch.no_grad():
        before = fast(x)
        change_layer_norm_eps(fast)
        assert torch.equal(fast(x), before)
    # The mode of the model itself belongs to the call.
    state = copy.deepcopy(fast.state_dict())
    assert not repeats(fast.train(), x)
    fast.eval().load_state_dict(state)
    monkeypatch.undo()
    fastvit_kernels.accelerate(fast, inference=True)
    change_layer_norm_eps(stock)
    assert_same(stock, fast, x)
    with pytest.raises(ValueError, match="frozen: expected inference=True"):
        fastvit_kernels.accelerate(fast, frozen=True)


def test_gradients_are_not_lost(stock, fast):
    x = image(2, 3, 64, 48).requires_grad_()
    (expected,) = torch.autograd.grad(stock(x).sum(), x)
    (found,) = torch.autograd.grad(fast(x).sum(), x)
    assert relative_l2(found, expected) < 1e-4


def test_a_chosen_backend_is_used(fast):
    x = image(2, 3, 64, 48)
    with fastvit_kernels.use_backend("reference"):
        assert not repeats(fast, x)
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


def test_a_hook_costs_no_records_and_loses_none(fast):
    x = image(2, 3, 64, 48)
    hook = blocks(fast)[0].attn.register_forward_hook(lambda module, args, out: None)
    with mock.patch.object(fast._repeater, "_record", side_effect=AssertionError):
        assert not any(repeats(fast, x) for _ in range(3))
        hook.remove()
        assert repeats(fast, x)


def test_a_module_that_changes_at_every_call_is_not_recorded_for_ever():
    def compute(module, x):
        module.calls = getattr(module, "calls", 0) + 1
        return x * module.calls

    module = Watched(compute)
    module.prepare_repetition(True)
    x, recorded = torch.ones(3, 4), []
    record_once = module._repeater._record
    module._repeater._record = lambda *args: recorded.append(args) or record_once(*args)
    with torch.no_grad():
        for number in range(20):
            assert torch.equal(module(x), x * (number + 1))
    assert len(recorded) <= 3


class Adapted(nn.Linear):
    """A user's class: what it computes depends on things that nobody can watch."""

    factor = 1.0

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self._enabled = True
        self.scaling = {"a": 2.0}

    def forward(self, x):
        y = super().forward(x) * self.factor * self.scaling["a"]
        if not self._enabled:
            return -y
        return y if y.detach().numpy().max() > 0 else y + 3


def disable(head):
    head._enabled = False


def rescale(head):
    head.scaling["a"] = 5.0


def change_the_class(head):
    Adapted.factor = 3.0


@pytest.mark.parametrize("change", [disable, rescale, change_the_class])
def test_code_of_users_is_always_called(stock, monkeypatch, change):
    monkeypatch.setattr(Adapted, "factor", 1.0)
    torch.manual_seed(0)
    stock.head = Adapted(48, 7)
    fast = copy.deepcopy(stock)
    fastvit_kernels.accelerate(fast, inference=True)
    x = image(2, 3, 64, 48)
    for _ in range(3):
        assert_same(stock, fast, x)
    assert_same(stock, fast, -x)
    change(stock.head)
    change(fast.head)
    assert_same(stock, fast, x)
    assert fast._repeater.recorded == 0


def cut_the_classes(model):
    model.head.weight.data = model.head.weight.data[:5]
    model.head.bias.data = model.head.bias.data[:5]


def turn_a_weight(model):
    weight = block_of(model).attn.proj.weight
    weight.data = weight.data.t()


def widen_a_norm(model):
    model.norm.bias.data = model.norm.bias.data[:1].expand(48)


def lay_out_anew(model):
    model.stage0.patch_embed.proj.weight.data = model.stage0.patch_embed.proj.weight.data.contiguous(
        memory_format=torch.channels_last
    )


def replace_the_hooks(model):
    for module in model.modules():
        module._forward_hooks = OrderedDict()
    model.head.register_forward_hook(lambda module, args, out: out * 2)


def replace_the_parameters(model):
    model.head._parameters = {name: nn.Parameter(p * 3) for name, p in model.head._parameters.items()}


def replace_the_children(model):
    model._modules = {**model._modules, "head": nn.Identity()}


def fill_an_empty_list(model):
    model.stage0.blocks.append(copy.deepcopy(model.stage0.blocks[0]))


@pytest.mark.parametrize(
    "change",
    [
        cut_the_classes,
        turn_a_weight,
        widen_a_norm,
        lay_out_anew,
        replace_the_hooks,
        replace_the_parameters,
        replace_the_children,
        fill_an_empty_list,
    ],
)
def test_a_change_behind_the_modules_backs_is_noticed(stock, fast, change):
    x = image(2, 3, 64, 48)
    change(stock)
    change(fast)
    for _ in range(4):
        assert_same(stock, fast, x)


def test_a_head_without_bias_that_lost_classes(stock):
    stock.head = nn.Linear(48, 7, bias=False)
    fast = copy.deepcopy(stock)
    fastvit_kernels.accelerate(fast, inference=True)
    x = image(2, 3, 64, 48)
    record(fast, x)
    for model in (stock, fast):
        model.head.weight.data = model.head.weight.data[:5]
    assert_same(stock, fast, x)


def test_a_shallow_copy_does_not_take_the_records(stock, fast):
    x = image(2, 3, 64, 48)
    other = copy.copy(fast)
    other._modules = {**fast._modules, "head": nn.Identity()}
    for _ in range(3):
        with torch.no_grad():
            assert other(x).shape == (2, 48)
        assert repeats(fast, x)
    assert_same(stock, fast, x)


def test_inputs_that_cannot_be_compared():
    module = Watched(lambda module, x, factors: x * factors[0])
    module.prepare_repetition(True)
    x = torch.randn(3, 4)
    with torch.no_grad():
        for factor in (2, 2, 2, 3):
            assert torch.equal(module(x, [factor]), x * factor)
    assert module._repeater.recorded == 0


def test_changes_while_other_threads_repeat(fast):
    x, stop, block = image(1, 3, 33, 33), threading.Event(), block_of(fast)

    def run(number):
        with torch.no_grad():
            while not stop.is_set():
                fast(x)
        return True

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(3) as pool:
            running = pool.map(run, range(3))
            try:
                for number in range(60):
                    block.norm1.eps = 1e-5 * (1 + number % 2)
                    fast._repeater._wasted = 0
                    with torch.no_grad():
                        block.mlp.fc1.weight.mul_(1.0)
                    time.sleep(0.01)
            finally:
                stop.set()
            assert all(running)
    finally:
        sys.setswitchinterval(interval)


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
