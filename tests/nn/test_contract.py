"""The modules keep the operators' contract, alone and as one block, in evaluation and with batch statistics."""

from __future__ import annotations

import plain_cvt
import torch
from torch import nn

from fastvit_kernels.nn import ConvProjectionAttention, LayerNorm, PatchEmbedding, PointwiseMLP
from fastvit_kernels.testing.calls import Call
from fastvit_kernels.testing.contract import Contract
from fastvit_kernels.testing.inputs import Case


class Block(nn.Module):
    """CvT's block out of our modules, norms and residuals fused."""

    def __init__(self, dim, num_heads, with_cls_token):
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = ConvProjectionAttention(
            dim, dim, num_heads, qkv_bias=True, stride_kv=2, with_cls_token=with_cls_token
        )
        self.norm2 = LayerNorm(dim)
        self.mlp = PointwiseMLP(dim, 4 * dim)

    def forward(self, x, h, w):
        x = self.attn(x, h, w, norm=self.norm1, residual=x)
        return self.mlp(x, norm=self.norm2, residual=x)


class ModuleContract(Contract):
    """On the CPU kernels; what the interpreter takes seconds for is tested on the operators themselves."""

    precisions = {"cpu": Contract.precisions["cpu"]}


def _filled(module, maker, training=False):
    """Weights from the maker, so large that every part of the module matters."""
    with torch.no_grad():
        for name, t in [*module.named_parameters(), *module.named_buffers()]:
            if t.ndim > 1:
                t.copy_(maker.weight(*t.shape))
            elif name.endswith(("running_var", "norm.weight", "norm1.weight", "norm2.weight", "bn.weight")):
                t.copy_(maker.positive(*t.shape))
            elif t.is_floating_point():
                t.copy_(maker.vector(*t.shape))
    return module.to(maker.precision.parameters).train(training)


def _case(name, make, *tags, vanishing=()):
    return Case(name, make, frozenset(tags), frozenset(vanishing))


def _as_plain(plain, module, **arguments):
    """The same weights in plain PyTorch."""
    plain.load_state_dict(module.state_dict(), strict=True)
    return plain.double().train(module.training)(**arguments)


def _attention(maker, cls=True, training=False, grid=(5, 4), batch=2, **options):
    options = {"qkv_bias": True, "stride_kv": 2, "with_cls_token": cls, **options}
    module = _filled(ConvProjectionAttention(24, 32, 2, **options), maker, training)
    x = maker.activation(batch, cls + grid[0] * grid[1], 24)
    return Call(module, {"x": x, "h": grid[0], "w": grid[1]})


def _plain_attention(module, **arguments):
    conv, bias = module.conv_proj_q.conv, module.proj_q.bias is not None
    options = {"kernel_size": conv.kernel_size[0], "stride_q": conv.stride[0], "padding_q": conv.padding[0]}
    conv = module.conv_proj_k.conv
    options |= {"stride_kv": conv.stride[0], "padding_kv": conv.padding[0], "with_cls_token": module.with_cls_token}
    return _as_plain(plain_cvt.Attention(24, 32, 2, qkv_bias=bias, **options), module, **arguments)


# Softmax does not see what all scores of a query share: the key's bias always, and what its batch norm adds unless a
# class token, which passes the batch norm by, is among the keys.
KEY_BIAS = "module.proj_k.bias"
KEY_SHIFT = (KEY_BIAS, "module.conv_proj_k.bn.bias")


class TestConvProjectionAttention(ModuleContract):
    draws = 8
    cases = [
        _case("cls", _attention, "smallest", "inductor", vanishing=[KEY_BIAS]),
        _case("training", lambda m: _attention(m, training=True), "smallest", vanishing=[KEY_BIAS]),
        _case("no_cls", lambda m: _attention(m, cls=False), vanishing=KEY_SHIFT),
        _case("training_no_cls", lambda m: _attention(m, cls=False, training=True), vanishing=KEY_SHIFT),
        _case("no_bias", lambda m: _attention(m, qkv_bias=False)),
        _case("kernel_5", lambda m: _attention(m, kernel_size=5, padding_q=2, padding_kv=2), vanishing=[KEY_BIAS]),
        _case("strided_query", lambda m: _attention(m, stride_q=2), vanishing=[KEY_BIAS]),
        _case("empty_batch", lambda m: _attention(m, batch=0), "empty"),
    ]
    fused = ("conv_projection", "global_attention")
    equivalent = staticmethod(_plain_attention)
    reshaped = (
        [
            _case(f"{batch} images", lambda m, b=batch: _attention(m, batch=b), vanishing=[KEY_BIAS])
            for batch in (2, 3, 5)
        ],
        {"x": (0,)},
    )


