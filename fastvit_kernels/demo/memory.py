"""Peak memory of a model, measured in a process that does nothing else.

`python -m fastvit_kernels.demo.memory MODEL INPUT stock|accelerated fp32|bf16 THREADS` loads the saved model, runs
it and prints the result as JSON; `peak_memory` starts it.
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

PASSES = 2
METHOD = "peak resident memory of a fresh process (VmHWM, else ru_maxrss)"


@dataclass(frozen=True)
class Memory:
    """Bytes resident in the measured process.

    Attributes:
        resting: after the model is loaded and its weights are in their final layout.
        peak: the highest value during the passes.
    """

    resting: int
    peak: int

    @property
    def rise(self) -> int:
        """What the passes needed on top of the loaded model."""
        return self.peak - self.resting


def peak_memory(model_file: Path, input_file: Path, variant: str, dtype: str, threads: int) -> Memory:
    """Measure the model saved in `model_file` on the tensor saved in `input_file` in a fresh process.

    Raises:
        RuntimeError: the process failed; the message ends with what it wrote last.
    """
    command = [sys.executable, "-m", "fastvit_kernels.demo.memory", str(model_file), str(input_file)]
    done = subprocess.run([*command, variant, dtype, str(threads)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the memory measurement of the {variant} model failed:\n{done.stderr[-2000:]}")
    return Memory(**json.loads(done.stdout.splitlines()[-1]))


def _resident_and_peak() -> tuple[int, int]:
    """Bytes resident now and at most so far."""
    status = Path("/proc/self/status")
    if status.exists():
        # ru_maxrss would not do on Linux: a process inherits the value of the one that started it.
        found = dict(re.findall(r"(VmRSS|VmHWM):\s+(\d+) kB", status.read_text()))
        return int(found["VmRSS"]) * 1024, int(found["VmHWM"]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak, peak


def _forget_peak() -> None:
    # Loading may have needed more for a moment than the passes do. Kernels that refuse leave the higher figure.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _measure(model_file: str, input_file: str, variant: str, dtype: str, threads: str) -> Memory:
    from fastvit_kernels import accelerate
    from fastvit_kernels.demo.measure import logits, precision

    torch.set_num_threads(int(threads))
    # Written a moment ago by the process that started this one.
    model = torch.load(model_file, weights_only=False)
    x = torch.load(input_file)
    if variant == "accelerated":
        accelerate(model, inference=True)
    with precision(dtype):
        # One small pass brings the code in and packs the weights.
        logits(model, x[:1, :, :64, :64].contiguous(memory_format=torch.channels_last))
        _forget_peak()
        resting, _ = _resident_and_peak()
        for _ in range(PASSES):
            logits(model, x)
    return Memory(resting, _resident_and_peak()[1])


if __name__ == "__main__":
    print(json.dumps(asdict(_measure(*sys.argv[1:]))))
