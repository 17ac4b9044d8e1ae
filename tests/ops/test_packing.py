"""PackedWeights: when weights are packed again, and that a result never comes from old ones."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading

import pytest
import torch

from fastvit_kernels import ops
from fastvit_kernels.ops import library
from fastvit_kernels.ops.packing import PackedWeights
from fastvit_kernels.testing import inputs
from fastvit_kernels.testing.raw import raw_call

# Those with weights that can be packed.
OPERATORS = tuple(name for name in inputs.CASES if "packed" in inspect.signature(getattr(ops, name)).parameters)


@pytest.fixture
def count_packs(monkeypatch):
    """How often each operator's weights have been packed."""
    counts = dict.fromkeys(OPERATORS, 0)
    for name in OPERATORS:
        packet = getattr(torch.ops.fastvit, f"{name}_pack")
        original = packet.default

        def count(*args, name=name, original=original):
            counts[name] += 1
            return original(*args)

        monkeypatch.setattr(packet, "default", count)
    return counts


def _call(name, precision=inputs.FP32):
    return inputs.tagged(inputs.CASES[name], "smallest")[0].call(precision)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("packed", [1, True, torch.zeros(3)], ids=["int", "bool", "tensor"])
def test_anything_else_is_refused(name, packed):
    call = _call(name)
    with pytest.raises(TypeError, match=f"packed: expected PackedWeights or None, got {type(packed).__name__}"):
        call.function(**call.arguments, packed=packed)


def _outputs(call, packed=None):
    with torch.no_grad():
        found = call.function(**call.arguments, packed=packed, backend="cpu")
    return [found] if isinstance(found, torch.Tensor) else list(found)


def _same(call, packed):
    return all(torch.equal(a, b) for a, b in zip(_outputs(call, packed), _outputs(call), strict=True))


def _weights(call):
    activations = ("x", "q", "k", "v", "norm_statistics", "in_norm_statistics", "residual")
    return {name: t for name, t in (call.leaves() | call.buffers()).items() if name not in activations}


@pytest.mark.parametrize("name", OPERATORS)
def test_packed_once_while_nothing_changes(name, count_packs):
    call, packed = _call(name), PackedWeights()
    assert packed.nbytes == 0
    for _ in range(3):
        assert _same(call, packed)
    assert count_packs[name] == 1
    assert packed.nbytes > 0


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("precision", [inputs.FP32, inputs.BF16, inputs.BF16_FP32], ids=str)
def test_same_bits_with_and_without(name, precision):
    for case in inputs.CASES[name]:
        call, packed = case.call(precision), PackedWeights()
        assert _same(call, packed) and _same(call, packed), case.name


@pytest.mark.parametrize("name", OPERATORS)
def test_every_weight_is_noticed_when_updated_in_place(name, count_packs):
    call, packed = _call(name), PackedWeights()
    assert _same(call, packed)
    for number, (weight_name, weight) in enumerate(_weights(call).items()):
        before = _outputs(call, packed)
        weight.mul_(1.5)
        assert _same(call, packed), weight_name
        assert not all(torch.equal(a, b) for a, b in zip(before, _outputs(call), strict=True)), weight_name
        assert count_packs[name] == number + 2, weight_name


@pytest.mark.parametrize("name", OPERATORS)
def test_every_weight_is_noticed_when_replaced(name, count_packs):
    call, packed = _call(name), PackedWeights()
    for number, (weight_name, weight) in enumerate(_weights(call).items()):
        assert _same(call, packed)
        assert count_packs[name] == number + 1
        call = call.with_leaves({weight_name: weight * 1.5})
        assert _same(call, packed), weight_name


@pytest.mark.parametrize("name", OPERATORS)
def test_a_write_through_data_never_gives_the_old_result(name):
    """No version counter sees it; the kernel compares samples, which a change of every element cannot escape."""
    call, packed = _call(name), PackedWeights()
    assert _same(call, packed)
    for weight_name, weight in _weights(call).items():
        weight.data.mul_(1.5)
        assert _same(call, packed), weight_name
        weight.data = weight.data * 1.5
        assert _same(call, packed), weight_name


