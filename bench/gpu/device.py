"""The device under measurement: its clock, its graphs, its memory, its limits. All else runs anywhere."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from fastvit_kernels.bench.roofline import Roofline

Run = Callable[[], object]

_COPIED = 2**31
_PRODUCT = 8192
_REPEATS = 20
# Several times the second-level cache of any GPU so far.
_FLUSHED = 2**28


class CaptureRefused(RuntimeError):
    """No graph could be made of a function."""


class Device(Protocol):
    """What the benchmark asks of a device.

    Attributes:
        type: as `torch.device` calls it.
        spoiled: a capture was refused: the allocator of this process may still wait for its end, and nothing else is
            to be started here.
    """

    type: str
    spoiled: bool

    def name(self) -> str:
        """The device's own name for itself."""

    def capability(self) -> str:
        """Its generation, such as `"9.0"`."""

    def synchronize(self) -> None:
        """Wait for everything that was started; raises what went wrong in it."""

    def times(self, run: Run, calls: int, cold: bool) -> list[float]:
        """Seconds that each of so many calls takes on the device, with `cold` from empty caches."""

    def capture(self, run: Run) -> Run:
        """`run` recorded once; what comes back repeats it into the same results.

        Raises:
            CaptureRefused: something in it cannot be recorded.
        """

    def peak_bytes(self, run: Run) -> int:
        """The most memory that a call holds at once beside what was there before; all of it that graphs own counts."""

    def limits(self) -> Roofline:
        """Matrix products and copies, measured."""

    def release(self) -> None:
        """Give memory back that nobody uses."""


class Gpu:
    """The current CUDA device, by its own events, graphs and allocator."""

    type = "cuda"

    def __init__(self) -> None:
        self.spoiled = False
        self._flushed: Tensor | None = None

    def name(self) -> str:
        return torch.cuda.get_device_name()

    def capability(self) -> str:
        return ".".join(map(str, torch.cuda.get_device_capability()))

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def times(self, run: Run, calls: int, cold: bool) -> list[float]:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        if cold and self._flushed is None:
            self._flushed = torch.empty(_FLUSHED, dtype=torch.uint8, device=self.type)
        for start, end in pairs:
            if cold and self._flushed is not None:
                self._flushed.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]

    def capture(self, run: Run) -> Run:
        # The first calls compile, allocate and choose algorithms, none of which a graph may hold.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph, usual = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph):
                results = run()
        except Exception as error:
            self.spoiled = True
            torch.cuda.set_stream(usual)
            # The end of the capture fails after whatever it was that could not be recorded.
            cause = error.__context__ or error
            raise CaptureRefused(f"{type(cause).__name__}: {cause}") from error

        def replay() -> object:
            graph.replay()
            return results

        return replay

    def peak_bytes(self, run: Run) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, in_graphs = torch.cuda.memory_allocated(), _of_graphs("active_size")
        run()
        torch.cuda.synchronize()
        # Replays allocate nothing: their intermediate results lie in a pool that their graph has for itself.
        in_graphs = max(_of_graphs("active_size") - in_graphs, 0)
        beside = torch.cuda.max_memory_allocated() - before - in_graphs
        return max(beside, 0) + _of_graphs("total_size")

    def limits(self) -> Roofline:
        found = Roofline(self._gflops(torch.float32), self._gflops(torch.bfloat16), self._copy_gbs())
        self.release()
        return found

    def _gflops(self, dtype: torch.dtype) -> float:
        # Products of zeros can be faster.
        a, b = (torch.randn(_PRODUCT, _PRODUCT, device=self.type).to(dtype) for _ in range(2))
        return 2 * _PRODUCT**3 / min(self.times(lambda: a @ b, _REPEATS, cold=False)) / 1e9

    def _copy_gbs(self) -> float:
        source = torch.empty(_COPIED, dtype=torch.uint8, device=self.type).random_()
        target = torch.empty_like(source)
        return 2 * _COPIED / min(self.times(lambda: target.copy_(source), _REPEATS, cold=False)) / 1e9

    def release(self) -> None:
        # Graphs end with whoever holds them, and their memory with them.
        gc.collect()
        torch.cuda.empty_cache()


_NO_POOL = (0, 0)


def _of_graphs(size: str) -> int:
    """Bytes in all private pools of the allocator."""
    return sum(s[size] for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) != _NO_POOL)


def slug(name: str) -> str:
    """A device's name as file names have it, such as `nvidia-h200`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
