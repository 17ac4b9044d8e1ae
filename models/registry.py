"""Models by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from torch import nn

from fastvit_kernels.ops.dispatch import BACKENDS

Builder = TypeVar("Builder", bound=Callable[..., nn.Module])
_builders: dict[str, Callable[..., nn.Module]] = {}


def register(builder: Builder) -> Builder:
    """Make a function that builds a model available under its own name.

    Raises:
        ValueError: the name is taken.
    """
    name = builder.__name__
    if name in _builders:
        raise ValueError(f"register: a model named {name!r} exists already")
    _builders[name] = builder
    return builder


def list_models(pattern: str = "*") -> list[str]:
    """Names of the models that match a shell pattern such as `"cvt*"`, sorted."""
    return sorted(name for name in _builders if fnmatchcase(name, pattern))


_IMAGE_SIZES = {"cmt_ti": 160, "cmt_xs": 192, "cmt_b": 256, "cvt_w24": 384, "*_cifar_*": 32, "segformer_*": 512}


def image_size(name: str) -> int:
    """Side of the square images, in pixels, that a model was published with; 224 for names that nobody registered."""
    return next((size for pattern, size in _IMAGE_SIZES.items() if fnmatchcase(name, pattern)), 224)


def create_model(
    name: str,
    num_classes: int = 1000,
    *,
    features_only: bool = False,
    backend: str | None = None,
    **overrides: Any,
) -> nn.Module:
    """Build a model with freshly initialised weights.

    Args:
        name: one of `list_models()`.
        num_classes: outputs of the classifier; 0 for none: the model then returns its pooled features.
        features_only: return the feature map of every stage instead of logits.
        backend: runs the model's fused operators on one backend; None for the usual choice.
        **overrides: further arguments of the model's class, in place of the variant's own.

    Raises:
        ValueError: an unknown name or backend.
        TypeError: an override that the model's class does not have.
    """
    if name not in _builders:
        similar = difflib.get_close_matches(str(name), _builders, n=3, cutoff=0.4)
        if similar:
            raise ValueError(f"name: unknown model {name!r}; did you mean {' or '.join(similar)}? See list_models()")
        raise ValueError(f"name: unknown model {name!r}, expected one of {', '.join(list_models())}")
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend: unknown backend {backend!r}, expected one of {', '.join(BACKENDS)}")
    return _builders[name](num_classes=num_classes, features_only=features_only, backend=backend, **overrides)
