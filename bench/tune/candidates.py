"""Configurations worth a try: the usual one, and those one or two steps from it."""

from __future__ import annotations

from itertools import combinations, product

from fastvit_kernels.ops.triton_configs import Config

# The least that a tile of a product may have, and the most that any has.
_SMALLEST_BLOCK, _LARGEST_BLOCK = 16, 256
_WARPS = (2, 4, 8, 16)
_STAGES = (1, 2, 3, 4)
# Blocks that hold all of something, or that a kernel has in name only: those stay.
_FIXED = {"moments": ("block_m", "block_k"), "attention_projection": ("block_n",)}


def candidates(kernel: str, usual: Config) -> list[Config]:
    """The usual configuration first, then the others, those of one step in front.

    A step doubles or halves a block, or takes the next number of warps or stages. A kernel's results hold for all of
    them: they differ in speed, and in whether they compile without spilling.
    """
    steps = {name: _steps(kernel, name, getattr(usual, name)) for name in Config._fields}
    found = [usual]
    for count in (1, 2):
        for names in combinations(Config._fields, count):
            for values in product(*(steps[name] for name in names)):
                found.append(usual._replace(**dict(zip(names, values, strict=True))))
    return found


def _steps(kernel: str, name: str, value: int) -> list[int]:
    if name == "num_warps":
        return _neighbours(_WARPS, value)
    if name == "num_stages":
        return _neighbours(_STAGES, value)
    if value == 0 or name in _FIXED.get(kernel, ()):
        return []
    # A smaller or a larger one is that of a kernel without products.
    smallest = _SMALLEST_BLOCK if value >= _SMALLEST_BLOCK else 1
    largest = _LARGEST_BLOCK if value <= _LARGEST_BLOCK else 2 * value
    return [n for n in (value // 2, 2 * value) if smallest <= n <= largest]


def _neighbours(values: tuple[int, ...], value: int) -> list[int]:
    at = values.index(value)
    return [*values[max(at - 1, 0) : at], *values[at + 1 : at + 2]]