def test_an_optimizer_step_is_noticed():
    call, packed = _call("pointwise_mlp"), PackedWeights()
    weight = torch.nn.Parameter(call.arguments["weight1"])
    call = call.with_leaves({"weight1": weight})
    assert _same(call, packed)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert _same(call, packed)


def test_address_reuse_is_not_taken_for_the_same_weight():
    """Weights replaced again and again, each freed before the next is made, so that addresses repeat."""
    call, packed = _call("pointwise_mlp"), PackedWeights()
    shape = call.arguments["weight1"].shape
    for seed in range(20):
        del call.arguments["weight1"]
        call.arguments["weight1"] = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        assert _same(call, packed)


def test_precisions_may_alternate(count_packs):
    fp32 = _call("pointwise_mlp")
    packed = PackedWeights()
    for _ in range(2):
        assert _same(fp32, packed)
        with torch.autocast("cpu", torch.bfloat16):
            assert _same(fp32, packed)
    assert count_packs["pointwise_mlp"] == 4


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        call, packed = _call("pointwise_mlp"), PackedWeights()
        assert _same(call, packed) and _same(call, packed)
        call.arguments["weight1"].mul_(1.5)
        assert _same(call, packed)


@pytest.mark.parametrize("name", OPERATORS)
def test_weights_in_another_layout(name, count_packs):
    """`model.to(memory_format=torch.channels_last)` is such a layout: packed once like any other, and watched."""
    call, packed = _call(name), PackedWeights()
    expected = _outputs(call)
    other = call.with_leaves({key: _last_axis_first(t) for key, t in _weights(call).items() if t.ndim > 1})
    assert any(not t.is_contiguous() for t in _weights(other).values())
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(_outputs(other, packed), expected, strict=True))
    assert count_packs[name] == 1
    for weight_name, weight in _weights(other).items():
        weight.data.mul_(1.5)
        assert _same(other, packed), weight_name


@pytest.mark.parametrize("name", OPERATORS)
def test_packed_weights_of_another_layout_are_not_copied_at_each_call(name):
    call, packed = _call(name), PackedWeights()
    other = call.with_leaves({key: _last_axis_first(t) for key, t in _weights(call).items() if t.ndim > 1})
    _outputs(other, packed)
    with torch.profiler.profile() as profile:
        _outputs(other, packed)
    names = {event.name for event in profile.events()}
    assert not names & {"aten::contiguous", "aten::clone", "aten::copy_"}


def _last_axis_first(t):
    return t.movedim(-1, 0).contiguous().movedim(0, -1)


def test_unused_for_training_and_other_backends(count_packs):
    call, packed = _call("pointwise_mlp"), PackedWeights()
    call.function(**call.arguments, packed=packed, backend="reference")
    call = call.fresh()
    call.leaves()["x"].requires_grad_()
    call.function(**call.arguments, packed=packed, backend="cpu")
    assert count_packs["pointwise_mlp"] == 0 and packed.nbytes == 0


