"""Which classes of other libraries can be accelerated: one table, and the look-up."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from fastvit_kernels.integrations.adapter import Adapter

# Integrations by the module and the class of their library, which nobody imports but its own instances: a row is used
# only when an instance of its class turns up.
_HOSTS = {
    "timm.models.efficientformer_v2": {"ConvMlpWithNorm": "timm_efficientformer_v2"},
    "timm.models.pvt_v2": {"Block": "timm_pvt_v2", "OverlapPatchEmbed": "timm_pvt_v2_embeddings"},
    "timm.models.swin_transformer": {"SwinTransformerBlock": "timm_swin"},
    "timm.models.twins": {
        "Block": "timm_twins",
        "GlobalSubSampleAttn": "timm_twins_reduced",
        "LocallyGroupedAttn": "timm_twins_local",
        "PatchEmbed": "timm_twins_embeddings",
        "PosConv": "timm_twins_positions",
    },
    "transformers.models.cvt.modeling_cvt": {
        "CvtConvEmbeddings": "transformers_cvt_embeddings",
        "CvtLayer": "transformers_cvt",
    },
    "transformers.models.pvt_v2.modeling_pvt_v2": {
        "PvtV2BlockLayer": "transformers_pvt_v2",
        "PvtV2OverlapPatchEmbeddings": "transformers_pvt_v2_embeddings",
    },
    "transformers.models.segformer.modeling_segformer": {
        "SegformerLayer": "transformers_segformer",
        "SegformerOverlapPatchEmbeddings": "transformers_segformer_embeddings",
    },
}

# Before, timm's modules take and hold something else under the same names.
_OLDEST_TIMM = (0, 9)

KNOWN = tuple(f"{module}.{cls}" for module, classes in _HOSTS.items() for cls in classes)


def adapter_of(cls: type) -> Adapter | None:
    """The adapter whose host or accelerated class `cls` is, exactly; None for any other class."""
    if cls.__module__.startswith(f"{__name__}."):
        integration = cls.__module__
    elif (name := _HOSTS.get(cls.__module__, {}).get(cls.__qualname__)) is not None and not _is_too_old(cls):
        integration = f"{__name__}.{name}"
    else:
        return None
    adapter: Adapter = importlib.import_module(integration).ADAPTER
    return adapter if cls in (adapter.host, adapter.fused) else None


class Found(NamedTuple):
    """A module by its path, with the adapter of its class or, without one, the known class that its own derives from.

    A part of a known module has neither: see `Adapter.part`.
    """

    path: str
    module: nn.Module
    adapter: Adapter | None = None
    base: type | None = None


def find(model: nn.Module) -> Iterator[Found]:
    """Every module of `model`."""
    inside: set[int] = set()
    for path, module in model.named_modules():
        adapter = adapter_of(type(module))
        base = known_base(type(module)) if adapter is None else None
        known = adapter if base is None else adapter_of(base)
        if known is None or (known.part and id(module) in inside and type(module) is not known.fused):
            yield Found(path, module)
            continue
        inside.update(map(id, module.modules()))
        yield Found(path, module, adapter, base)


def _is_too_old(cls: type) -> bool:
    if not cls.__module__.startswith("timm."):
        return False
    major, minor, *_ = sys.modules["timm"].__version__.split(".")
    return (int(major), int(minor)) < _OLDEST_TIMM


def known_base(cls: type) -> type | None:
    """The class with an adapter that `cls` derives from without being it, or None."""
    return next((base for base in cls.__mro__[1:] if adapter_of(base) is not None), None)
