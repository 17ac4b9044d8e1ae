"""Fused kernels for hybrid convolution/attention vision transformers."""

from fastvit_kernels import _extension, ops
from fastvit_kernels.environment import Info, info
from fastvit_kernels.ops.dispatch import BackendError, use_backend

__all__ = ["BackendError", "Info", "info", "ops", "use_backend"]

_extension.load()
