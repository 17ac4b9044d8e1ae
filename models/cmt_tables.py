"""CMT's tables of relative positions in checkpoints for images of another size.

A table `[heads, N, M]` has an entry for every pixel of a stage's map (N) beside every pixel of the reduced one (M), so
it fits images of one size only. Resizing takes it as what it is, a map of keys for each query and a map of queries for
each key, and resizes both bicubically. The paper (section 3.3) resizes for fine-tuning, the official code never does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]


def check_tables(state_dict: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> list[str]:
    """What to tell the user about tables of another size than the model's."""
    for key, table in _tables(state_dict, ours).items():
        if table.shape[1:] != ours[key].shape[1:]:
            return [
                f"{key} is for maps of {table.shape[1]} pixels, and this model's have {ours[key].shape[1]}: build it "
                "with the checkpoint's img_size, or with resize_relative_pos=True"
            ]
    return []


def resize_tables(
    state_dict: Mapping[str, Tensor],
    ours: Mapping[str, Tensor],
    grids: Mapping[str, Grid],
    ratios: Mapping[str, int],
) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict with its tables in the model's sizes, and what to tell the user.

    Args:
        state_dict: its tables must be for square images; others, and those with other heads, stay as they are.
        ours: the model's own.
        grids, ratios: of each table of the model: height and width of the map, and how many times smaller the map of
            the keys is each way.
    """
    converted, resized = dict(state_dict), []
    for key, table in _tables(state_dict, ours).items():
        side, ratio = math.isqrt(table.shape[1]), ratios[key]
        whole = side % ratio == 0 and table.shape[1:] == (side * side, (side // ratio) ** 2)
        if table.shape != ours[key].shape and table.shape[0] == ours[key].shape[0] and whole:
            converted[key] = resize_table(table, side, grids[key], ratio)
            resized.append(key)
    return converted, [f"resized to this model's images: {', '.join(resized)}"] if resized else []


def resize_table(table: Tensor, side: int, grid: Grid, ratio: int) -> Tensor:
    """A table `[heads, side**2, (side / ratio)**2]` for maps of `grid`, bicubically, queries and keys in turn."""
    heads, dtype = table.shape[0], table.dtype
    small, keys = side // ratio, (grid[0] // ratio, grid[1] // ratio)
    queries_by_keys = table.double().mT.reshape(-1, 1, side, side)
    resized = _bicubic(queries_by_keys, grid).reshape(heads, small * small, -1)
    return _bicubic(resized.mT.reshape(-1, 1, small, small), keys).reshape(heads, grid[0] * grid[1], -1).to(dtype)


def _bicubic(maps: Tensor, grid: Grid) -> Tensor:
    if tuple(maps.shape[2:]) == grid:
        return maps
    return F.interpolate(maps, grid, mode="bicubic", align_corners=False)


def _tables(state_dict: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: t for k, t in state_dict.items() if k.startswith("relative_pos_") and k in ours and t.ndim == 3}
