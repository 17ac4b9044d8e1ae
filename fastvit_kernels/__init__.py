"""Fused kernels for hybrid convolution/attention vision transformers."""

from fastvit_kernels import _extension

_extension.load()

from fastvit_kernels import ops  # noqa: E402
from fastvit_kernels.ops.dispatch import BackendError, use_backend

__all__ = ["BackendError", "ops", "use_backend"]