def _mlp(maker, leading=(2, 7), act_layer=None, **options):
    options |= {} if act_layer is None else {"act_layer": act_layer}
    module = _filled(PointwiseMLP(12, 20, 9, **options), maker)
    return Call(module, {"x": maker.activation(*leading, 12)})


def _plain_mlp(module, **arguments):
    plain = plain_cvt.Mlp(12, 20, 9, act_layer=nn.GELU if isinstance(module.act, nn.GELU) else plain_cvt.QuickGELU)
    return _as_plain(plain, module, **arguments)


class TestPointwiseMLP(ModuleContract):
    cases = [
        _case("quick_gelu", _mlp, "smallest", "inductor"),
        _case("gelu", lambda m: _mlp(m, act_layer=nn.GELU)),
        _case("map", lambda m: _mlp(m, leading=(2, 3, 5))),
        _case("empty_batch", lambda m: _mlp(m, leading=(0, 7)), "empty"),
    ]
    fused = ("pointwise_mlp",)
    equivalent = staticmethod(_plain_mlp)
    reshaped = (
        [_case(f"{n} rows", lambda m, n=n: _mlp(m, leading=(n, 3 * n))) for n in (2, 3, 5)],
        {"x": (0, 1)},
    )


def _embedding(maker, batch=2, size=(9, 10)):
    module = _filled(PatchEmbedding(3, 6, 16, 2, 1), maker)
    return Call(module, {"x": maker.activation(batch, 6, *size).to(memory_format=torch.channels_last)})


def _plain_embedding(module, **arguments):
    tokens, height, width = _as_plain(plain_cvt.Embed(3, 6, 16, 2, 1), module, **arguments)
    return tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2)


class TestPatchEmbedding(ModuleContract):
    cases = [
        _case("plain", _embedding, "smallest", "inductor", "map"),
        _case("empty_batch", lambda m: _embedding(m, batch=0), "empty"),
    ]
    fused = ("patch_embedding",)
    equivalent = staticmethod(_plain_embedding)
    reshaped = (
        [_case(f"{n} high", lambda m, n=n: _embedding(m, batch=n, size=(n + 5, 3 * n))) for n in (2, 3, 5)],
        {"x": (0, 2, 3)},
    )


def _block(maker, cls=True, training=False, batch=2):
    module = _filled(Block(32, 2, cls), maker, training)
    return Call(module, {"x": maker.activation(batch, cls + 20, 32), "h": 5, "w": 4})


def _plain_block(module, **arguments):
    return _as_plain(plain_cvt.Block(32, 2, module.attn.with_cls_token), module, **arguments)


BLOCK_KEY_SHIFT = ("module.attn.proj_k.bias", "module.attn.conv_proj_k.bn.bias")


class TestBlock(ModuleContract):
    draws = 8
    cases = [
        _case("cls", _block, "smallest", "inductor", vanishing=BLOCK_KEY_SHIFT[:1]),
        _case("training", lambda m: _block(m, training=True), "smallest", vanishing=BLOCK_KEY_SHIFT[:1]),
        _case("no_cls", lambda m: _block(m, cls=False), vanishing=BLOCK_KEY_SHIFT),
        _case("empty_batch", lambda m: _block(m, batch=0), "empty"),
    ]
    fused = ("conv_projection", "global_attention", "pointwise_mlp")
    equivalent = staticmethod(_plain_block)
    reshaped = (
        [_case(f"{n} images", lambda m, n=n: _block(m, batch=n), vanishing=BLOCK_KEY_SHIFT[:1]) for n in (2, 3, 5)],
        {"x": (0,)},
    )
