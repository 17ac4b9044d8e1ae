"""accelerate and restore: what they change, what they report, and that nothing else moves."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import training_models
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastvit_kernels
from fastvit_kernels import _extension
from fastvit_kernels.models import create_model
from fastvit_kernels.nn import ConvProjectionAttention, PatchEmbedding, PointwiseMLP
from fastvit_kernels.testing import relative_l2

# The fixture's model has three patch embeddings and six layers with three operators each.
KNOWN, OPERATORS = 9, 21
TINY = {"depths": (1, 1, 2), "embed_dims": (16, 32, 64), "num_heads": (1, 2, 4), "num_classes": 7}


@pytest.fixture(autouse=True)
def usual_choice():
    """Whatever FASTVIT_BACKEND says."""
    with fastvit_kernels.use_backend("auto"):
        yield


@pytest.fixture
def image():
    return torch.randn(2, 3, 48, 64, generator=torch.Generator().manual_seed(3))


def own_modules(model):
    return [
        module
        for module in model.modules()
        if isinstance(module, (ConvProjectionAttention, PatchEmbedding, PointwiseMLP))
    ]


def snapshot(model):
    """Everything `restore` must put back: classes, attributes, and the identity of all that modules hold."""
    found = {}
    for path, module in model.named_modules():
        attributes = {}
        for key, value in module.__dict__.items():
            inner = {name: id(item) for name, item in value.items()} if isinstance(value, dict) else None
            attributes[key] = (type(value), id(value), inner)
        found[path] = (type(module), id(module), attributes)
    return found


def logits(model, x):
    with torch.no_grad():
        output = model(x)
    return output if isinstance(output, torch.Tensor) else output.logits


@pytest.mark.parametrize("inference", [False, True])
def test_restore_is_exact(tiny_cvt, image, inference):
    model = tiny_cvt()
    model.register_forward_hook(lambda *args: None)
    before, expected = snapshot(model), logits(model, image)
    assert fastvit_kernels.accelerate(model, inference=inference, backend="reference")
    assert snapshot(model) != before
    logits(model, image)
    report = fastvit_kernels.restore(model)
    assert len(report.replaced) == KNOWN and not report.left_alone and report
    assert snapshot(model) == before
    assert torch.equal(logits(model, image), expected)
    again = fastvit_kernels.restore(model)
    assert not again and "nothing in this model is accelerated" in str(again)


def test_only_the_class_and_one_entry_change(tiny_cvt):
    model = tiny_cvt()
    before = snapshot(model)
    names = list(model.state_dict())
    report = fastvit_kernels.accelerate(model)
    replaced = {entry.path for entry in report.replaced}
    for path, (cls, identity, attributes) in snapshot(model).items():
        if path in replaced:
            assert cls is not before[path][0] and issubclass(cls, before[path][0])
            del attributes["_fastvit"]
        else:
            assert cls is before[path][0]
        assert (identity, attributes) == before[path][1:]
    assert list(model.state_dict()) == names


def test_repeating_changes_nothing(tiny_cvt, image):
    model = tiny_cvt()
    first = fastvit_kernels.accelerate(model)
    once = snapshot(model)
    second = fastvit_kernels.accelerate(model)
    assert first and not second and snapshot(model) == once
    assert [entry.path for entry in second.left_alone] == [entry.path for entry in first.replaced]
    assert all(entry.reasons == ("already accelerated",) for entry in second.left_alone)


def test_up_to_inference_and_back(tiny_cvt, image):
    model = tiny_cvt()
    expected = logits(model, image)
    fastvit_kernels.accelerate(model)
    once = snapshot(model)
    up = fastvit_kernels.accelerate(model, inference=True)
    assert len(up.replaced) == KNOWN
    assert all(entry.after == f"{entry.before}, weights packed" for entry in up.replaced)
    assert not fastvit_kernels.accelerate(model, inference=True)
    assert relative_l2(logits(model, image), expected) <= 1e-5
    down = fastvit_kernels.accelerate(model)
    assert len(down.replaced) == KNOWN and snapshot(model) == once
    assert relative_l2(logits(model, image), expected) <= 1e-5


def test_a_chosen_backend_runs(tiny_cvt, image):
    model = tiny_cvt()
    fastvit_kernels.accelerate(model, backend="reference")
    decisions = fastvit_kernels.explain(model, image).decisions
    assert {decision.chosen for decision in decisions} == {"reference"}
    fastvit_kernels.accelerate(model, backend="cuda", inference=True)
    with pytest.raises(fastvit_kernels.BackendError, match="cuda"):
        logits(model, image)
    report = fastvit_kernels.accelerate(model)
    assert report.replaced[-1].before == "FusedCvtLayer, weights packed, backend 'cuda'"
    logits(model, image)


def test_reports_read_well(tiny_cvt):
    model = tiny_cvt()
    model.cvt.encoder.stages[2].layers[1].intermediate.activation = nn.GELU("tanh")
    report = fastvit_kernels.accelerate(model)
    lines = str(report).splitlines()
    assert lines[0] == "accelerate: 8 replaced, 1 left alone"
    assert lines[1].split() == ["replaced", "was", "is"]
    assert ["cvt.encoder.stages.0.layers.0", "CvtLayer", "FusedCvtLayer"] in [line.split() for line in lines]
    assert lines[-1].startswith("cvt.encoder.stages.2.layers.1  CvtLayer  the activation is GELU(approximate='tanh')")
    assert max(len(line) - len(line.rstrip()) for line in lines) == 0


def test_a_model_with_nothing_known():
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU())
    before = snapshot(model)
    report = fastvit_kernels.accelerate(model)
    assert not report and not report.left_alone and snapshot(model) == before
    assert "nothing in this model is known" in str(report) and "CvtLayer" in str(report)


@pytest.mark.parametrize("call", [fastvit_kernels.accelerate, fastvit_kernels.restore, fastvit_kernels.explain])
def test_anything_but_a_module_is_an_error(call):
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got function"):
        call(lambda x: x)


def test_an_unknown_backend_changes_nothing(tiny_cvt):
    model = tiny_cvt()
    before = snapshot(model)
    with pytest.raises(ValueError, match="backend: unknown backend 'avx'"):
        fastvit_kernels.accelerate(model, backend="avx")
    assert snapshot(model) == before


def test_wrappers_are_searched(tiny_cvt, image):
    model = nn.DataParallel(tiny_cvt())
    expected = logits(model, image)
    report = fastvit_kernels.accelerate(model)
    assert len(report.replaced) == KNOWN and report.replaced[0].path.startswith("module.cvt.encoder")
    assert relative_l2(logits(model, image), expected) <= 1e-5


def test_a_layer_used_twice_is_replaced_once(tiny_cvt):
    layer = tiny_cvt().cvt.encoder.stages[0].layers[0]
    model = nn.ModuleList([layer, layer])
    assert len(fastvit_kernels.accelerate(model).replaced) == 1
    assert len(fastvit_kernels.restore(model).replaced) == 1


def test_a_class_changed_again_is_reported_by_restore(tiny_cvt):
    layer = tiny_cvt().cvt.encoder.stages[0].layers[0]
    fastvit_kernels.accelerate(layer)
    fused = type(layer)
    wrapped = type("Wrapped", (fused,), {})
    layer.__class__ = wrapped
    assert "derives from FusedCvtLayer" in str(fastvit_kernels.accelerate(layer))
    report = fastvit_kernels.restore(layer)
    assert not report and "was changed again" in str(report) and type(layer) is wrapped
    layer.__class__ = fused
    assert fastvit_kernels.restore(layer)


def test_an_optimizer_from_before_trains_on(tiny_cvt, image):
    stock = tiny_cvt().train()
    fused = copy.deepcopy(stock)
    labels = torch.tensor([1, 4])
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in (stock, fused)]
    fastvit_kernels.accelerate(fused, inference=True)
    for _ in range(3):
        for model, optimizer in zip((stock, fused), optimizers, strict=True):
            optimizer.zero_grad()
            model(image, labels=labels).loss.backward()
            optimizer.step()
    assert relative_l2(logits(fused.eval(), image), logits(stock.eval(), image)) <= 1e-3
    moved = [torch.equal(p, q) for p, q in zip(fused.parameters(), tiny_cvt().parameters(), strict=True)]
    assert not any(moved)


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_torch_save])
def test_copies_are_accelerated_and_independent(tiny_cvt, image, duplicate):
    model = tiny_cvt()
    expected = logits(model, image)
    fastvit_kernels.accelerate(model, inference=True)
    logits(model, image)
    twin = duplicate(model)
    assert not fastvit_kernels.accelerate(twin, inference=True)
    assert relative_l2(logits(twin, image), expected) <= 1e-5
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert relative_l2(logits(model, image), expected) <= 1e-5
    assert float(logits(twin, image).abs().max()) == 0.0
    fastvit_kernels.restore(twin)
    assert type(twin.cvt.encoder.stages[0].layers[0]) is not type(model.cvt.encoder.stages[0].layers[0])


def test_state_dicts_go_both_ways(tiny_cvt, image):
    source, model = tiny_cvt(seed=1), tiny_cvt(seed=2)
    fastvit_kernels.accelerate(model, inference=True)
    logits(model, image)
    model.load_state_dict(source.state_dict(), strict=True)
    assert relative_l2(logits(model, image), logits(source, image)) <= 1e-5
    other = tiny_cvt(seed=3)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(logits(other, image), logits(source, image))


class Packing(TorchDispatchMode):
    """Counts how often weights are packed."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.name().startswith("fastvit::") and function.name().endswith("_pack")
        return function(*args, **(kwargs or {}))


