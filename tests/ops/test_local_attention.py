"""local_attention: the contract, its formula window by window in plain PyTorch, its paddings and its messages."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from fastvit_kernels.ops import library, local_attention
from fastvit_kernels.ops.normalization import group_statistics
from fastvit_kernels.ops.packing import PackedWeights
from fastvit_kernels.testing import inputs, relative_l2
from fastvit_kernels.testing.contract import Contract, Rejection
from fastvit_kernels.testing.contract.base import run


def plain_pytorch(
    x,
    grid,
    window_size,
    num_heads,
    scale,
    k=None,
    v=None,
    norm=None,
    norm_weight=None,
    norm_bias=None,
    norm_eps=None,
    norm_statistics=None,
    qkv_weight=None,
    qkv_bias=None,
    attn_bias=None,
    proj_weight=None,
    proj_bias=None,
    residual=None,
    pad="none",
    return_statistics=False,
):
    """Every window cut out of an NCHW map, attended to alone, and pasted into the map of results."""
    if norm == "layer":
        x = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, norm_eps)
    elif norm_statistics is not None:
        mean, var = norm_statistics.view(-1, 2, 1, 1).unbind(1)
        x = (x - mean) / (var + norm_eps).sqrt()
        x = x if norm_weight is None else x * norm_weight + norm_bias
    elif norm == "group" and len(x):
        x = F.group_norm(x.mT, 1, norm_weight, norm_bias, norm_eps).mT
    (height, width), g = grid, window_size
    bottom, right = ((-side) % g if pad != "none" else 0 for side in grid)
    maps = [F.pad(t.mT.unflatten(2, grid), (0, right, 0, bottom)) for t in (x, k, v) if t is not None]
    if qkv_weight is not None:
        maps = [F.conv2d(maps[0], qkv_weight[:, :, None, None], qkv_bias)]
    q, k, v = maps if len(maps) == 3 else maps[0].chunk(3, 1)
    out = torch.zeros_like(v)
    for top in range(0, height, g):
        for left in range(0, width, g):
            window = (slice(None), slice(None), slice(top, top + g), slice(left, left + g))
            heads = [t[window].flatten(2).unflatten(1, (num_heads, -1)).mT for t in (q, k, v)]
            bias = torch.zeros((), dtype=x.dtype) if attn_bias is None else attn_bias
            if pad == "mask":
                inside = (torch.arange(top, top + g) < height)[:, None] & (torch.arange(left, left + g) < width)
                bias = bias.expand(num_heads, g * g, g * g).masked_fill(~inside.flatten(), -torch.inf)
            bias = None if bias.ndim == 0 else bias
            attended = F.scaled_dot_product_attention(*heads, attn_mask=bias, scale=scale)
            out[window] = attended.mT.flatten(1, 2).unflatten(2, (g, g))
    out = out[:, :, :height, :width].flatten(2).mT
    if proj_weight is not None:
        out = F.linear(out, proj_weight, proj_bias)
    if residual is not None:
        out = out + residual
    if not return_statistics:
        return out
    mean = out.mean((1, 2))
    return out, torch.stack([mean, out.square().mean((1, 2)) - mean.square()], 1)


class TestLocalAttention(Contract, Rejection):
    # In gradients of few numbers the errors of kernel and reference are independent.
    draws = 3
    cases = inputs.LOCAL_ATTENTION
    precisions = {**Contract.precisions, "sdpa": (inputs.FP32, inputs.BF16)}
    fused = ("local_attention",)
    equivalent = staticmethod(plain_pytorch)
    reshaped = (
        [inputs.local_attention_case(f"batch_{n}", batch=n, grid=(6, 5), window=4, pad="mask") for n in (2, 3, 5)],
        {"x": (0,), "residual": (0,)},
    )

    def test_pytorchs_attention_in_every_case(self, case):
        """The suite's other checks of this backend are for the smallest cases."""
        for precision in (inputs.FP32, inputs.BF16, inputs.FP16):
            self.hold(case, precision, partial(run, backend="sdpa"))


def _call(**options):
    return inputs.local_attention_case("any", **{"grid": (6, 5), "window": 4, **options}).call(inputs.FP64)


def _output(call, **changes):
    return local_attention(**{**call.arguments, **changes})


