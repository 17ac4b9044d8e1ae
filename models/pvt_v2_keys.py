"""Names of the parameters of PVTv2 and MiT in timm and in transformers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

_TIMM = re.compile(r"patch_embed\.|stages\.\d+\.(downsample|norm)\.")
_TRANSFORMERS = re.compile(r"(pvt_v2|segformer|encoder)\.|stages\.\d+\.(patch_embeddings|layer_norm)\.")

# Where a parameter is, as three groups: stage, part of the stage, name inside it.
_PLACES = (
    # transformers: PVTv2; SegFormer's modules since version 5, and timm.
    re.compile(r"(?:pvt_v2\.encoder\.|encoder\.)layers\.(?P<stage>\d+)\.(?P<part>[a-z_]+)\.(?P<name>.+)"),
    re.compile(r"(?:segformer\.)?stages\.(?P<stage>\d+)\.(?P<part>[a-z_]+)\.(?P<name>.+)"),
    # transformers: SegFormer's files, and its modules before version 5.
    re.compile(r"(?:segformer\.)?encoder\.(?P<part>[a-z_]+)\.(?P<stage>\d+)\.(?P<name>.+)"),
)
_PARTS = {
    "downsample": "patch_embed",
    "patch_embedding": "patch_embed",
    "patch_embeddings": "patch_embed",
    "block": "block",
    "blocks": "block",
    "norm": "norm",
    "layer_norm": "norm",
}
_IN_BLOCK = {
    "norm1": "norm1",
    "layer_norm_1": "norm1",
    "layernorm_before": "norm1",
    "norm2": "norm2",
    "layer_norm_2": "norm2",
    "layernorm_after": "norm2",
    "attn.q": "attn.q",
    "attention.query": "attn.q",
    "attention.self.query": "attn.q",
    "attention.q_proj": "attn.q",
    "attn.kv": "attn.kv",
    "attention.key": "attn.k",
    "attention.self.key": "attn.k",
    "attention.k_proj": "attn.k",
    "attention.value": "attn.v",
    "attention.self.value": "attn.v",
    "attention.v_proj": "attn.v",
    "attn.proj": "attn.proj",
    "attention.proj": "attn.proj",
    "attention.output.dense": "attn.proj",
    "attention.o_proj": "attn.proj",
    "attn.sr": "attn.sr",
    "attention.spatial_reduction": "attn.sr",
    "attention.self.sr": "attn.sr",
    "attention.sequence_reduction.sequence_reduction": "attn.sr",
    "attn.norm": "attn.norm",
    "attention.layer_norm": "attn.norm",
    "attention.self.layer_norm": "attn.norm",
    "attention.sequence_reduction.layer_norm": "attn.norm",
    "mlp.fc1": "mlp.fc1",
    "mlp.dense1": "mlp.fc1",
    "mlp.dwconv": "mlp.dwconv.dwconv",
    "mlp.dwconv.dwconv": "mlp.dwconv.dwconv",
    "mlp.fc2": "mlp.fc2",
    "mlp.dense2": "mlp.fc2",
}


def source_of(names: Iterable[str]) -> str:
    """Whose names these are: `"timm"`, `"transformers"`, or `"official"` if nobody else's."""
    names = list(names)
    if any(map(_TIMM.match, names)):
        return "timm"
    return "transformers" if any(map(_TRANSFORMERS.match, names)) else "official"


def official_names(state_dict: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """Whose names these are, and the same tensors under the official names.

    Keys and values, apart in transformers, are joined. Names that nobody uses stay as they are.
    """
    source = source_of(state_dict)
    if source == "official":
        return source, dict(state_dict)
    return source, _join({_official_name(name): value for name, value in state_dict.items()})


def _official_name(name: str) -> str:
    if name.startswith("patch_embed."):
        return f"patch_embed1.{name.removeprefix('patch_embed.')}"
    if name.startswith("classifier."):
        return f"head.{name.removeprefix('classifier.')}"
    place = next(filter(None, (pattern.fullmatch(name) for pattern in _PLACES)), None)
    if place is None or place["part"] not in _PARTS:
        return name
    part, rest = _PARTS[place["part"]], place["name"]
    start = f"{part}{int(place['stage']) + 1}"
    if part == "patch_embed":
        return f"{start}.{rest.replace('layer_norm.', 'norm.')}"
    if part == "norm":
        return f"{start}.{rest}"
    block, _, inner = rest.partition(".")
    inner, _, parameter = inner.rpartition(".")
    return f"{start}.{block}.{_IN_BLOCK[inner]}.{parameter}" if inner in _IN_BLOCK else name


def _join(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keys and values in one, where both are there."""
    joined = {}
    for name, value in state_dict.items():
        if ".attn.v." in name and name.replace(".attn.v.", ".attn.k.") in state_dict:
            continue
        partner = name.replace(".attn.k.", ".attn.v.")
        if ".attn.k." in name and partner in state_dict:
            joined[name.replace(".attn.k.", ".attn.kv.")] = torch.cat([value, state_dict[partner]])
        else:
            joined[name] = value
    return joined
