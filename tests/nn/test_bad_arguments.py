"""Every module refuses what does not fit in its own words, whether it is fused or calls its submodules."""

from __future__ import annotations

import numpy
import pytest
import torch
from torch import fx, nn

from fastvit_kernels.nn import (
    DAFF,
    HIMHSA,
    IRFFN,
    LMHSA,
    LPU,
    ConvProjectionAttention,
    DenseConv2d,
    DenseLinear,
    DropPath,
    HatMLP,
    HierarchicalAttention,
    LayerNorm,
    MixFFN,
    PatchEmbedding,
    PointwiseMLP,
    QuickGELU,
    SpatialReductionAttention,
)

TABLE = torch.zeros(2, 20, 20)
# Module, shape of its input, arguments behind that, a submodule that takes part in every call, how a refusal begins.
MODULES = {
    "conv_projection": (
        ConvProjectionAttention(32, 32, 2),
        (2, 21, 32),
        (5, 4),
        "proj_q",
        r"\[B, 1 \+ 5 \* 4, 32\] tok",
    ),
    "daff": (DAFF(32, 40, 32), (2, 17, 32), (), "conv1", r"\[B, N, 32\] tokens"),
    "hat_mlp": (HatMLP(32, 40), (2, 32, 5, 4), (), "conv1", r"a map \[B, 32, H, W\]"),
    "hi_mhsa": (HIMHSA(32, 2), (2, 17, 32), (), "proj", r"\[B, N, 32\] tokens"),
    "hierarchical": (HierarchicalAttention(32, 16), (2, 32, 5, 4), (), "proj", r"a map \[B, 32, H, W\]"),
    "irffn": (IRFFN(32, 40), (2, 20, 32), (5, 4), "conv1", r"\[B, 5 \* 4, 32\] tokens"),
    "lmhsa": (LMHSA(32, 2), (2, 20, 32), (5, 4, TABLE), "proj", r"\[B, 5 \* 4, 32\] tokens"),
    "lpu": (LPU(32), (2, 32, 5, 4), (), None, r"a map \[B, 32, H, W\]"),
    "mix_ffn": (MixFFN(32, 40), (2, 20, 32), (5, 4), "fc1", r"\[B, 5 \* 4, 32\] tokens"),
    "patch_embedding": (PatchEmbedding(3, 32, 8), (2, 32, 5, 4), (), "proj", r"a map \[B, 32, H, W\]"),
    "pointwise_mlp": (PointwiseMLP(32, 40), (2, 20, 32), (), "fc1", r"\[..., 32\]"),
    "spatial_reduction": (SpatialReductionAttention(32, 2), (2, 20, 32), (5, 4), "proj", r"\[B, 5 \* 4, 32\] tokens"),
}
OF_A_MAP = ("conv_projection", "irffn", "lmhsa", "mix_ffn", "spatial_reduction")


@pytest.fixture(params=["fused", "called"])
def made(request):
    """A module by its name, as it is or with a submodule that somebody listens to."""
    handles = []

    def make(name):
        module, shape, rest, part, message = MODULES[name]
        module.eval()
        if request.param == "called" and part is not None:
            handles.append(module.get_submodule(part).register_forward_hook(lambda *arguments: None))
            assert module.fusion_obstacles()
        return module, shape, rest, message

    yield make
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", MODULES)
def test_what_is_no_tensor(made, name):
    module, _, rest, _ = made(name)
    for wrong in ("a", None, 3, [1.0]):
        with pytest.raises(TypeError, match=rf"^(x|input): expected a torch.Tensor, got {type(wrong).__name__}"):
            module(wrong, *rest)


@pytest.mark.parametrize("name", MODULES)
def test_shapes(made, name):
    module, shape, rest, message = made(name)
    channels = 1 if len(shape) == 4 else 2
    narrow = (*shape[:channels], 31, *shape[channels + 1 :])
    others = [narrow] if name == "pointwise_mlp" else [narrow, shape[1:], (1, *shape), ()]
    for wrong in others:
        with pytest.raises(
            ValueError, match=rf"^(x|input): expected {message}.*, got shape \({', '.join(map(str, wrong))}"
        ):
            module(torch.zeros(wrong), *rest)
    with torch.no_grad():
        assert module(torch.zeros(shape), *rest).shape[0] == 2
        assert module(torch.zeros(0, *shape[1:]), *rest).shape[0] == 0


