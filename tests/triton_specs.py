"""The specs of all Triton kernels, and what compiling them gives."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import Any

import torch

from fastvit_kernels import ops
from fastvit_kernels.ops.triton_specs import Empty, Spec
from fastvit_kernels.testing.triton_aot import Compiled, compile_launches

# What is compiled for which architectures: fp16 and bf16 take different numbers of registers.
TARGETS = [
    *((dtype, architecture) for architecture in ("sm_80", "sm_90") for dtype in ("float32", "bfloat16", "float16")),
    ("bfloat16", "gfx942"),
]


def modules() -> list[ModuleType]:
    """Those of the operators that import Triton with their kernels."""
    import triton

    names = [m.name for m in pkgutil.walk_packages(ops.__path__, "fastvit_kernels.ops.")]
    return [module for module in map(importlib.import_module, names) if getattr(module, "triton", None) is triton]


def specs_of(module: ModuleType) -> tuple[Spec, ...]:
    found: tuple[Spec, ...] = getattr(module, "SPECS", ())
    return found


def is_kernel(candidate: Any) -> bool:
    """Whether something is a function that Triton compiles, launched or called by one that is."""
    from triton.runtime.jit import KernelInterface

    return isinstance(candidate, KernelInterface)


WITH_SPECS = [module.__name__ for module in modules() if specs_of(module)]
WITH_PRODUCTS = {spec.kernel.__name__ for module in modules() for spec in specs_of(module) if spec.products}


def compile_specs(module: str, dtype: str, architecture: str) -> list[Compiled]:
    """One kernel for each spec, in order."""
    empty = Empty(getattr(torch, dtype))
    return [_compile(spec, empty, architecture) for spec in specs_of(importlib.import_module(module))]


def _compile(spec: Spec, empty: Empty, architecture: str) -> Compiled:
    name = spec.kernel.__name__
    compiled = compile_launches(lambda: spec.launch(empty), architecture, lambda launch: launch.name == name)
    assert compiled, f"the spec of {name} does not launch it"
    return compiled[0]
