"""Bad input raises a clear error: ValueError or TypeError that begins with an argument's name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastvit_kernels.testing.calls import Call
from fastvit_kernels.testing.contract.base import ContractBase, on_cases
from fastvit_kernels.testing.inputs import FP32, Case


class Rejection(ContractBase):
    """Every tensor argument, spoilt in every way that is not legal.

    Attributes:
        resizable: arguments and axes whose size is free.
    """

    resizable: ClassVar[frozenset[tuple[str, int]]] = frozenset()

    @on_cases("smallest")
    def test_spoilt_tensors_are_named(self, case: Case) -> None:
        call = case.call(FP32)
        names = {**call.leaves(), **call.buffers()}
        for name, tensor in names.items():
            fixed = [axis for axis in range(tensor.ndim) if (name, axis) not in self.resizable]
            for how, spoilt in _spoilt(tensor, fixed):
                message = _message_of(call.with_leaves({name: spoilt}), f"{name} {how}")
                # Another argument may be the one that no longer fits; a spoilt one of its own kind names itself.
                subject = message.split(":")[0]
                about = [name] if how in _OWN_FAULT else [*names, *call.arguments]
                assert any(subject == a or a.startswith(f"{subject}.") for a in about), f"{name} {how}: {message}"
                assert re.search(r"expected|do not|does not|larger than", message), f"{name} {how}: {message}"

    @on_cases("smallest")
    def test_required_arguments_are_named(self, case: Case) -> None:
        call = case.call(FP32)
        for name in call.leaves():
            for value in (3, "text", [1.0, 2.0]):
                message = _message_of(call.with_leaves({name: value}), f"{name} = {value!r}")  # type: ignore[dict-item]
                assert message.startswith(f"{name}: expected a torch.Tensor, got {type(value).__name__}"), message


_OWN_FAULT = ("is integer", "is complex")


def _spoilt(t: Tensor, fixed: Sequence[int]) -> Iterator[tuple[str, Tensor]]:
    yield "is integer", t.long()
    yield "is complex", t.to(torch.complex64)
    yield "is on meta", t.to("meta")
    yield "is fp64", t.double()
    yield "has one axis more", t[None].expand(2, *t.shape)
    yield "has two axes more", t[None, None].expand(2, 2, *t.shape)
    yield "lacks an axis", t[0]
    for axis in fixed:
        yield f"is longer along axis {axis}", torch.cat([t, t.narrow(axis, 0, 1)], axis)


def _message_of(call: Call, what: str) -> str:
    try:
        result: Any = call.fresh()()
    except (TypeError, ValueError) as error:
        return str(error)
    raise AssertionError(f"{what}: accepted, returned {type(result).__name__}")
