"""transformers' CvT with official arithmetic, images, and the sizes of small models."""

from __future__ import annotations

import warnings

import plain_cvt
import torch

from fastvit_kernels.models import load_checkpoint

DEPTHS = {"cvt_13": (1, 2, 10), "cvt_21": (1, 4, 16)}
SMALL = {"depths": (1, 1, 1), "embed_dims": (16, 32, 48), "num_heads": (1, 2, 3)}


def transformers_cvt(activation=plain_cvt.QuickGELU, **config):
    """transformers' model from a config alone, fp64, without drop path."""
    from transformers import CvtConfig, CvtForImageClassification

    config = {"num_labels": 10, "drop_path_rate": [0.0, 0.0, 0.0], **config}
    model = CvtForImageClassification(CvtConfig(**config)).double()
    for module in model.modules():
        if type(module).__name__ == "CvtIntermediate":
            module.activation = activation()
    return plain_cvt.randomize(model)


def load_quietly(model, state_dict, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="transformers runs CvT with the exact GELU")
        return load_checkpoint(model, state_dict, **options)


def image(batch=2, h=64, w=48, channels=3, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, h, w, generator=generator, dtype=torch.float64).to(dtype)
