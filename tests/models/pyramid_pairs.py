"""The same PVTv2, MiT and SegFormer in this library and in timm or transformers, in fp64."""

from __future__ import annotations

import plain_cvt
import torch
from parity import Pair
from timm_host import load_timm

from fastvit_kernels.models import create_model, load_checkpoint

# The channels and heads of a stage, but one block in most: where variants differ in depth only.
SHALLOW = (1, 2, 1, 1)
SMALL = {"embed_dims": (16, 24, 32, 40), "num_heads": (1, 2, 4, 5), "depths": SHALLOW}


def beside_timm(name, depths=None, **options):
    """Our model of this name and timm's; `options` go to both."""
    options |= {} if depths is None else {"depths": depths}
    theirs = plain_cvt.randomize(load_timm().create_model(name, num_classes=10, **options))
    return _pair(name, theirs, **options)


def beside_transformers(name, kind, depths=SHALLOW, eps="transformers", **config):
    """Our model of this name and transformers' `kind` of the same sizes; `config` goes to theirs."""
    import transformers

    family = "PvtV2" if kind.startswith("PvtV2") else "Segformer"
    sizes = {"depths": list(depths), "num_labels": 10, "drop_path_rate": 0.0, "classifier_dropout_prob": 0.0}
    theirs = getattr(transformers, kind)(getattr(transformers, f"{family}Config")(**sizes, **config))
    options = {"decoder_drop_rate": 0.0} if name.startswith("segformer") else {}
    return _pair(name, plain_cvt.randomize(theirs), depths=depths, drop_path_rate=0.0, eps=eps, **options)


def _pair(name, theirs, **options):
    with torch.device("meta"):
        ours = create_model(name, 10, **options)
    ours = ours.double().to_empty(device="cpu")
    load_checkpoint(ours, theirs.double().state_dict())
    return Pair(ours.eval(), theirs.eval())


def small(num_classes=10, name="pvt_v2_b0", **overrides):
    """A small PVTv2 with weights large enough for every layer to matter; arguments go to `create_model`."""
    torch.manual_seed(0)
    return plain_cvt.randomize(create_model(name, num_classes, **{**SMALL, **overrides}))


def small_segformer(num_classes=10, **overrides):
    return small(
        num_classes, "segformer_b0", **{"decoder_dim": 24, "decoder_drop_rate": 0.0, "drop_path_rate": 0.0, **overrides}
    )
