"""transformers' CvT on fused operators: the same numbers in every mode, the original code where that is impossible."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from transformers.activations import QuickGELUActivation
from transformers.models.cvt.modeling_cvt import CvtConvEmbeddings, CvtDropPath, CvtLayer

import fastvit_kernels
from fastvit_kernels.integrations.transformers_cvt import FusedCvtLayer
from fastvit_kernels.nn import QuickGELU
from fastvit_kernels.testing import relative_l2

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
OPERATORS = ["conv_projection", "global_attention", "pointwise_mlp"]


def layers(model):
    return [module for module in model.modules() if isinstance(module, CvtLayer)]


def known(model):
    return [module for module in model.modules() if isinstance(module, (CvtLayer, CvtConvEmbeddings))]


def image(*size, dtype=torch.float32, seed=1):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pair(model, inference=False):
    """The model as it is, and an accelerated copy of it."""
    fused = copy.deepcopy(model)
    report = fastvit_kernels.accelerate(fused, inference=inference)
    assert len(report.replaced) == len(known(model)) == 9 and not report.left_alone
    return model, fused


def training_step(model, x, seed=5):
    """Logits, loss, every gradient and every buffer after one step's forward and backward."""
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    output = model(x, labels=torch.arange(len(x)) % 7)
    output.loss.backward()
    gradients = {"input": x.grad, **{name: p.grad for name, p in model.named_parameters()}}
    return {"logits": output.logits, "loss": output.loss, **gradients, **dict(model.named_buffers())}


def assert_same_step(stock, fused, x, tolerance):
    expected, found = training_step(stock, x), training_step(fused, x)
    assert expected.keys() == found.keys()
    # Some gradients are zero but for rounding (the bias of the keys): they are measured against the largest one.
    floor = max(float(value.grad.norm()) for value in stock.parameters())
    for name, value in expected.items():
        difference = float((found[name] - value).detach().double().norm())
        assert difference <= tolerance * max(float(value.detach().double().norm()), floor), name


def fused_calls(model, *inputs):
    """Which operators ran, by module path."""
    calls = {}
    for decision in fastvit_kernels.explain(model, *inputs).decisions:
        calls.setdefault(decision.module, []).append(decision.operator)
    return calls


def layer_calls(model, *inputs):
    """Which operators ran in the layers, by module path."""
    return {path: calls for path, calls in fused_calls(model, *inputs).items() if ".layers." in path}


