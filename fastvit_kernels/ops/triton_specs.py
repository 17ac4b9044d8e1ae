"""How Triton kernels are compiled where there is no GPU: every module with kernels ends with its `SPECS`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Empty(NamedTuple):
    """Makes the tensors of a spec, which have shapes and no memory.

    Attributes:
        dtype: of rows, parameters and products.
    """

    dtype: torch.dtype

    def __call__(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device="meta")

    def wide(self, *shape: int) -> Tensor:
        """In fp32, as statistics and partial sums are."""
        return torch.empty(shape, device="meta")

    def batch_norm(self, channels: int) -> list[Tensor]:
        """Weight, bias, mean and variance."""
        return [self(channels) for _ in range(4)]


class Spec(NamedTuple):
    """What ahead-of-time compilation takes for one kernel.

    Signature, constants, warps and stages are those of a launch: a list of them would say the launcher's once more.

    Attributes:
        kernel: the kernel.
        launch: calls a launcher of it with what it has to do in a published model; it may launch others, too.
        products: whether it multiplies matrices, which for bf16 and fp16 must be done by tensor cores' instructions.
    """

    kernel: Any
    launch: Callable[[Empty], object]
    products: bool = False
