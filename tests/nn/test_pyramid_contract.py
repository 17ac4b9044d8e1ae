"""PVTv2's block, SpatialReductionAttention and MixFFN with fused norms and residuals, keeps the operators' contract."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fastvit_kernels.nn import LayerNorm, MixFFN, SpatialReductionAttention
from fastvit_kernels.testing.calls import Call
from fastvit_kernels.testing.contract import Contract
from fastvit_kernels.testing.inputs import Case

DIM, HEADS, EPS = 16, 2, 1e-5


class Block(nn.Module):
    def __init__(self, sr_ratio, linear):
        super().__init__()
        self.norm1 = LayerNorm(DIM, EPS)
        self.attn = SpatialReductionAttention(DIM, HEADS, qkv_bias=True, sr_ratio=sr_ratio, linear=linear)
        self.norm2 = LayerNorm(DIM, EPS)
        # Without the ReLU, whose gradient jumps: rounding decides on which side of zero a value lies.
        self.mlp = MixFFN(DIM, 3 * DIM)

    def forward(self, x, h, w):
        x = self.attn(x, h, w, norm=self.norm1, residual=x)
        return self.mlp(x, h, w, norm=self.norm2, residual=x)


def _call(maker, sr_ratio=2, linear=False, grid=(5, 4), batch=2):
    module = Block(sr_ratio, linear)
    with torch.no_grad():
        for name, t in module.named_parameters():
            if t.ndim > 1:
                t.copy_(maker.weight(*t.shape))
            else:
                is_scale = name.endswith(("norm.weight", "norm1.weight", "norm2.weight"))
                t.copy_(maker.positive(*t.shape) if is_scale else maker.vector(*t.shape))
    module.to(maker.precision.parameters)
    return Call(module, {"x": maker.activation(batch, grid[0] * grid[1], DIM), "h": grid[0], "w": grid[1]})


def _plain(module, x, h, w):
    u = _normalised(module.norm1, x)
    x = x + _plain_attention(module.attn, u, u.mT.unflatten(2, (h, w)))
    mlp, hidden = module.mlp, module.mlp.fc1(_normalised(module.norm2, x))
    hidden = mlp.dwconv.dwconv(hidden.mT.unflatten(2, (h, w))).flatten(2).mT
    return x + mlp.fc2(F.gelu(hidden))


def _plain_attention(attn, u, maps):
    rows = u
    if attn.sr is not None:
        maps = F.adaptive_avg_pool2d(maps, 7) if attn.linear else maps
        rows = _normalised(attn.norm, attn.sr(maps).flatten(2).mT)
        rows = F.gelu(rows) if attn.linear else rows
    q, k, v = (t.unflatten(2, (HEADS, DIM // HEADS)).transpose(1, 2) for t in (attn.q(u), *attn.kv(rows).split(DIM, 2)))
    probabilities = (q @ k.mT / (DIM // HEADS) ** 0.5).softmax(-1)
    return attn.proj((probabilities @ v).transpose(1, 2).flatten(2))


def _normalised(norm, x):
    return F.layer_norm(x, (DIM,), norm.weight, norm.bias, EPS)


def _case(name, *tags, **options):
    return Case(name, lambda maker: _call(maker, **options), frozenset(tags))


class TestBlock(Contract):
    """On the CPU kernels; what the interpreter takes seconds for is tested on the operators themselves."""

    precisions = {"cpu": Contract.precisions["cpu"]}
    draws = 8
    cases = [
        _case("reduced", "smallest", "inductor"),
        _case("not_reduced", sr_ratio=1, grid=(3, 4)),
        _case("linear", sr_ratio=1, linear=True),
        _case("empty_batch", "empty", batch=0),
    ]
    # The keys' linear is PyTorch's own as long as no weights are packed, and its backward does depend on autocast.
    test_backward_does_not_depend_on_the_autocast_around_it = None
    fused = ("depthwise_mlp", "global_attention", "patch_embedding")
    equivalent = staticmethod(_plain)
    reshaped = ([_case(f"{n} images", batch=n) for n in (2, 3, 5)], {"x": (0,)})
