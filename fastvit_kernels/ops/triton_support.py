"""When Triton can run a call, and how its kernels are launched. Triton itself is imported when first needed."""

from __future__ import annotations

import functools
import threading
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch

from fastvit_kernels.ops import tuning
from fastvit_kernels.ops.arguments import short
from fastvit_kernels.ops.operator import Tensors
from fastvit_kernels.ops.triton_configs import ALIGNMENT, ALL_REGISTERS, CONFIGS, Config

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST_NVIDIA = (8, 0)
INTERPRETER = "interpreter"
# The gradient of a LayerNorm has a row in registers as a whole.
_WIDEST_NORM = 8192
# Of a thread; and the warps of a program that may all have them.
_MOST_REGISTERS = 255
_UNALIGNED = "unaligned"
_WARPS_WITH_ALL_REGISTERS = 8
_WIDTH_WITH_ALL_REGISTERS = 64
_interpreter_lock = threading.Lock()


def reasons(tensors: Tensors, dtype: torch.dtype) -> list[str]:
    """Why the Triton kernels cannot run a call (empty: they can)."""
    first = tensors[0]
    assert first is not None
    problem = _machine_problem(first.device)
    found = [] if problem is None else [problem]
    unsupported = {t.dtype for t in tensors if t is not None and t.dtype not in _DTYPES}
    if dtype not in _DTYPES:
        unsupported.add(dtype)
    if unsupported:
        names = ", ".join(sorted(short(d) for d in unsupported))
        found.append(f"{names}: the Triton kernels take float32, bfloat16 and float16")
    return found


def norm_gradient_reasons(channels: int) -> list[str]:
    """Why the Triton kernels cannot give the gradients of a LayerNorm over so many channels (empty: they can)."""
    if channels <= _WIDEST_NORM:
        return []
    return [f"a LayerNorm over {channels} channels: its Triton gradients take up to {_WIDEST_NORM}"]


def _machine_problem(device: torch.device) -> str | None:
    return machine_problem(device)


# torch.compile calls this function instead of tracing into it. torch.compiler.assume_constant_result arranges the same,
# but would import all of Dynamo along with this module.
_machine_problem._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def machine_problem(device: torch.device) -> str | None:
    """Why Triton cannot run anything on `device`, or None."""
    try:
        interpreted = interpreting()
    except ModuleNotFoundError as error:
        return f"not installed: {error}"
    except ImportError as error:
        return f"cannot be imported: {error}"
    if interpreted:
        return None
    if device.type != "cuda":
        return f"tensors are on {device.type}, where it takes TRITON_INTERPRET=1 from before Triton is imported"
    if torch.version.hip is None:
        found = torch.cuda.get_device_capability(device)
        if found < _OLDEST_NVIDIA:
            return "the GPU's compute capability is {}.{}, expected {}.{} or newer".format(*found, *_OLDEST_NVIDIA)
    return None


@functools.cache
def interpreting() -> bool:
    """Whether kernels are interpreted: `TRITON_INTERPRET=1` was set when Triton was first imported."""
    import triton.language as tl
    from triton.runtime.jit import JITFunction

    return not isinstance(tl.zeros, JITFunction)


@functools.cache
def architecture(device: torch.device) -> str:
    """What the launch configurations are chosen by: `"sm_80"`, `"gfx942"`, ..., or `"interpreter"`."""
    if interpreting():
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


class Arithmetic(NamedTuple):
    """How matrices are multiplied, and where.

    Attributes:
        architecture: of the device.
        kind: `"half"` for bf16 and fp16; for fp32 `"tf32"` or `"ieee"`.
        dtype: of the operands.
    """

    architecture: str
    kind: str
    dtype: torch.dtype

    def constexpr(self) -> tuple[Any, bool, str]:
        """The argument `ARITHMETIC` of the kernels."""
        import triton.language as tl

        names = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
        upcast = self.architecture == INTERPRETER and self.dtype == torch.bfloat16
        return names[self.dtype], upcast, "tf32" if self.kind == "tf32" else "ieee"