@pytest.mark.parametrize("form", ["projected", "packed", "separate"])
def test_a_masked_map_is_independent_of_what_lies_beyond_it(form):
    """Windows that the padding fills up give what their own pixels alone give: here a window of fewer keys."""
    call = _call(form=form, pad="mask", grid=(4, 6), residual=False)
    right = _output(call)[:, [r * 6 + c for r in range(4) for c in (4, 5)]]
    arguments = {name: t for name, t in call.arguments.items() if name not in ("x", "k", "v")}
    rows = {n: call.arguments[n].unflatten(1, (4, 6))[:, :, 4:] for n in ("x", "k", "v") if n in call.arguments}
    # The same 8 pixels as the top of a 4 x 4 window whose other half is padding.
    alone = local_attention(**{**arguments, **{n: t.flatten(1, 2) for n, t in rows.items()}, "grid": (2, 4)})
    assert relative_l2(right, alone) < 1e-14


def test_zeros_take_part_as_the_bias_of_their_projection():
    """Twins pads behind the norm: an added pixel's key and value are the bias of the linear layer, not zero."""
    call = _call(pad="zero", norm="layer")
    padded = F.layer_norm(call.arguments["x"], (20,), *(call.arguments[f"norm_{n}"] for n in ("weight", "bias")), 1e-5)
    padded = F.pad(padded.unflatten(1, (6, 5)), (0, 0, 0, 3, 0, 2)).flatten(1, 2)
    changes = {"x": padded, "grid": (8, 8), "pad": "none", "residual": None}
    changes |= {f"norm{n}": None for n in ("", "_weight", "_bias", "_eps")}
    whole = _output(call, **changes).unflatten(1, (8, 8))[:, :6, :5].flatten(1, 2)
    assert relative_l2(_output(call), whole + call.arguments["residual"]) < 1e-14
    assert relative_l2(_output(call, pad="mask"), _output(call)) > 1e-3
    assert relative_l2(_output(call, qkv_bias=None), _output(call)) > 1e-3


