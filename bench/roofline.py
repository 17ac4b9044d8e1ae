"""The limits of this machine, measured in the same run as the times they are compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastvit_kernels import _extension
from fastvit_kernels.bench.flops import Cost

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Roofline:
    """Limits with the thread count in use.

    Attributes:
        fp32_gflops, bf16_gflops: fused multiply-adds from registers, 1e9 operations a second.
        copy_gbs: bytes read plus bytes written by a copy larger than the caches, 1e9 a second.
    """

    fp32_gflops: float
    bf16_gflops: float
    copy_gbs: float

    def peak(self, dtype: str) -> float:
        """GFLOP/s of matrix products in `dtype`; bf16 can always be computed in fp32, so it is never the slower.

        GPUs multiply fp16 as fast as bf16.
        """
        return self.fp32_gflops if dtype == "fp32" else max(self.fp32_gflops, self.bf16_gflops)

    def floor(self, cost: Cost, dtype: str) -> float:
        """Seconds that no implementation of this arithmetic and this traffic can undercut."""
        arithmetic = cost.flops / (self.peak(dtype) * 1e9)
        traffic = cost.nbytes(DTYPES[dtype].itemsize) / (self.copy_gbs * 1e9)
        return max(arithmetic, traffic)

    def best(self, other: Roofline) -> Roofline:
        """The higher of two measurements of each limit: a neighbour on the machine can only lower them."""
        return Roofline(
            max(self.fp32_gflops, other.fp32_gflops),
            max(self.bf16_gflops, other.bf16_gflops),
            max(self.copy_gbs, other.copy_gbs),
        )


def measure(seconds: float = 0.3) -> Roofline:
    """Measure each limit for `seconds`, with `torch.get_num_threads()` threads.

    Raises:
        RuntimeError: the CPU kernels, which hold the measuring loops, are not there.
    """
    problem = _extension.parts["cpu"].problem
    if problem is not None:
        raise RuntimeError(f"the roofline is measured by the CPU kernels, and these are {problem}")
    ops = torch.ops.fastvit
    return Roofline(
        float(ops.cpu_peak("fp32", seconds)),
        float(ops.cpu_peak("bf16", seconds)),
        float(ops.cpu_bandwidth(seconds)),
    )