def packed_bytes(model):
    packed = [layer.__dict__["_fastvit"].packed for layer in model.modules() if "_fastvit" in layer.__dict__]
    return [weights.nbytes for entry in packed for weights in entry.values()]


def test_weights_are_packed_at_once(tiny_cvt):
    model = tiny_cvt()
    fastvit_kernels.accelerate(model, inference=True)
    sizes = packed_bytes(model)
    assert len(sizes) == OPERATORS
    if _extension.parts["cpu"].loaded:
        assert min(sizes) > 0
    training = tiny_cvt().train()
    statistics = [buffer.clone() for buffer in training.buffers()]
    fastvit_kernels.accelerate(training, inference=True)
    assert set(packed_bytes(training)) == {0}
    assert all(map(torch.equal, training.buffers(), statistics))


@pytest.mark.parametrize("duplicate", [False, True])
def test_packed_once_for_all_calls(tiny_cvt, image, duplicate):
    model = tiny_cvt()
    if duplicate:
        fastvit_kernels.accelerate(model, inference=True)
        model = copy.deepcopy(model)
    with Packing() as packing:
        fastvit_kernels.accelerate(model, inference=True)
    assert packing.count == (OPERATORS if _extension.parts["cpu"].loaded else 0)
    with Packing() as packing:
        logits(model, image)
        logits(model, image[:1, :, :32])
    assert packing.count == 0


