"""CvTs small enough that every peer runs them in seconds, and a roofline that takes no time."""

from __future__ import annotations

from functools import partial

import pytest

from fastvit_kernels.bench import roofline
from fastvit_kernels.bench.cases import Case
from fastvit_kernels.bench.suites import cvt

# transformers takes a stage's drop path rate from that stage's own blocks: the second stage needs two.
TINY = {
    "depths": (1, 2),
    "embed_dims": (16, 32),
    "num_heads": (1, 2),
    "patch_sizes": (7, 3),
    "patch_strides": (4, 2),
    "patch_paddings": (2, 1),
    "num_classes": 10,
}


def _first_stage(values: object) -> object:
    return values[:1] if isinstance(values, tuple) else values


@pytest.fixture(scope="session")
def tiny() -> Case:
    return cvt.case("cvt_13", batch=2, size=32, **TINY)


@pytest.fixture(scope="session")
def tinier() -> Case:
    """One block: compilers need seconds for each."""
    return cvt.case("cvt_13", batch=2, size=32, **{name: _first_stage(values) for name, values in TINY.items()})


@pytest.fixture(autouse=True)
def quick_roofline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "measure", partial(roofline.measure, 0.01))