def arithmetic(dtype: torch.dtype, device: torch.device) -> Arithmetic:
    """Products of `dtype` on `device`; fp32 goes through tf32 where PyTorch's own products on CUDA may."""
    arch = architecture(device)
    if dtype != torch.float32:
        return Arithmetic(arch, "half", dtype)
    allowed = arch.startswith("sm_") and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return Arithmetic(arch, "tf32" if allowed else "ieee", dtype)


def config(kernel: str, arithmetic: Arithmetic, width: int, *channels: int) -> Config:
    """The launch configuration of `kernel` for `width` columns made from rows of `channels`.

    One that was measured for these widths goes before those of `triton_configs`, which are for ranges of widths.
    """
    at = place(kernel, arithmetic, width, *channels)
    return tuning.current().config(*at) or usual(*at[:4])


def fits(kernel: str, arithmetic: Arithmetic, width: int, *channels: int) -> bool:
    """Whether there is such a configuration: some kernels are not for every width."""
    return _row(*place(kernel, arithmetic, width, *channels)[:4]) is not None


def place(kernel: str, arithmetic: Arithmetic, width: int, *channels: int) -> tuple[str, str, str, int, int]:
    """What a configuration is looked up by: the kernel, the architecture, the kind of product, both widths.

    Never by the batch or the resolution: no size makes Triton compile again.
    """
    depth = max(channels, default=0)
    if arithmetic.architecture == INTERPRETER:
        return kernel, INTERPRETER, "any", width, depth
    aligned = all(n % ALIGNMENT == 0 for n in (width, *channels))
    kind = arithmetic.kind if aligned else f"{_UNALIGNED} {arithmetic.kind}"
    return kernel, arithmetic.architecture, kind, width, depth


def usual(kernel: str, architecture: str, kind: str, width: int) -> Config:
    """What `triton_configs` has; architectures without rows of their own share the default ones."""
    found = _row(kernel, architecture, kind, width)
    assert found is not None, (kernel, kind, width)
    return found


def _row(kernel: str, architecture: str, kind: str, width: int) -> Config | None:
    table = CONFIGS[kernel]
    if kind.startswith(_UNALIGNED):
        # Tiles for these are small enough for every dtype; measured ones need not be.
        kind = _UNALIGNED
    rows = table.get((architecture, kind)) or table["default", kind]
    return next((row for widest, row in rows if width <= widest), None)


def all_registers(config: Config, kernel: str, arithmetic: Arithmetic, width: int, *channels: int) -> dict[str, int]:
    """Launch options with which threads get the registers that they need, where `ALL_REGISTERS` says so."""
    kind = place(kernel, arithmetic, width, *channels)[2]
    return _all_registers(arithmetic, config) if kind in ALL_REGISTERS.get(kernel, ()) else {}


def all_registers_of_windows(arithmetic: Arithmetic, config: Config, width: int) -> dict[str, int]:
    """The same for heads of this width in windows."""
    # For wider ones it makes worse code.
    wanted = arithmetic.dtype is torch.float32 and width <= _WIDTH_WITH_ALL_REGISTERS
    return _all_registers(arithmetic, config) if wanted else {}


def _all_registers(arithmetic: Arithmetic, config: Config) -> dict[str, int]:
    of_nvidia = arithmetic.architecture.startswith("sm_")
    fits = config.num_warps <= _WARPS_WITH_ALL_REGISTERS
    return {"maxnreg": _MOST_REGISTERS} if of_nvidia and fits else {}


def launch(kernel: Any, programs: int, device: torch.device, config: Config, *args: Any, **constexprs: Any) -> None:
    """Run that many programs of `kernel` on the tensors' own device, with the tiles, warps and stages of `config`."""
    options = {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": True,
    }
    with _guard(device):
        submit(kernel, (programs,), args, {**constexprs, **options})


def _guard(device: torch.device) -> AbstractContextManager[Any]:
    # Triton's interpreter keeps the running program in global variables: one at a time.
    return _interpreter_lock if interpreting() else torch.cuda.device(device)


def submit(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """The one place where a kernel is handed to Triton."""
    kernel[grid](*args, **options)