@pytest.mark.parametrize("inference", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_logits_and_hidden_states(tiny_cvt, dtype, inference):
    stock, fused = pair(tiny_cvt().to(dtype), inference)
    with torch.no_grad():
        for size in ((2, 3, 48, 64), (1, 3, 45, 51)):
            x = image(*size, dtype=dtype)
            expected = stock(x, output_hidden_states=True)
            found = fused(x, output_hidden_states=True)
            assert relative_l2(found.logits, expected.logits) <= TOLERANCE[dtype]
            assert len(found.hidden_states) == len(expected.hidden_states) == 3
            for a, b in zip(found.hidden_states, expected.hidden_states, strict=True):
                assert a.shape == b.shape and relative_l2(a, b) <= TOLERANCE[dtype]


def test_every_module_runs_its_operators(tiny_cvt):
    fused = tiny_cvt()
    fastvit_kernels.accelerate(fused)
    calls = fused_calls(fused, image(1, 3, 48, 64))
    assert {path: fused.get_submodule(path) for path in calls} == {
        path: module for path, module in fused.named_modules() if module in known(fused)
    }
    for path, operators in calls.items():
        assert operators == (OPERATORS if ".layers." in path else ["patch_embedding"])


def test_the_arithmetic_is_tested_by_a_model_that_reacts(tiny_cvt):
    """A change of any layer shows in the logits far above the tolerances used here."""
    model = tiny_cvt()
    x = image(2, 3, 48, 64)
    with torch.no_grad():
        before = model(x).logits
        for layer in layers(model):
            changed = copy.deepcopy(layer.attention.attention.projection_value.weight)
            layer.attention.attention.projection_value.weight.mul_(1.01)
            assert relative_l2(model(x).logits, before) > 1e-4
            layer.attention.attention.projection_value.weight.copy_(changed)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_training_step(tiny_cvt, dtype):
    stock, fused = pair(tiny_cvt().train().to(dtype))
    assert_same_step(stock, fused, image(3, 3, 48, 64, dtype=dtype), 20 * TOLERANCE[dtype])


@pytest.mark.parametrize("rate", ["drop_rate", "attention_drop_rate", "drop_path_rate"])
def test_dropouts_draw_the_same_numbers(tiny_cvt, rate):
    rates = [0.3, 0.3, 0.3]
    model = tiny_cvt(**{rate: rates}).train().double()
    if rate == "drop_path_rate":
        # The first rate of a stage is 0, and all layers of the first stage get that one.
        assert [type(layer.drop_path) for layer in layers(model)] == [nn.Identity, *[CvtDropPath] * 5]
    stock, fused = pair(model)
    x = image(4, 3, 48, 64, dtype=torch.float64)
    once, again = (copy.deepcopy(stock)(x).logits for _ in range(2))
    assert relative_l2(once, again) > 1e-3
    assert_same_step(stock, fused, x, 1e-10)


def test_attention_dropout_runs_the_attention_unfused_in_training_only(tiny_cvt):
    model = tiny_cvt(attention_drop_rate=[0.3, 0.3, 0.3])
    fastvit_kernels.accelerate(model)
    x = image(2, 3, 48, 64)
    assert list(layer_calls(model, x).values()) == [OPERATORS] * 6
    assert list(layer_calls(model.train(), x).values()) == [["pointwise_mlp"]] * 6


def batch_norms(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def cumulative(model):
    for bn in batch_norms(model):
        bn.momentum = None


def untracked(model):
    for bn in batch_norms(model):
        bn.track_running_stats = False
        bn.running_mean = bn.running_var = bn.num_batches_tracked = None


def frozen(model):
    for bn in batch_norms(model):
        bn.eval()


def partly_frozen(model):
    batch_norms(model)[0].eval()


@pytest.mark.parametrize("change", [cumulative, untracked, frozen, partly_frozen])
def test_batch_norm_modes(tiny_cvt, change):
    stock, fused = pair(tiny_cvt().double())
    x = image(3, 3, 48, 64, dtype=torch.float64)
    for model in (stock, fused):
        change(model.train())
    for _ in range(2):
        assert_same_step(stock, fused, x, 1e-10)
    with torch.no_grad():
        assert relative_l2(fused.eval()(x).logits, stock.eval()(x).logits) <= 1e-10


def test_sync_batch_norm_in_one_process(tiny_cvt):
    stock = tiny_cvt().double()
    fused = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(stock))
    assert fastvit_kernels.accelerate(fused)
    x = image(2, 3, 48, 64, dtype=torch.float64)
    with torch.no_grad():
        assert relative_l2(fused(x).logits, stock(x).logits) <= 1e-12
    assert list(layer_calls(fused, x).values()) == [OPERATORS] * 6


def test_autocast(tiny_cvt):
    stock, fused = pair(tiny_cvt())
    x = image(2, 3, 48, 64)
    with torch.no_grad():
        exact = copy.deepcopy(stock).double()(x.double(), output_hidden_states=True)
        with torch.autocast("cpu", torch.bfloat16):
            expected, found = (model(x, output_hidden_states=True) for model in (stock, fused))
    assert found.logits.dtype == expected.logits.dtype
    pairs = zip(found.hidden_states, expected.hidden_states, exact.hidden_states, strict=True)
    for a, b, y in [*pairs, (found.logits, expected.logits, exact.logits)]:
        assert a.dtype == b.dtype
        assert relative_l2(a, y) <= 2 * relative_l2(b, y) + 2**-8


def test_bfloat16_model(tiny_cvt):
    stock, fused = pair(tiny_cvt().bfloat16())
    x = image(2, 3, 48, 64)
    with torch.no_grad():
        exact = copy.deepcopy(stock).double()(x.double()).logits
        found, expected = fused(x.bfloat16()).logits, stock(x.bfloat16()).logits
    assert found.dtype == torch.bfloat16
    assert relative_l2(found, exact) <= 2 * relative_l2(expected, exact) + 2**-8


@pytest.mark.parametrize("activation", [QuickGELU, QuickGELUActivation])
def test_quick_gelu(tiny_cvt, activation):
    model = tiny_cvt().double()
    with_gelu = copy.deepcopy(model)
    for layer in layers(model):
        layer.intermediate.activation = activation()
    stock, fused = pair(model)
    x = image(2, 3, 48, 64, dtype=torch.float64)
    with torch.no_grad():
        assert relative_l2(stock(x).logits, with_gelu(x).logits) > 1e-4
        assert relative_l2(fused(x).logits, stock(x).logits) <= 1e-12
    assert list(layer_calls(fused, x).values()) == [OPERATORS] * 6


class ScaledLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class OtherLayer(CvtLayer):
    def forward(self, hidden_state, height, width):
        return 2 * super().forward(hidden_state, height, width)


def tanh_gelu(layer):
    layer.intermediate.activation = nn.GELU("tanh")


def hook_on_a_linear(layer):
    layer.attention.attention.projection_key.register_forward_hook(lambda module, args, output: 2 * output)


def hook_on_a_container(layer):
    layer.intermediate.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def hook_on_attention_dropout(layer):
    layer.attention.attention.dropout.register_forward_hook(lambda module, args, output: 2 * output)


def backward_hook(layer):
    layer.output.dense.register_full_backward_hook(lambda module, grads, outputs: None)


def another_linear(layer):
    linear = layer.attention.attention.projection_query
    layer.attention.attention.projection_query = ScaledLinear(
        linear.in_features, linear.out_features, dtype=linear.weight.dtype
    )


def parametrized_linear(layer):
    parametrizations.weight_norm(layer.output.dense)


def circular_padding(layer):
    layer.attention.attention.convolution_projection_key.convolution_projection.convolution.padding_mode = "circular"


def replaced_forward(layer):
    original = layer.forward
    layer.forward = lambda *args: 2 * original(*args)


def replaced_child_forward(layer):
    original = layer.layernorm_after.forward
    layer.layernorm_after.forward = lambda x: 2 * original(x)


def subclass(layer):
    layer.__class__ = OtherLayer


OBSTACLES = {
    tanh_gelu: "the fused ones are QuickGELU and exact GELU",
    hook_on_a_linear: "k's linear has hooks",
    hook_on_a_container: "intermediate has hooks",
    hook_on_attention_dropout: "attention dropout has hooks",
    backward_hook: "second linear has hooks",
    another_linear: "is a ScaledLinear",
    parametrized_linear: "is a ParametrizedLinear",
    circular_padding: "pads with 'circular'",
    replaced_forward: "its forward was replaced",
    replaced_child_forward: "layer norm has hooks",
    subclass: "derives from CvtLayer",
}


@pytest.mark.parametrize("change", OBSTACLES, ids=lambda change: change.__name__)
def test_left_alone_with_reason(tiny_cvt, change):
    model = tiny_cvt().double()
    layer = layers(model)[2]
    change(layer)
    cls = type(layer)
    x = image(1, 3, 48, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x).logits
        report = fastvit_kernels.accelerate(model)
        assert relative_l2(model(x).logits, expected) <= 1e-12
    assert len(report.replaced) == 8 and type(layer) is cls
    (entry,) = report.left_alone
    assert entry.path == "cvt.encoder.stages.1.layers.1" and entry.module == cls.__name__
    assert any(OBSTACLES[change] in reason for reason in entry.reasons), entry.reasons
    assert OBSTACLES[change] in str(report)


LATER = [change for change in OBSTACLES if change not in (subclass, replaced_forward)]


@pytest.mark.parametrize("change", LATER, ids=lambda change: change.__name__)
def test_obstacles_that_come_later_are_noticed(tiny_cvt, change):
    stock, fused = pair(tiny_cvt().double(), inference=True)
    for model in (stock, fused):
        torch.manual_seed(7)
        change(layers(model)[2])
        model.double()
    assert_same_step(stock, fused, image(2, 3, 48, 64, dtype=torch.float64), 1e-10)
    explanation = fastvit_kernels.explain(fused, image(1, 3, 48, 64, dtype=torch.float64))
    (entry,) = explanation.unfused
    assert entry.path == "cvt.encoder.stages.1.layers.1"
    assert any(OBSTACLES[change] in reason for reason in entry.reasons)


def hook_on_the_convolution(embeddings):
    embeddings.projection.register_forward_hook(lambda module, args, output: 2 * output)


def another_norm(embeddings):
    embeddings.normalization = nn.Identity()


def padding_by_reflection(embeddings):
    embeddings.projection.padding_mode = "reflect"


def replaced_embedding(embeddings):
    original = embeddings.forward
    embeddings.forward = lambda x: 2 * original(x)


EMBEDDING_OBSTACLES = {
    hook_on_the_convolution: "the convolution has hooks",
    another_norm: "the layer norm is a Identity",
    padding_by_reflection: "pads with 'reflect'",
    replaced_embedding: "its forward was replaced",
}


def assert_unfused_and_the_same(model, stock):
    x = image(2, 3, 48, 64, dtype=torch.float64)
    with torch.no_grad():
        assert relative_l2(model(x).logits, stock(x).logits) <= 1e-12
    assert "cvt.encoder.stages.1.embedding.convolution_embeddings" not in fused_calls(model, x)


@pytest.mark.parametrize("change", EMBEDDING_OBSTACLES, ids=lambda change: change.__name__)
def test_embeddings_left_alone_with_reason(tiny_cvt, change):
    stock = tiny_cvt().double()
    change(known(stock)[2])
    model = copy.deepcopy(stock)
    (entry,) = fastvit_kernels.accelerate(model).left_alone
    assert entry.path == "cvt.encoder.stages.1.embedding.convolution_embeddings"
    assert any(EMBEDDING_OBSTACLES[change] in reason for reason in entry.reasons), entry.reasons
    assert_unfused_and_the_same(model, stock)


@pytest.mark.parametrize("change", list(EMBEDDING_OBSTACLES)[:-1], ids=lambda change: change.__name__)
def test_embeddings_notice_obstacles_that_come_later(tiny_cvt, change):
    stock, fused = pair(tiny_cvt().double(), inference=True)
    for model in (stock, fused):
        change(known(model)[2])
    assert_unfused_and_the_same(fused, stock)


def test_a_hook_that_is_removed_lets_the_layer_fuse_again(tiny_cvt):
    model = tiny_cvt()
    fastvit_kernels.accelerate(model)
    x, seen = image(1, 3, 48, 64), []
    handle = layers(model)[0].output.dense.register_forward_hook(lambda *args: seen.append(1))
    assert layer_calls(model, x)["cvt.encoder.stages.0.layers.0"] == OPERATORS[:2] and seen
    handle.remove()
    assert layer_calls(model, x)["cvt.encoder.stages.0.layers.0"] == OPERATORS


def test_hooks_of_the_layer_and_of_modules_that_are_called_do_not_keep_it_from_fusing(tiny_cvt):
    model = tiny_cvt()
    seen = []
    layers(model)[0].register_forward_hook(lambda *args: seen.append("layer"))
    layers(model)[0].drop_path.register_forward_hook(lambda *args: seen.append("drop_path"))
    stock, fused = pair(model)
    x = image(1, 3, 48, 64)
    with torch.no_grad():
        expected = stock(x).logits
        calls = list(seen)
        seen.clear()
        assert relative_l2(fused(x).logits, expected) <= 1e-5
    assert seen == calls == ["drop_path", "drop_path", "layer"]
    assert layer_calls(fused, x)["cvt.encoder.stages.0.layers.0"] == OPERATORS


def gradient(model, x):
    return torch.func.grad(lambda images: model(images).logits.square().sum())(x)


def jacobian_vector_product(model, x):
    return torch.func.jvp(lambda images: model(images).logits, (x,), (torch.ones_like(x),))[1]


def per_sample_gradients(model, x):
    return torch.func.vmap(torch.func.grad(lambda image: model(image[None]).logits.square().sum()))(x)


def forward_mode(model, x):
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        return torch.autograd.forward_ad.unpack_dual(model(dual).logits).tangent


def double_backward(model, x):
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(model(x).logits.square().sum(), x, create_graph=True)
    return torch.autograd.grad(first.square().sum(), x)[0]


@pytest.mark.parametrize(
    "transform", [gradient, jacobian_vector_product, per_sample_gradients, forward_mode, double_backward]
)
def test_other_kinds_of_differentiation(tiny_cvt, transform):
    stock, fused = pair(tiny_cvt(), inference=True)
    x = image(2, 3, 48, 64)
    assert relative_l2(transform(fused, x), transform(stock, x)) <= 1e-4


def test_export_and_shapes_without_data(tiny_cvt):
    stock, fused = pair(tiny_cvt())
    x = image(1, 3, 48, 64)
    with torch.no_grad():
        exported = torch.export.export(fused, (x,))
        assert relative_l2(exported.module()(x).logits, stock(x).logits) <= 1e-5
    assert not [node for node in exported.graph.nodes if "fastvit" in str(node.target)]
    assert fused.to("meta")(x.to("meta")).logits.shape == (1, 7)


@pytest.mark.parametrize("method", ["avg", "linear"])
def test_other_projection_methods_are_left_alone(method):
    layer = CvtLayer(1, 16, 3, 1, 1, 1, 2, method, True, 0.0, 0.0, 4.0, 0.0, with_cls_token=False)
    report = fastvit_kernels.accelerate(layer)
    assert not report and type(layer) is CvtLayer
    assert "convolution_projection_key has no convolution" in str(report)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(tiny_cvt, use_reentrant):
    results = []
    for model in pair(tiny_cvt(drop_path_rate=[0.3, 0.3, 0.3]).train().double()):
        layer = layers(model)[1]
        tokens = image(3, 24, 32, dtype=torch.float64).requires_grad_()
        torch.manual_seed(2)
        checkpoint(layer, tokens, 4, 6, use_reentrant=use_reentrant).square().sum().backward()
        results.append([tokens.grad, *(p.grad for p in layer.parameters()), *layer.buffers()])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_a_lone_layer(tiny_cvt):
    layer = layers(tiny_cvt())[-1]
    tokens = image(2, 1 + 3 * 5, 64)
    with torch.no_grad():
        expected = layer(tokens, 3, 5)
        report = fastvit_kernels.accelerate(layer)
        assert [entry.path for entry in report.replaced] == [""]
        assert type(layer) is FusedCvtLayer and relative_l2(layer(tokens, 3, 5), expected) <= 1e-5
        assert relative_l2(layer(tokens, height=3, width=5), expected) <= 1e-5


def test_compiled_inference(tiny_cvt):
    stock, fused = pair(tiny_cvt(), inference=True)
    compiled = torch.compile(fused, fullgraph=True)
    x = image(2, 3, 48, 64)
    with torch.no_grad():
        assert relative_l2(compiled(x).logits, stock(x).logits) <= 1e-5
        # The compiled code must not go on with weights packed before a change either.
        for model in (stock, fused):
            for parameter in model.parameters():
                parameter.mul_(0.9)
        assert relative_l2(compiled(x).logits, stock(x).logits) <= 1e-5


def test_compiled_training(tiny_cvt):
    stock, fused = pair(tiny_cvt(depth=[1, 2, 3]).train())
    layer, fused_layer = layers(stock)[-1], layers(fused)[-1]
    compiled = torch.compile(fused_layer, fullgraph=True)
    results = []
    for module in (layer, compiled):
        tokens = image(2, 1 + 12, 64).requires_grad_()
        module(tokens, 3, 4).square().sum().backward()
        results.append([tokens.grad, *(p.grad for p in module.parameters()), *module.buffers()])
    largest = max(float(gradient.norm()) for gradient in results[0][1:-9])
    for expected, found in zip(*results, strict=True):
        assert float((found - expected).double().norm()) <= 1e-4 * max(float(expected.double().norm()), largest)


def test_accelerating_a_compiled_model(tiny_cvt):
    stock = tiny_cvt()
    model = copy.deepcopy(stock)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    x = image(1, 3, 48, 64)
    with torch.no_grad():
        expected = compiled(x).logits
        report = fastvit_kernels.accelerate(compiled)
        assert len(report.replaced) == 9 and "compiled again at the next call" in str(report)
        assert all(entry.path.startswith("_orig_mod.cvt.encoder") for entry in report.replaced)
        for layer in layers(model):
            # Only the accelerated code reads this; a result that follows it comes from new code.
            layer.__dict__["_fastvit"].backend = "no such backend"
        with pytest.raises(Exception, match="no such backend"):
            compiled(x)
        for layer in layers(model):
            layer.__dict__["_fastvit"].backend = None
        assert relative_l2(compiled(x).logits, expected) <= 1e-5
        assert len(fastvit_kernels.explain(compiled, x).decisions) == 21
        fastvit_kernels.restore(compiled)
        assert relative_l2(compiled(x).logits, expected) <= 1e-5


def test_another_backend_is_noticed_by_a_layer_that_repeats_its_calls(tiny_cvt):
    model = tiny_cvt().eval()
    fastvit_kernels.accelerate(model, inference=True)
    layer = next(m for m in model.modules() if type(m) is FusedCvtLayer)
    tokens = torch.randn(1, 16, layer.layernorm_before.normalized_shape[0])
    with torch.no_grad():
        layer(tokens, 4, 4), layer(tokens, 4, 4)
        fastvit_kernels.accelerate(model, inference=True, backend="cuda")
        with pytest.raises(fastvit_kernels.BackendError, match="backend 'cuda' cannot run this call"):
            layer(tokens, 4, 4)
