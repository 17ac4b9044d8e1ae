"""Reference models, by name: `create_model("cvt_13")`."""

from fastvit_kernels.models import cmt, cvt, dhvt, hat_net, pvt_v2, segformer  # noqa: F401  (they register their models)
from fastvit_kernels.models.checkpoints import CheckpointError, CheckpointReport, load_checkpoint
from fastvit_kernels.models.registry import create_model, image_size, list_models, register

__all__ = [
    "CheckpointError",
    "CheckpointReport",
    "create_model",
    "image_size",
    "list_models",
    "load_checkpoint",
    "register",
]
