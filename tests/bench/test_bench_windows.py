"""The attentions of Twins and the windows of Swin are those of timm's models."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from timm_host import load_timm

from fastvit_kernels.bench.suites import twins, windows

load_timm()


def _stages(name: str) -> list[tuple[int, int, int, int]]:
    """Side of the map over the image's, channels, heads and window of the first block of every stage."""
    with torch.device("meta"):
        if name == "twins_svt_small":
            model: Any = importlib.import_module("timm.models.twins").twins_svt_small()
            reductions = [4 << index for index in range(4)]
            blocks = [(stage[0].attn, stage[0].attn.ws, stage[0].attn.dim) for stage in model.blocks]
        else:
            model = importlib.import_module("timm.models.swin_transformer").swin_tiny_patch4_window7_224()
            reductions = [info["reduction"] for info in model.feature_info]
            firsts = [stage.blocks[0] for stage in model.layers]
            assert not any(any(block.shift_size) for block in firsts)
            blocks = [(block.attn, block.window_size[0], block.dim) for block in firsts]
    return [(r, dim, attn.num_heads, ws) for r, (attn, ws, dim) in zip(reductions, blocks, strict=True)]


@pytest.mark.parametrize(
    ("name", "table"), [("twins_svt_small", [row[:3] for row in twins.SVT_SMALL]), ("swin_tiny", windows.SWIN_TINY)]
)
def test_stages(name: str, table: tuple[tuple[int, int, int], ...]) -> None:
    assert _stages(name) == [(*sizes, windows.WINDOW) for sizes in table]


def test_reduced_maps() -> None:
    with torch.device("meta"):
        model: Any = importlib.import_module("timm.models.twins").twins_svt_small()
    reduced = [stage[1].attn for stage in model.blocks]
    assert [(a.dim, a.num_heads, a.sr_ratio) for a in reduced] == [row[1:] for row in twins.SVT_SMALL]
    assert not any(a.q.bias is None for a in reduced)
    assert [(s.queries, s.keys) for s in twins.attentions()] == [(side**2, 49) for side in (56, 28, 14, 7)]


def test_what_is_fused_around_them() -> None:
    for shape in (*windows.of_twins(), *windows.of_swin()):
        assert shape.norm == "layer" and shape.projection and not shape.statistics
        assert shape.bias == shape.name.startswith("swin") and shape.grid[0] % shape.window == 0
