"""What may be fused and what may not, and that what may not is called."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from fastvit_kernels.nn import ConvProjectionAttention, DropPath, LayerNorm, PointwiseMLP, QuickGELU, fused
from fastvit_kernels.testing import relative_l2

C, H, W = 8, 4, 5


@pytest.fixture
def attention():
    torch.manual_seed(0)
    return ConvProjectionAttention(C, C, 2, stride_kv=2).double().eval()


@pytest.fixture
def mlp():
    torch.manual_seed(0)
    return PointwiseMLP(C, 16).double().eval()


@pytest.fixture
def norm():
    return LayerNorm(C).double()


def tokens():
    return torch.randn(2, 1 + H * W, C, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def replace_conv(**arguments):
    arguments = {"kernel_size": 3, "stride": 1, "padding": 1, "groups": C, "bias": False, **arguments}
    return lambda m: setattr(m.conv_proj_q, "conv", nn.Conv2d(C, C, **arguments).double())


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


class ScaledLinear(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


def scaled_linear():
    return ScaledLinear(C, C).double()


ATTENTION_OBSTACLES = {
    "hooked linear": (lambda m: m.proj_v.register_forward_hook(lambda *_: None), "v's linear has hooks"),
    "pre-hook": (lambda m: m.proj.register_forward_pre_hook(lambda *_: None), "the output projection has hooks"),
    "backward hook": (
        lambda m: m.conv_proj_k.bn.register_full_backward_hook(lambda *_: None),
        "k's batch norm has hooks",
    ),
    "hooked step": (lambda m: m.conv_proj_q.register_forward_hook(lambda *_: None), "conv_proj_q has hooks"),
    "hooked dropout": (lambda m: m.attn_drop.register_forward_hook(lambda *_: None), "attention dropout has hooks"),
    "replaced forward": (
        lambda m: setattr(m.proj_k, "forward", lambda x: nn.functional.linear(x, m.proj_k.weight) + 1),
        "k's linear has hooks",
    ),
    "parametrized": (
        lambda m: parametrize.register_parametrization(m.proj_q, "weight", Doubled()),
        "q's linear is a ParametrizedLinear, expected Linear",
    ),
    "subclass": (
        lambda m: setattr(m, "proj_q", scaled_linear()),
        "q's linear is a ScaledLinear, expected Linear",
    ),
    "replaced step": (
        lambda m: setattr(m, "conv_proj_q", nn.Conv2d(C, C, 1).double()),
        "conv_proj_q is Conv2d(8, 8, kernel_size=(1, 1), stride=(1, 1)), "
        "expected a depthwise convolution and a batch norm",
    ),
    "not depthwise": (replace_conv(groups=2), "q's convolution is not depthwise"),
    "biased": (replace_conv(bias=True), "q's convolution has a bias"),
    "reflecting": (replace_conv(padding_mode="reflect"), "q's convolution pads with 'reflect', expected zeros"),
    "named padding": (replace_conv(padding="same"), "q's convolution pads by 'same', expected a number"),
    "dilated": (replace_conv(dilation=2, padding=2), "q's convolution is dilated by (2, 2)"),
    "oblong": (
        replace_conv(kernel_size=(3, 1), padding=(1, 0)),
        "q's convolution differs between the axes in kernel size, stride or padding",
    ),
}


def called(module, x, norm, residual):
    """What calling the submodules gives."""
    u = norm(x)
    cls, maps = u[:, :1], u[:, 1:].transpose(1, 2).unflatten(2, (H, W))
    rows = []
    for name in ("q", "k", "v"):
        step, linear = getattr(module, f"conv_proj_{name}"), getattr(module, f"proj_{name}")
        rows.append(linear(torch.cat([cls, step(maps).flatten(2).transpose(1, 2)], 1)).unflatten(2, (2, C // 2)))
    q, k, v = rows
    p = module.attn_drop((torch.einsum("bqhd,bkhd->bhqk", q, k) * C**-0.5).softmax(-1))
    return residual + module.proj(torch.einsum("bhqk,bkhd->bqhd", p, v).flatten(2))


@pytest.mark.parametrize("case", ATTENTION_OBSTACLES)
def test_attention_calls_what_it_cannot_fuse(attention, norm, case):
    x = tokens()
    assert attention.fusion_obstacles(norm) == []
    plain = attention(x, H, W, norm=norm, residual=x)
    assert relative_l2(plain, called(attention, x, norm, x)) <= 1e-14
    change, reason = ATTENTION_OBSTACLES[case]
    change(attention)
    assert attention.fusion_obstacles(norm) == [reason]
    assert relative_l2(attention(x, H, W, norm=norm, residual=x), called(attention, x, norm, x)) <= 1e-14


MLP_OBSTACLES = {
    "hooked linear": (lambda m: m.fc1.register_forward_hook(lambda *_: None), "the first linear has hooks"),
    "hooked activation": (lambda m: m.act.register_forward_hook(lambda *_: None), "the activation has hooks"),
    "hooked dropout": (lambda m: m.drop.register_forward_hook(lambda *_: None), "hidden dropout has hooks"),
    "tanh": (
        lambda m: setattr(m, "act", nn.GELU("tanh")),
        "the activation is GELU(approximate='tanh'), the fused ones are QuickGELU and exact GELU",
    ),
    "parametrized": (
        lambda m: parametrize.register_parametrization(m.fc2, "weight", Doubled()),
        "the second linear is a ParametrizedLinear, expected Linear",
    ),
}


@pytest.mark.parametrize("case", MLP_OBSTACLES)
def test_the_mlp_calls_what_it_cannot_fuse(mlp, norm, case):
    x = tokens()
    change, reason = MLP_OBSTACLES[case]
    change(mlp)
    assert mlp.fusion_obstacles(norm) == [reason]
    expected = x + mlp.drop(mlp.fc2(mlp.drop(mlp.act(mlp.fc1(norm(x))))))
    assert relative_l2(mlp(x, norm=norm, residual=x), expected) <= 1e-14


class Shifted(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) + 1


NORM_OBSTACLES = {
    "hooked": (lambda n: n.register_forward_hook(lambda *_: None) and n, "the layer norm has hooks"),
    "subclass": (lambda n: Shifted(C).double(), "the layer norm is a Shifted, expected LayerNorm"),
    "over more axes": (
        lambda n: nn.LayerNorm((1 + H * W, C)).double(),
        f"the layer norm is over {(1 + H * W, C)}, expected the channels only",
    ),
}


@pytest.mark.parametrize("case", NORM_OBSTACLES)
def test_a_norm_that_cannot_be_fused_is_called(attention, mlp, norm, case):
    change, reason = NORM_OBSTACLES[case]
    norm = change(norm)
    x = tokens()
    assert attention.fusion_obstacles(norm) == mlp.fusion_obstacles(norm) == [reason]
    assert relative_l2(attention(x, H, W, norm=norm), attention(norm(x), H, W)) <= 1e-14
    assert relative_l2(mlp(x, norm=norm), mlp(norm(x))) <= 1e-14


def test_hooks_see_every_call(attention, mlp, norm):
    seen = []
    for name, module in [*attention.named_modules(), *mlp.named_modules()]:
        if name and not isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    attention(tokens(), H, W, norm=norm)
    mlp(tokens(), norm=norm)
    steps = [f"conv_proj_{s}{part}" for s in "qkv" for part in ("", ".bn", ".conv")]
    assert sorted(seen) == sorted([*steps, "proj_q", "proj_k", "proj_v", "proj", "fc1", "act", "fc2"])


def test_a_tensor_subclass_as_weight_is_no_plain_memory(mlp):
    from torch.testing._internal.two_tensor import TwoTensor

    mlp.fc1.weight = nn.Parameter(TwoTensor(mlp.fc1.weight.detach(), mlp.fc1.weight.detach()))
    assert mlp.fusion_obstacles() == ["the first linear holds no plain parameter as its weight"]


def test_a_weight_outside_the_parameters_is_noticed(mlp):
    weight = mlp.fc2.weight.detach()
    del mlp.fc2.weight
    mlp.fc2.weight = weight
    assert mlp.fusion_obstacles() == ["the second linear holds no plain parameter as its weight"]
    x = tokens()
    assert relative_l2(mlp(x), nn.functional.linear(mlp.act(mlp.fc1(x)), weight, mlp.fc2.bias)) <= 1e-14


@pytest.mark.parametrize(
    ("module", "training", "expected"),
    [
        (nn.Identity(), True, True),
        (nn.Dropout(0.0), True, True),
        (nn.Dropout(0.5), True, False),
        (nn.Dropout(0.5), False, True),
        (DropPath(0.0), True, True),
        (DropPath(0.5), True, False),
        (DropPath(0.5), False, True),
        (nn.ReLU(), False, False),
        (nn.Dropout2d(0.5), True, False),
        (nn.Dropout2d(0.5), False, True),
        (nn.AlphaDropout(0.5), False, False),
    ],
)
def test_drops_nothing(module, training, expected):
    assert fused.drops_nothing(module.train(training)) is expected
    module.register_forward_hook(lambda *_: None)
    assert not fused.drops_nothing(module)


@pytest.mark.parametrize(
    ("module", "name"),
    [(QuickGELU(), "quick_gelu"), (nn.GELU(), "gelu"), (nn.GELU("tanh"), None), (nn.SiLU(), None)],
)
def test_activation_names(module, name):
    assert fused.activation_name(module) == name
