"""Names of CvT's parameters in transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

_STAGE = re.compile(r"(?:cvt\.)?encoder\.stages\.(\d+)\.(.+)")
_LAYER = re.compile(r"layers\.(\d+)\.(.+)\.(\w+)")
_EMBEDDING = re.compile(r"embedding\.convolution_embeddings\.(projection|normalization)\.(\w+)")

_IN_EMBEDDING = {"projection": "proj", "normalization": "norm"}
_IN_LAYER = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
for _long in ("query", "key", "value"):
    _short = _long[0]
    _map_step = f"attention.attention.convolution_projection_{_long}.convolution_projection"
    _IN_LAYER[f"{_map_step}.convolution"] = f"attn.conv_proj_{_short}.conv"
    _IN_LAYER[f"{_map_step}.normalization"] = f"attn.conv_proj_{_short}.bn"
    _IN_LAYER[f"attention.attention.projection_{_long}"] = f"attn.proj_{_short}"


def is_transformers(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of transformers' `CvtForImageClassification` or `CvtModel`."""
    return any(_STAGE.fullmatch(name) for name in state_dict)


def from_transformers(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the official names; names that transformers does not use stay as they are."""
    return {_official_name(name): value for name, value in state_dict.items()}


def _official_name(name: str) -> str:
    for old, new in (("layernorm.", "norm."), ("classifier.", "head.")):
        if name.startswith(old):
            return new + name.removeprefix(old)
    in_stage = _STAGE.fullmatch(name)
    if in_stage is None:
        return name
    stage, rest = in_stage.groups()
    if rest == "cls_token":
        return f"stage{stage}.cls_token"
    if embedding := _EMBEDDING.fullmatch(rest):
        return f"stage{stage}.patch_embed.{_IN_EMBEDDING[embedding[1]]}.{embedding[2]}"
    if (layer := _LAYER.fullmatch(rest)) and layer[2] in _IN_LAYER:
        return f"stage{stage}.blocks.{layer[1]}.{_IN_LAYER[layer[2]]}.{layer[3]}"
    return name
