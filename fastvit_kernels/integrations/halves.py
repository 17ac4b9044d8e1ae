"""Blocks of two halves, `x + attention(norm(x))` and `x + mlp(norm(x))`: what their integrations share.

A half that the operators cannot express as things are now runs the host's modules; a block with a half that they never
can is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastvit_kernels.integrations.adapter import STATE, Adapter, state_of
from fastvit_kernels.nn import fused


class Half(NamedTuple):
    """One half of a block.

    Attributes:
        obstacles: why the block's half cannot be fused now; with True as its second argument, why it never can: a
            dropout that is merely at work does not count.
        run: the fused half on a map as small as it takes, of zeros: packing needs a call, and any will do.
    """

    obstacles: Callable[[Any, bool], list[str]]
    run: Callable[[Any], Tensor]


def add_branch(x: Tensor, branch: Callable[[Tensor | None], Tensor], drops: Sequence[nn.Module]) -> Tensor:
    """`x + branch`, behind its dropouts and drop paths.

    Args:
        x: the residual.
        branch: the fused half, which adds what it is given.
        drops: dropouts and drop paths behind the branch, in order; where they drop nothing the sum is fused too.
    """
    if all(map(fused.drops_nothing, drops)):
        return branch(x)
    out = branch(None)
    for drop in drops:
        out = drop(out)
    return x + out


def adapter_of_halves(
    host: type[nn.Module],
    fused_class: type[nn.Module],
    operators: tuple[str, ...],
    halves: Mapping[str, Half],
    part: bool = False,
) -> Adapter:
    """The adapter of a block of these halves, by their names in reports; or of a half that stands by itself, a part."""

    def obstacles(block: nn.Module) -> list[str]:
        reasons = [reason for half in halves.values() for reason in half.obstacles(block, True)]
        if "forward" in block.__dict__:
            reasons.append("its forward was replaced on the instance")
        return reasons

    def unfused(block: nn.Module) -> list[str]:
        reasons = [f"{name}: {reason}" for name, half in halves.items() for reason in half.obstacles(block, False)]
        return [*state_of(block).call, *reasons] if STATE in block.__dict__ else reasons

    def pack(block: nn.Module) -> None:
        with torch.no_grad():
            for half in halves.values():
                if not half.obstacles(block, False):
                    half.run(block)

    return Adapter(host, fused_class, operators, obstacles, unfused, pack, part)


def note_call(block: nn.Module, *reasons: str) -> None:
    """Keep why parts of this call run the host's own code, for reports: what is asked for is seen by nobody else."""
    state = state_of(block)
    if state.call != reasons:
        state.call = reasons


def blank(linear: nn.Linear, side: int = 1) -> Tensor:
    """One empty image of `side` x `side` tokens, as this linear and the norm in front of it take it."""
    return linear.weight.new_zeros((1, side * side, linear.in_features))
