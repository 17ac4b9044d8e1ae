"""Reference models, by name: `create_model("cvt_13")`."""

from . import cvt  # noqa: F401  (registers its models)
from .checkpoints import CheckpointError, CheckpointReport, load_checkpoint
from .registry import create_model, list_models, register

__all__ = ["CheckpointError", "CheckpointReport", "create_model", "list_models", "load_checkpoint", "register"]