def test_copies_and_pickles_start_empty():
    call, packed = _call("pointwise_mlp"), PackedWeights()
    _outputs(call, packed)
    for other in (copy.copy(packed), copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert type(other) is PackedWeights and other.nbytes == 0
    assert packed.nbytes > 0


@pytest.mark.parametrize("name", ["conv_projection", "patch_embedding", "pointwise_mlp"])
def test_with_and_without_a_norm_that_has_no_weights(name, count_packs):
    """What is packed differs, though no weight does."""
    call, packed = _call(name), PackedWeights()
    plain = {k: None if k in ("norm_weight", "norm_bias") else v for k, v in call.arguments.items()}
    for norm_eps in (1e-5, None, 1e-5):
        other = type(call)(call.function, {**plain, "norm_eps": norm_eps})
        assert _same(other, packed) and _same(other, packed)
    assert count_packs[name] == 3


@pytest.mark.parametrize("name", OPERATORS)
def test_freed_memory_is_refused(name):
    """FSDP frees the storage of weights between uses; reading it would end the process."""
    for victim, weight in _weights(_call(name)).items():
        for offset in (0, 16):
            call = _call(name)
            flat = torch.cat([weight.new_zeros(offset), weight.flatten()])
            _weights(call)[victim].data = flat[offset:].view(weight.shape)
            _outputs(call)
            flat.untyped_storage().resize_(0)
            if weight.numel() > 0:
                with pytest.raises(RuntimeError):
                    _outputs(call)
    call, packed = _call(name), PackedWeights()
    _outputs(call, packed)
    tensors, static = raw_call(call)
    block = packed.get(library.operators[name], tensors, static)
    block.untyped_storage().resize_(0)
    operator = getattr(torch.ops.fastvit, name).default
    found, expected = operator(tensors, block, *static), operator(tensors, None, *static)
    found, expected = ([r] if isinstance(r, torch.Tensor) else r for r in (found, expected))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_shared_by_threads_with_different_weights():
    """Two threads that keep taking one PackedWeights from each other still get their own results."""
    packed, calls = PackedWeights(), [inputs.tagged(inputs.POINTWISE_MLP, "smallest")[0].call(seed=s) for s in (1, 2)]
    wanted = [_outputs(call) for call in calls]
    wrong, barrier = [], threading.Barrier(2)

    def work(index):
        barrier.wait()
        for _ in range(200):
            if not torch.equal(_outputs(calls[index], packed)[0], wanted[index][0]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("name", OPERATORS)
def test_compiled_calls_do_not_use_them(name):
    """A graph could not notice a change of a few elements; it reads the weights themselves."""
    call, packed = _call(name), PackedWeights()
    _outputs(call, packed)
    torch._dynamo.reset()

    def run(arguments):
        return call.function(**arguments, packed=packed, backend="cpu")

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        with torch.no_grad():
            found = compiled(call.arguments)
        found = [found] if isinstance(found, torch.Tensor) else list(found)
        assert all(torch.equal(a, b) for a, b in zip(found, _outputs(call), strict=True))
        for weight in _weights(call).values():
            weight.view(-1)[1:-1] *= 1.25


def test_a_packing_for_something_else_is_not_used():
    """The operator itself checks what it is given, whoever calls it."""
    one, other = _call("pointwise_mlp"), inputs.pointwise_mlp_case("other", channels=24).call()
    operator = library.operators["pointwise_mlp"]
    foreign = PackedWeights().get(operator, *raw_call(other))
    tensors, static = raw_call(one)
    found = torch.ops.fastvit.pointwise_mlp.default(tensors, foreign, *static)
    assert torch.equal(found, _outputs(one)[0])
    for junk in (torch.zeros(0, dtype=torch.uint8), torch.full((foreign.numel(),), 255, dtype=torch.uint8)):
        assert torch.equal(torch.ops.fastvit.pointwise_mlp.default(tensors, junk, *static), _outputs(one)[0])
    own = PackedWeights().get(operator, tensors, static)
    with pytest.raises(RuntimeError, match="packed: damaged"):
        torch.ops.fastvit.pointwise_mlp.default(tensors, own[:-64].contiguous(), *static)


def test_packed_weights_lie_side_by_side():
    """Of one size or another, on the shelf or with memory of their own, and longer than the shelf is known."""
    shelve = torch.ops.fastvit.shelve.default
    torch.ops.fastvit.release_memory()
    blocks = [torch.randint(0, 255, (size,), dtype=torch.uint8) for size in (0, 64, 1000, 4096, 9 << 20, 64)]
    shelved = [shelve(block) for block in blocks]
    small = [block.data_ptr() for block in shelved if 0 < block.numel() < 1 << 20]
    assert all(address % 64 == 0 for address in small)
    assert [address - small[0] for address in small] == [0, 64, 1088, 5184]
    assert torch.ops.fastvit.release_memory() >= 32 << 20
    assert shelve(blocks[1]).data_ptr() not in small
    assert all(torch.equal(a, b) for a, b in zip(shelved, blocks, strict=True))
    torch.library.opcheck(shelve, (blocks[1],), test_utils=("test_schema", "test_autograd_registration"))


@pytest.mark.parametrize(
    "block", [torch.zeros(2, 64, dtype=torch.uint8), torch.zeros(64), torch.zeros(128, dtype=torch.uint8)[::2]]
)
def test_only_rows_of_bytes_are_shelved(block):
    with pytest.raises(RuntimeError, match="block: expected a row of bytes"):
        torch.ops.fastvit.shelve.default(block)
