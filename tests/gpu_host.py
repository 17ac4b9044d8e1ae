"""A device for tests of the GPU's benchmark, which is this CPU, and small cases for it; other processes import them."""

from __future__ import annotations

import os
import time

import torch
from torch import nn

from fastvit_kernels.bench.cases import Case, as_outputs
from fastvit_kernels.bench.flops import Cost
from fastvit_kernels.bench.gpu.worker import Lost
from fastvit_kernels.bench.roofline import Roofline
from fastvit_kernels.bench.suites import cmt, conv_projection, cvt, depthwise_mlp, dhvt, global_attention, pointwise_mlp
from fastvit_kernels.bench.suites.operators import Stage

STAGE = Stage("tiny", 8, (12, 12), 3, 2, 1, 16, 2, 0)
CVT = {
    "depths": (1,),
    "embed_dims": (16,),
    "num_heads": (1,),
    "patch_sizes": (7,),
    "patch_strides": (4,),
    "patch_paddings": (2,),
    "num_classes": 10,
}


class Host:
    """This CPU under the name of a GPU."""

    type = "cpu"
    spoiled = False

    def name(self):
        return "Test GPU 1"

    def capability(self):
        return "9.0"

    def synchronize(self):
        pass

    def times(self, run, calls, cold):
        found = []
        for _ in range(calls):
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
        return found

    def capture(self, run):
        results = as_outputs(run())

        def replay():
            repeated = as_outputs(run())
            with torch.inference_mode():
                for result, again in zip(results, repeated, strict=True):
                    result.copy_(again)
            return results

        return replay

    def peak_bytes(self, run):
        run()
        return 3_000_000

    def limits(self):
        return Roofline(fp32_gflops=50.0, bf16_gflops=100.0, copy_gbs=10.0)

    def release(self):
        pass


class Broken(Host):
    """Once a task has set `broken`, nothing runs here any more."""

    broken = False

    def synchronize(self):
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


class Inline:
    """A worker in this process."""

    def __init__(self, device=None):
        self.device, self.tasks = device or Host(), []

    def run(self, task, *arguments, limit):
        self.tasks.append((task, arguments, limit))
        return task(self.device, *arguments)

    def close(self):
        pass


class Doubling(nn.Module):
    """`2 x`; fused, something else."""

    def __init__(self, fused):
        super().__init__()
        self.fused, self.active = fused, False
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x):
        if self.active:
            return self.fused(x)
        return 2 * x


def _doubling(name, batch, fused):
    def fuse(module):
        module.active = True
        return module

    def make():
        return (torch.randn(batch, 4),)

    return Case("pointwise_mlp", name, batch, lambda: Cost(100, 10, 8 * batch), lambda: Doubling(fused), make, fuse)


def _no_memory(x):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")


def _error(x):
    raise RuntimeError("no kernel image is available")


STRANGE = {
    "right": lambda x: 2 * x,
    "wrong": lambda x: 2.1 * x,
    "error": _error,
    "no memory": _no_memory,
    "ends the process": lambda x: os._exit(7),
    "does not return": lambda x: time.sleep(600),
}


def find(suite, case, batch):
    """Tiny cases under the names of suites."""
    if case in STRANGE:
        return _doubling(case, batch, STRANGE[case])
    if suite == "cvt_13":
        return cvt.case("cvt_13", batch, 32, **CVT)
    if suite == "cmt_s":
        return cmt.case("cmt_s", batch, side=64, depths=(1, 1, 1, 1), num_classes=10)
    if suite == "dhvt_small_imagenet_patch16":
        return dhvt.case(suite, batch, side=64, depth=1, num_classes=10)
    if suite == "depthwise_mlp":
        return depthwise_mlp.case(depthwise_mlp.Shape("tiny", depthwise_mlp.CMT, (6, 6), 16, 32), batch)
    makers = {"pointwise_mlp": pointwise_mlp, "global_attention": global_attention, "conv_projection": conv_projection}
    return makers[suite].case(STAGE, batch)


def end_process(device):
    os._exit(7)


def sleep(device, seconds):
    time.sleep(seconds)
    return seconds


def process(device):
    return os.getpid(), device.name()


def fail(device):
    raise ValueError("the task's own error")


def spoil(device):
    device.spoiled = True
    return os.getpid()


def lose(device):
    device.broken = True
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


class Losing(Inline):
    """A worker whose process ends at every call of these cases."""

    def __init__(self, *cases):
        super().__init__()
        self.cases = cases

    def run(self, task, *arguments, limit):
        if arguments and getattr(arguments[0], "case", None) in self.cases:
            raise Lost("the process ended with exit code 7")
        return super().run(task, *arguments, limit=limit)
