"""HierarchicalAttention keeps the operators' contract, with its residual, and with statistics in and out."""

from __future__ import annotations

import plain_hat_net
import torch

from fastvit_kernels.nn import HierarchicalAttention
from fastvit_kernels.testing.calls import Call
from fastvit_kernels.testing.contract import Contract
from fastvit_kernels.testing.contract.base import on_cases
from fastvit_kernels.testing.inputs import Case

DIM, HEAD = 24, 8


def _call(maker, sizes=(4, 2), grid=(6, 5), batch=2, given=False):
    module = HierarchicalAttention(DIM, HEAD, *sizes, pad="mask")
    # No part of the function, so no part of what is differentiated.
    del module.proj_norm
    with torch.no_grad():
        for name, t in module.named_parameters():
            if t.ndim > 1:
                t.copy_(maker.weight(*t.shape))
            else:
                t.copy_(maker.positive(*t.shape) if name.endswith("norm.weight") else maker.vector(*t.shape))
    module.to(maker.precision.parameters)
    x = maker.activation(batch, DIM, *grid).to(memory_format=torch.channels_last)
    residual = maker.activation(batch, DIM, *grid).to(memory_format=torch.channels_last)
    more = {"statistics": maker.statistics(batch), "return_statistics": True} if given else {}
    return Call(module, {"x": x, "residual": residual, **more})


def _plain(module, x, residual, statistics=None, return_statistics=False):
    plain = plain_hat_net.Attention(DIM, HEAD, module.grid_size, module.ds_ratio)
    del plain.proj_norm
    plain.load_state_dict(module.state_dict(), strict=True)
    if statistics is not None:
        plain.norm = _Given(plain.norm, statistics)
    out = residual + plain.double()(x)
    if not return_statistics:
        return out
    mean = out.mean((1, 2, 3))
    return out, torch.stack([mean, out.square().mean((1, 2, 3)) - mean.square()], 1)


class _Given(torch.nn.Module):
    """A GroupNorm of one group by statistics that somebody else found."""

    def __init__(self, norm, statistics):
        super().__init__()
        self.norm, self.statistics = norm, statistics

    def forward(self, x):
        mean, var = self.statistics.view(-1, 2, 1, 1, 1).unbind(1)
        weight, bias = (t.view(-1, 1, 1) for t in (self.norm.weight, self.norm.bias))
        return (x - mean) / (var + self.norm.eps).sqrt() * weight + bias


def _case(name, *tags, **options):
    return Case(name, lambda maker: _call(maker, **options), frozenset(tags))


class TestHierarchicalAttention(Contract):
    """On the CPU kernels; what the interpreter takes seconds for is tested on the operators themselves."""

    precisions = {"cpu": Contract.precisions["cpu"]}
    draws = 8
    cases = [
        _case("two_levels", "smallest", "inductor"),
        _case("whole_windows", grid=(8, 4)),
        _case("given_statistics", given=True),
        _case("one_level_square", "smallest", "operators only", sizes=(1, 1), grid=(4, 4)),
        _case("one_level", sizes=(1, 1), grid=(3, 5)),
        _case("one_level_given_statistics", sizes=(1, 1), grid=(3, 5), given=True),
        _case("empty_batch", "empty", batch=0),
    ]
    fused = ("local_attention",)
    equivalent = staticmethod(_plain)
    reshaped = ([_case(f"{n} images", batch=n) for n in (2, 3, 5)], {"x": (0,), "residual": (0,)})

    @on_cases("operators only")
    def test_backward_does_not_depend_on_the_autocast_around_it(self, case, backend):
        """The pooled keys' linear is PyTorch's own, whose backward follows autocast like that of any `nn.Linear`."""
        super().test_backward_does_not_depend_on_the_autocast_around_it(case, backend)