def test_the_bias_is_one_of_each_head_query_and_key():
    """Its gradient is the sum over samples and windows of the scores' own."""
    call = _call(form="packed", grid=(8, 8), attn_bias=True, proj=False, residual=False)
    bias = call.arguments["attn_bias"].requires_grad_()
    grad = torch.randn(2, 64, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (found,) = torch.autograd.grad(_output(call), bias, grad)
    each = bias.detach().expand(2, 4, *bias.shape).clone().requires_grad_()
    windows = call.arguments["x"].view(2, 2, 4, 2, 4, 48).transpose(2, 3).reshape(2, 4, 16, 3, 2, 8)
    q, k, v = windows.permute(3, 0, 1, 4, 2, 5)
    p = (q @ k.mT * call.arguments["scale"] + each).softmax(-1)
    out = (p @ v).transpose(2, 3).reshape(2, 2, 2, 4, 4, 16).transpose(2, 3).reshape(2, 64, 16)
    (wanted,) = torch.autograd.grad(out, each, grad)
    assert relative_l2(found, wanted.sum((0, 1))) < 1e-13


def test_given_statistics_are_used_and_differentiated():
    """They are inputs: the sample's own give the norm, others do not, and a gradient flows back through both."""
    call = _call(norm="group", pad="mask")
    x = call.arguments["x"].requires_grad_()
    found, wanted = _output(call, norm_statistics=group_statistics(x)), _output(call)
    assert relative_l2(found, wanted) < 1e-14
    assert relative_l2(_output(call, norm_statistics=group_statistics(x) * 2), wanted) > 1e-2
    grad = torch.randn(wanted.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    gradients = [torch.autograd.grad(out, x, grad)[0] for out in (found, wanted)]
    assert relative_l2(*gradients) < 1e-13


def test_returned_statistics_are_those_of_the_result():
    call = _call(pad="zero", return_statistics=True)
    out, statistics = _output(call)
    assert torch.equal(out, _output(call, return_statistics=False))
    assert statistics.shape == (2, 2)
    assert relative_l2(statistics[:, 0], out.mean((1, 2))) < 1e-14
    assert relative_l2(statistics[:, 1], out.var((1, 2), correction=0)) < 1e-14


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", [None, torch.float32, torch.bfloat16, torch.float16])
def test_the_result_has_the_promoted_dtype(residual, compute):
    """Of the compute dtype and the residual, which no autocast narrows; statistics are fp32 in any case."""
    for dtype in {torch.float32, compute}:
        x = torch.ones(1, 4, 6, dtype=dtype)
        added = None if residual is None else torch.ones(1, 4, 2, dtype=residual)
        options = {"grid": (2, 2), "window_size": 2, "num_heads": 1, "scale": 1.0, "return_statistics": True}
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != compute):
            found, statistics = local_attention(x, residual=added, **options)
        assert found.dtype == (compute if residual is None else torch.promote_types(compute, residual))
        assert statistics.dtype == torch.float32


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
@pytest.mark.parametrize("pad", ["mask", "zero"])
def test_not_a_number_stays_in_its_window(pad, backend):
    call = _call(pad=pad, proj=False, residual=False, channels=16).map(lambda t: t.float())
    clean = _output(call, backend=backend).unflatten(1, (6, 5))
    call.arguments["x"][1, 4 * 5 + 4] = torch.nan
    found = _output(call, backend=backend).unflatten(1, (6, 5))
    # The pixel in row 4 and column 4 is in the last of four windows, which holds two pixels of the map.
    touched = torch.zeros(2, 6, 5, dtype=torch.bool)
    touched[1, 4:, 4:] = True
    assert torch.equal(found.isnan(), touched.unsqueeze(-1).expand_as(found))
    assert torch.equal(found[~touched], clean[~touched])


@pytest.fixture
def window_sizes(monkeypatch):
    """Those that operators are called with."""
    found = []
    call = library.call

    def listening(operator, tensors, static, **options):
        found.append(static.window_size)
        return call(operator, tensors, static, **options)

    monkeypatch.setattr(library, "call", listening)
    return found


@pytest.mark.parametrize("grid", [(2, 3), (5, 1), (4, 4)])
def test_a_mask_takes_windows_of_any_size_at_no_cost(grid, window_sizes):
    """What lies beyond the map is not computed: a window of a million pixels a side is one as large as the map."""
    call = _call(grid=grid, window=max(grid), pad="mask")
    assert torch.equal(_output(call, window_size=10**6), _output(call))
    assert window_sizes == [max(grid)] * 2


@pytest.mark.parametrize(("pad", "attn_bias"), [("mask", True), ("zero", False)])
def test_windows_keep_their_size_where_it_matters(pad, attn_bias, window_sizes):
    """A bias has the size of its windows, and zeros beyond the map take part."""
    call = _call(grid=(2, 3), window=5, pad=pad, attn_bias=attn_bias)
    assert relative_l2(_output(call), plain_pytorch(**call.arguments)) < 1e-14
    assert window_sizes == [5]


def test_packed_weights_serve_windows_of_any_size(monkeypatch):
    """A map smaller than the window shrinks it; without a bias that is nothing to pack again for."""
    packed, call = PackedWeights(), _call(pad="mask", channels=16).map(lambda t: t.float())
    x, weight = call.arguments["x"], call.arguments["qkv_weight"]
    options = {"num_heads": 2, "scale": 0.25, "window_size": 4, "pad": "mask", "packed": packed}
    blocks = []
    with torch.no_grad():
        for grid in ((6, 5), (2, 3), (3, 3)):
            rows = x[:, : grid[0] * grid[1]].contiguous()
            found = local_attention(rows, grid=grid, qkv_weight=weight, **options)
            wanted = local_attention(rows, grid=grid, qkv_weight=weight, **options, backend="reference")
            assert relative_l2(found, wanted) < 1e-6
            blocks.append(packed._entry.packed)
    assert all(block is blocks[0] for block in blocks)


_ROWS = torch.zeros(2, 30, 16)
_REST = {"qkv_weight": None, "qkv_bias": None}
_NO_NORM = {f"norm{n}": None for n in ("", "_weight", "_bias", "_eps", "_statistics")}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(30, 20)}, ValueError, r"x: expected 3 dimensions, got shape \(30, 20\)"),
        ({"x": torch.zeros(2, 29, 20)}, ValueError, "grid: 5 x 6 do not make the 29 tokens of x"),
        ({"x": torch.zeros(2, 30, 19)}, ValueError, r"qkv_weight: expected shape \(48, 19\), got \(48, 20\)"),
        ({"grid": None}, ValueError, r"grid: expected \(H, W\), got None"),
        ({"grid": 30}, ValueError, r"grid: expected \(H, W\), got 30"),
        ({"grid": (5, 6.0)}, TypeError, "grid: expected an integer, got float"),
        ({"grid": (0, 6)}, ValueError, "grid: expected an integer of at least 1, got 0"),
        ({"window_size": 0}, ValueError, "window_size: expected an integer of at least 1, got 0"),
        ({"window_size": 4097}, ValueError, "window_size: expected an integer of at most 4096, got 4097"),
        ({"window_size": 4097, "pad": "zero"}, ValueError, "window_size: expected an integer of at most 4096, got"),
        ({"window_size": (4, 4)}, TypeError, "window_size: expected an integer, got tuple"),
        ({"window_size": 3}, ValueError, r"attn_bias: expected shape \(2, 9, 9\), got \(2, 16, 16\)"),
        ({"pad": "reflect"}, ValueError, "pad: expected one of none, mask, zero, got 'reflect'"),
        ({"pad": None}, ValueError, "pad: expected one of none, mask, zero, got None"),
        ({"pad": "none"}, ValueError, "grid: expected multiples of the window_size 4, got 5 x 6; pad="),
        ({"k": _ROWS}, ValueError, "k: expected None beside a qkv_weight"),
        ({"v": _ROWS}, ValueError, "v: expected None beside a qkv_weight"),
        ({"qkv_weight": torch.zeros(47, 20)}, ValueError, r"qkv_weight: expected \[3 C, C_in\], got 47 rows"),
        ({"qkv_weight": torch.zeros(48)}, ValueError, r"qkv_weight: expected \[3 C, C_in\], got shape \(48,\)"),
        ({"qkv_weight": None}, ValueError, "qkv_bias: expected a qkv_weight beside it, got None"),
        ({"qkv_bias": torch.zeros(20)}, ValueError, r"qkv_bias: expected shape \(48,\), got \(20,\)"),
        (_REST, ValueError, r"x: expected \[B, H\*W, 3 C\] without k, v and qkv_weight, got shape \(2, 30, 20\)"),
        (_REST | {"x": torch.zeros(2, 30, 48)}, ValueError, "norm: expected None without a qkv_weight behind it"),
        (_REST | {"v": _ROWS}, TypeError, "k: expected a torch.Tensor, got NoneType"),
        (_REST | {"k": _ROWS, "v": _ROWS}, ValueError, "k: expected 20 channels like x, got 16"),
        (_REST | {"x": _ROWS, "k": _ROWS}, TypeError, "v: expected a torch.Tensor, got NoneType"),
        (_REST | {"x": _ROWS, "k": _ROWS.bfloat16()}, TypeError, "k: expected float32 like x, got bfloat16"),
        (_REST | {"x": _ROWS, "k": _ROWS, "v": _ROWS[:, 1:]}, ValueError, "v: expected batch 2 and 30 rows, got"),
        (_REST | {"x": _ROWS, "k": _ROWS, "v": _ROWS[:1]}, ValueError, "v: expected batch 2 and 30 rows, got"),
        (_REST | {"x": _ROWS, "k": _ROWS, "v": _ROWS.to("meta")}, ValueError, "v: expected device cpu, got meta"),
        (
            _REST | _NO_NORM | {"x": _ROWS, "k": _ROWS, "v": _ROWS[..., :15]},
            ValueError,
            "num_heads: 2 does not divide 16 and 15 channels",
        ),
        ({"norm": "batch"}, ValueError, 'norm: expected "layer", "group" or None, got \'batch\''),
        ({"norm": None}, ValueError, 'norm: expected "layer" or "group" beside norm_weight, got None'),
        ({"norm": "layer"}, ValueError, 'norm_statistics: expected them with norm="group" only'),
        ({"norm_eps": None}, ValueError, "norm_eps: expected the norm's epsilon beside norm, got None"),
        ({"norm_eps": -1.0}, ValueError, "norm_eps: expected a finite number in .*, got -1"),
        ({"norm_weight": torch.zeros(16)}, ValueError, r"norm_weight: expected shape \(20,\), got \(16,\)"),
        ({"norm_statistics": torch.zeros(2)}, ValueError, r"norm_statistics: expected float32 of shape \(2, 2\)"),
        ({"num_heads": 3}, ValueError, "num_heads: 3 does not divide 16 and 16 channels"),
        ({"num_heads": 2.0}, TypeError, "num_heads: expected an integer, got float"),
        ({"scale": None}, TypeError, "scale: expected a number, got NoneType"),
        ({"scale": float("nan")}, ValueError, "scale: expected a finite number in .*, got nan"),
        ({"attn_bias": torch.zeros(2, 7, 7)}, ValueError, r"attn_bias: expected shape \(2, 16, 16\), got \(2, 7, 7\)"),
        ({"proj_weight": None}, ValueError, "proj_bias: expected a proj_weight beside it, got None"),
        ({"proj_weight": torch.zeros(16, 8)}, ValueError, r"proj_weight: expected shape \(16, 16\), got \(16, 8\)"),
        ({"proj_bias": torch.zeros(8)}, ValueError, r"proj_bias: expected shape \(16,\), got \(8,\)"),
        ({"residual": torch.zeros(2, 30, 8)}, ValueError, r"residual: expected shape \(2, 30, 16\), got \(2, 30, 8\)"),
        ({"residual": _ROWS.double()}, TypeError, "residual: float64 does not go with float32"),
        ({"return_statistics": None}, TypeError, "return_statistics: expected a bool, got NoneType"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = inputs.tagged(inputs.LOCAL_ATTENTION, "smallest")[0].call().arguments
    with pytest.raises(error, match=message):
        local_attention(**{**arguments, **change})
