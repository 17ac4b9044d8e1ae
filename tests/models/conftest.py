"""Models of this library beside those they are compared with."""

from __future__ import annotations

from typing import NamedTuple

import plain_cvt
import pytest
import torch
from cvt_pairs import DEPTHS, SMALL, load_quietly, transformers_cvt
from torch import nn

from fastvit_kernels.models import create_model


class Pair(NamedTuple):
    ours: nn.Module
    theirs: nn.Module


@pytest.fixture(scope="session")
def pairs():
    """`pairs(name)`: the same weights in both implementations, in fp64; shared by all tests, so put changes back."""
    made = {}

    def pair(name):
        if name not in made:
            theirs = transformers_cvt(depth=list(DEPTHS[name]))
            ours = create_model(name, 10, drop_path_rate=0.0).double()
            load_quietly(ours, theirs.state_dict())
            made[name] = Pair(ours, theirs)
        return Pair(*(model.eval() for model in made[name]))

    return pair


@pytest.fixture
def small():
    """Makes small CvTs with weights large enough for every layer to matter; arguments go to `create_model`."""

    def make(num_classes=10, **overrides):
        torch.manual_seed(0)
        return plain_cvt.randomize(create_model("cvt_13", num_classes, **{**SMALL, **overrides}))

    return make


@pytest.fixture
def small_plain():
    return plain_cvt.randomize(plain_cvt.CvT(SMALL["depths"], SMALL["embed_dims"], SMALL["num_heads"], 10))