@pytest.mark.parametrize("name", OF_A_MAP)
def test_sides_of_the_map(made, name):
    module, shape, (h, w, *rest), _ = made(name)
    x = torch.zeros(shape)
    with pytest.raises(ValueError, match=r"^x: expected \[B, .*4 \* 6, 32\] tokens, got shape .* beside h, w = 4, 6"):
        module(x, 4, 6, *rest)
    with pytest.raises(ValueError, match="^h: expected an integer of at least 1, got -5"):
        module(x, -5, -4, *rest)
    for wrong in (4.0, True, "4", None):
        with pytest.raises(TypeError, match=f"^w: expected an integer, got {type(wrong).__name__}"):
            module(x, h, wrong, *rest)
    with torch.no_grad():
        assert torch.equal(module(x, numpy.int64(h), numpy.int32(w), *rest), module(x, h, w, *rest))


@pytest.mark.parametrize("name", [name for name in MODULES if name not in ("lpu", "patch_embedding")])
def test_residuals_do_not_broadcast(made, name):
    module, shape, rest, _ = made(name)
    with pytest.raises(ValueError, match="^residual: expected shape"):
        module(torch.zeros(shape), *rest, residual=torch.zeros(1, *shape[1:]))
    with pytest.raises(TypeError, match="^residual: expected a torch.Tensor, got str"):
        module(torch.zeros(shape), *rest, residual="a")


@pytest.mark.parametrize("table", [None, "a"])
def test_tables_that_are_no_tensors(table):
    with pytest.raises(TypeError, match="^relative_pos: expected a torch.Tensor, got"):
        LMHSA(32, 2)(torch.zeros(1, 20, 32), 5, 4, relative_pos=table)


def test_a_grid_that_does_not_fit(made):
    module, shape, _, _ = made("daff")
    with pytest.raises(ValueError, match="^grid: 3 x 4 and 1 prefix tokens do not make the 17 tokens of x"):
        module(torch.zeros(shape), grid=(3, 4))


@pytest.mark.parametrize("module", [DropPath(0.3), DropPath(), LayerNorm(8), QuickGELU()])
def test_small_modules(module):
    with pytest.raises(TypeError, match="^x: expected a torch.Tensor, got str"):
        module("a")


@pytest.mark.parametrize(
    ("make", "arguments", "error", "message"),
    [
        (SpatialReductionAttention, {"sr_ratio": 0}, ValueError, "sr_ratio: expected an integer of at least 1, got 0"),
        (
            SpatialReductionAttention,
            {"sr_ratio": -1},
            ValueError,
            "sr_ratio: expected an integer of at least 1, got -1",
        ),
        (SpatialReductionAttention, {"sr_ratio": 1.5}, TypeError, "sr_ratio: expected an integer, got float"),
        (LMHSA, {"sr_ratio": 0}, ValueError, "sr_ratio: expected an integer of at least 1, got 0"),
        (LMHSA, {"qk_ratio": 0}, ValueError, "qk_ratio: expected an integer of at least 1, got 0"),
        (LMHSA, {"qk_ratio": 5}, ValueError, "qk_ratio: 5 does not divide dim = 32"),
        (LMHSA, {"num_heads": 2.0}, TypeError, "num_heads: expected an integer, got float"),
        (HIMHSA, {"num_heads": "2"}, TypeError, "num_heads: expected an integer, got str"),
    ],
)
def test_constructors(make, arguments, error, message):
    with pytest.raises(error, match=message):
        make(32, **{"num_heads": 2, **arguments})


def test_a_gate_without_channels():
    with pytest.raises(ValueError, match="in_dim: expected at least 4, .* got 3"):
        DAFF(3, 8, 3)


@pytest.mark.parametrize("name", ["hat_mlp", "hierarchical"])
def test_flags(made, name):
    module, shape, _, _ = made(name)
    with pytest.raises(TypeError, match="return_statistics: expected a bool, got str"):
        module(torch.zeros(shape), return_statistics="yes")


def test_prepared_dense_layers():
    conv, linear = DenseConv2d(8, 8, 3), DenseLinear(8, 8)
    with pytest.raises(TypeError, match="bn_after_activation: expected a bool, got str"):
        conv(torch.zeros(1, 8, 5, 5), bn_after_activation="no")
    conv.prepare_inference(True), linear.prepare_inference(True)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"input: expected a map \[B, 8, H, W\], got shape \(1, 7, 5, 5\)"):
            conv(torch.zeros(1, 7, 5, 5))
        with pytest.raises(ValueError, match=r"input: expected \[..., 8\], got shape \(2, 7\)"):
            linear(torch.zeros(2, 7))
        for module in (conv, linear):
            with pytest.raises(TypeError, match="input"):
                module("a")
        # A map without a batch, as PyTorch's takes it.
        assert conv(torch.zeros(8, 5, 5)).shape == (8, 3, 3)


def test_proxies_pass():
    module = nn.Sequential(LayerNorm(8), QuickGELU(), DropPath(0.3), DenseLinear(8, 4)).eval()
    x = torch.randn(2, 8)
    torch.testing.assert_close(fx.symbolic_trace(module)(x), module(x))