def load(model):
    model.load_state_dict({name: 0.8 * value for name, value in model.state_dict().items()})


def load_by_assignment(model):
    state = {name: (0.8 * value).to(value.dtype) for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def in_place(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.8)


def through_data(model):
    for parameter in model.parameters():
        parameter.data.mul_(0.8)


def assigned_data(model):
    for parameter in model.parameters():
        parameter.data = 0.8 * parameter.data


def replaced_parameter(model):
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                setattr(module, name, nn.Parameter(0.8 * parameter.detach()))


def statistics(model):
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.mul_(0.5)


def in_inference_mode(model):
    with torch.inference_mode():
        for parameter in model.parameters():
            parameter.mul_(0.8)


def optimizer_step(model):
    x = torch.ones(2, 3, 48, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    model(x, labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def training_steps(model):
    model.train()
    optimizer_step(model)
    model.eval()


CHANGES = [
    load,
    load_by_assignment,
    in_place,
    through_data,
    assigned_data,
    replaced_parameter,
    statistics,
    in_inference_mode,
    optimizer_step,
    training_steps,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_of_the_weights_is_noticed(tiny_cvt, image, change):
    stock = tiny_cvt()
    fused = copy.deepcopy(stock)
    fastvit_kernels.accelerate(fused, inference=True)
    before = logits(fused, image)
    for _ in range(2):
        for model in (stock, fused):
            change(model)
        expected = logits(stock, image)
        assert relative_l2(expected, before) > 1e-4
        assert relative_l2(logits(fused, image), expected) <= 1e-5
        before = expected


def test_another_dtype_is_noticed(tiny_cvt, image):
    stock = tiny_cvt()
    fused = copy.deepcopy(stock)
    fastvit_kernels.accelerate(fused, inference=True)
    exact = logits(copy.deepcopy(stock).double(), image.double())
    for dtype, allowed in ((torch.bfloat16, 0.1), (torch.float64, 0.02), (torch.float32, 0.02)):
        found = logits(fused.to(dtype), image.to(dtype))
        assert found.dtype == dtype and relative_l2(found, exact) <= allowed
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert relative_l2(fused(image).logits, exact) <= 0.1
    assert relative_l2(logits(fused, image), logits(fused.double(), image.double())) <= 1e-5


@pytest.mark.parametrize("inference", [False, True])
def test_gradients_never_come_from_packed_weights(tiny_cvt, image, inference):
    stock = tiny_cvt()
    fused = copy.deepcopy(stock)
    fastvit_kernels.accelerate(fused, inference=inference)
    gradients = []
    for model in (stock, fused):
        logits(model, image)
        through_data(model)
        x = image.clone().requires_grad_()
        model(x).logits.square().sum().backward()
        gradients.append(x.grad)
    assert relative_l2(*reversed(gradients)) <= 1e-4


def test_functional_call_uses_the_given_weights(tiny_cvt, image):
    stock = tiny_cvt()
    fused = copy.deepcopy(stock)
    fastvit_kernels.accelerate(fused, inference=True)
    logits(fused, image)
    other = {name: 0.8 * parameter.detach() for name, parameter in stock.named_parameters()}
    with torch.no_grad():
        expected, found = (torch.func.functional_call(model, other, (image,)).logits for model in (stock, fused))
    assert relative_l2(found, expected) <= 1e-5


@pytest.mark.parametrize("pin", ["reference", None])
def test_own_models_are_released_and_pinned_again(image, pin):
    torch.manual_seed(0)
    model = create_model("cvt_13", **TINY, backend=pin).eval()
    before, expected = snapshot(model), logits(model, image)
    report = fastvit_kernels.accelerate(model)
    assert all(module.backend is None for module in own_modules(model))
    assert len(report.replaced if pin else report.left_alone) == len(own_modules(model)) == 11
    if pin:
        assert report.replaced[0].before == "PatchEmbedding, backend 'reference'"
        assert report.replaced[0].after == "PatchEmbedding"
    packed = fastvit_kernels.accelerate(model, inference=True)
    assert len(packed.replaced) == 11
    assert relative_l2(logits(model, image), expected) <= 1e-5
    assert not fastvit_kernels.accelerate(model, inference=True)
    assert len(fastvit_kernels.restore(model).replaced) == 11
    assert snapshot(model) == before
    assert {module.backend for module in own_modules(model)} == {pin}


def test_a_pin_to_a_real_backend_stays_unless_another_is_asked_for():
    module = PointwiseMLP(8, 16).eval()
    module.backend = "cpu"
    assert not fastvit_kernels.accelerate(module) and module.backend == "cpu"
    assert fastvit_kernels.accelerate(module, backend="triton") and module.backend == "triton"
    assert fastvit_kernels.accelerate(module) and module.backend == "cpu"
    fastvit_kernels.accelerate(module, backend="reference")
    fastvit_kernels.restore(module)
    assert module.backend == "cpu" and "_fastvit" not in module.__dict__


def test_own_weights_are_packed_at_once(image):
    model = create_model("cvt_13", **TINY).eval()
    calls = []
    for name in ("attn", "attn.proj_drop", "mlp", "drop_path"):
        model.stage2.blocks[0].get_submodule(name).register_forward_hook(lambda *args: calls.append(args))
    with Packing() as packing:
        fastvit_kernels.accelerate(model, inference=True)
    # Not the attention with hooks on what it would call, which packs at its first call.
    assert not calls and packing.count == (10 if _extension.parts["cpu"].loaded else 0)
    for module in model.modules():
        module._forward_hooks.clear()
    expected = logits(model, image)
    with Packing() as packing:
        assert torch.equal(logits(model, image), expected)
    assert packing.count == 0


@pytest.mark.parametrize("change", [load, in_place, through_data, statistics], ids=lambda change: change.__name__)
def test_own_models_notice_changed_weights(image, change):
    torch.manual_seed(0)
    plain = create_model("cvt_13", **TINY).eval()
    packed = copy.deepcopy(plain)
    fastvit_kernels.accelerate(packed, inference=True)
    before = logits(packed, image)
    for model in (plain, packed):
        change(model)
    assert relative_l2(logits(plain, image), before) > 1e-4
    assert relative_l2(logits(packed, image), logits(plain, image)) <= 1e-5


@pytest.mark.parametrize("inference", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("name", training_models.MODELS)
def test_no_image_is_a_type_error(name, inference):
    """Every time: what is repeated never stands in for the check."""
    model = training_models.small(name).eval()
    fastvit_kernels.accelerate(model, inference=inference)
    for _ in range(3):
        with torch.no_grad(), pytest.raises(TypeError, match=r"x: expected a torch\.Tensor, got NoneType"):
            model(None)
