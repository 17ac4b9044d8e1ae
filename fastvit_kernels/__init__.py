"""Fused kernels for hybrid convolution/attention vision transformers."""

from fastvit_kernels import _extension, ops
from fastvit_kernels._version import __version__
from fastvit_kernels.accelerate import Report, accelerate, restore
from fastvit_kernels.environment import Info, info
from fastvit_kernels.explain import Explanation, explain
from fastvit_kernels.ops.dispatch import BackendError, use_backend, use_recompute, use_taping

__all__ = [
    "BackendError",
    "Explanation",
    "Info",
    "Report",
    "__version__",
    "accelerate",
    "explain",
    "info",
    "ops",
    "restore",
    "use_backend",
    "use_recompute",
    "use_taping",
]

_extension.load()
