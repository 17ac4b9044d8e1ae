"""What was built, what this machine has, and which backends can run on it."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from fastvit_kernels import _extension
from fastvit_kernels._version import __version__
from fastvit_kernels.ops import triton_support
from fastvit_kernels.ops.dispatch import requested_backend


@dataclass(frozen=True)
class Availability:
    """Whether something can be used: `detail` describes it when it can, and says why not otherwise."""

    usable: bool
    detail: str

    def __str__(self) -> str:
        return f"{'yes' if self.usable else 'no'}: {self.detail}"


@dataclass(frozen=True)
class Info:
    """The answer of `info()`; `print` shows it as a table.

    Attributes:
        version: of this package.
        build: compiler, flags, torch, instruction sets and CUDA of the compiled kernels; empty when there are none.
        python: the interpreter's version.
        torch: torch's version.
        threads: the threads torch runs an operator on.
        processor: the CPU's own name for itself.
        cores: cores this process may use.
        isa: the instruction set the CPU kernels use, or why they use none.
        triton: its version, or why it cannot be imported.
        cuda: the GPU, or why there is none.
        default_backend: the choice made by an enclosing `use_backend` or by `FASTVIT_BACKEND`.
        backends: per backend, most preferred first, whether it can run on this machine.
    """

    version: str
    build: dict[str, str]
    python: str
    torch: str
    threads: int
    processor: str
    cores: int
    isa: Availability
    triton: Availability
    cuda: Availability
    default_backend: str
    backends: dict[str, Availability]

    def __str__(self) -> str:
        sections = {
            f"fastvit_kernels {self.version}": {
                key.replace("_", " "): value for key, value in self.build.items() if value
            }
            or {"build": "nothing compiled"},
            "this machine": {
                "processor": f"{self.processor}, {self.cores} cores",
                "instruction set": self.isa.detail,
                "python": self.python,
                "torch": f"{self.torch}, {self.threads} threads",
                "triton": self.triton.detail,
                "cuda": self.cuda.detail,
            },
            f"backends (default: {self.default_backend})": {name: str(can) for name, can in self.backends.items()},
        }
        width = max(len(label) for rows in sections.values() for label in rows)
        lines = []
        for title, rows in sections.items():
            lines.append(title)
            lines += [f"  {label:<{width}}  {value}" for label, value in rows.items()]
        return "\n".join(lines)


def cpu_model() -> str:
    """The processor's own name for itself, the architecture where it has none."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", path.read_text(), re.MULTILINE) if path.exists() else None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _isa() -> Availability:
    problem = _extension.parts["cpu"].problem
    if problem is not None:
        return Availability(False, problem)
    chosen = str(torch.ops.fastvit.cpu_isa())
    wish = os.environ.get("FASTVIT_CPU_ISA")
    if not wish:
        reason = "the best of those built that this processor has"
    elif wish == chosen:
        reason = "FASTVIT_CPU_ISA"
    else:
        reason = f"FASTVIT_CPU_ISA={wish} is not among those built that this processor has"
    return Availability(True, f"{chosen} ({reason})")


def _triton() -> Availability:
    try:
        import triton
    except ImportError as error:
        return Availability(False, f"cannot be imported: {error}")
    return Availability(True, str(triton.__version__))


def _cuda() -> Availability:
    if torch.version.cuda is None and torch.version.hip is None:
        return Availability(False, f"torch {torch.__version__} was built without it")
    if not torch.cuda.is_available():
        return Availability(False, "torch sees no GPU")
    return Availability(True, f"{torch.cuda.get_device_name()} (CUDA {torch.version.cuda})")


def _cuda_backend(cuda: Availability) -> Availability:
    problems = [] if cuda.usable else [cuda.detail]
    part = _extension.parts["cuda"].problem
    if part is not None:
        problems.append(part)
    return Availability(False, "; ".join(problems)) if problems else cuda


def _triton_backend(triton: Availability, cuda: Availability) -> Availability:
    if not triton.usable:
        return triton
    problem = triton_support.machine_problem(torch.device("cuda" if cuda.usable else "cpu"))
    if problem is not None:
        return Availability(False, problem if cuda.usable else f"{cuda.detail}; {problem}")
    if triton_support.interpreting():
        return Availability(True, "interpreted, when asked for by name")
    return cuda


def info() -> Info:
    """Describe the build, the machine, and which backends can run here and why the others cannot.

    The reasons are those of the machine; `explain` adds those of a particular call.
    """
    isa, triton, cuda = _isa(), _triton(), _cuda()
    return Info(
        version=__version__,
        build=_extension.build_metadata(),
        python=platform.python_version(),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        processor=cpu_model(),
        cores=cores(),
        isa=isa,
        triton=triton,
        cuda=cuda,
        default_backend=requested_backend(),
        backends={
            "triton": _triton_backend(triton, cuda),
            "cuda": _cuda_backend(cuda),
            "cpu": isa,
            "reference": Availability(True, "plain PyTorch"),
            "sdpa": Availability(True, "PyTorch's attention, where it was measured faster or is asked for by name"),
        },
    )
