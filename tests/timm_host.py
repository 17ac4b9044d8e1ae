"""timm, which only tests need.

`make test` installs it and torchvision into a folder that Python does not search by itself. The torchvision of the
package index is built for CUDA: beside a CPU torch importing it fails, and so does importing transformers where it
finds it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import torch

FOLDER = Path(sys.prefix) / "hosts"
# torchvision describes the results of these two on import, whether its library defined them or not.
_OPERATORS = ("nms", "qnms")
_definitions = torch.library.Library("torchvision", "FRAGMENT")


def load_timm():
    """The package timm, imported."""
    if importlib.util.find_spec("timm") is None:
        sys.path.append(str(FOLDER))
    if "torchvision" not in sys.modules and not _loads():
        for name in _OPERATORS:
            if not hasattr(torch.ops.torchvision, name):
                _definitions.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("timm")


def _loads():
    """Whether torchvision's library fits this torch."""
    origin = importlib.util.find_spec("torchvision").origin
    try:
        torch.ops.load_library(Path(origin).with_name("_C.so"))
    except OSError:
        return False
    return True
