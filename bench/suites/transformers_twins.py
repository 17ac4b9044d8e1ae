"""transformers' models with a plain model's weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastvit_kernels.models import create_model


class Logits(nn.Module):
    """A transformers model that returns its logits bare."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x).logits
        return logits


def pyramid_twin(name: str, plain: nn.Module, sizes: dict[str, Any]) -> nn.Module:
    """transformers' PvtV2 or Segformer; `sizes` (`depths`, `num_classes`) where they are not the published ones."""
    import transformers

    with torch.device("meta"):
        ours = create_model(name, **sizes)
    backbone: Any = getattr(ours, "backbone", ours)
    blocks = [backbone.get_submodule(f"block{index}") for index in range(1, backbone.num_stages + 1)]
    options = {
        "depths": [len(stage) for stage in blocks],
        "hidden_sizes": [info.channels for info in backbone.feature_info],
        "mlp_ratios": [stage[0].mlp.fc1.out_features // stage[0].mlp.fc1.in_features for stage in blocks],
        "num_labels": ours.num_classes,
    }
    kind: Any
    if name.startswith("pvt"):
        kind, config = transformers.PvtV2ForImageClassification, transformers.PvtV2Config(**options)
    else:
        config = transformers.SegformerConfig(**options)
        segmentation = name.startswith("segformer")
        kind = (
            transformers.SegformerForSemanticSegmentation
            if segmentation
            else transformers.SegformerForImageClassification
        )
    twin = kind(config)
    _copy(plain.state_dict(), twin, ours)
    return Logits(twin)


def _copy(weights: dict[str, Tensor], twin: nn.Module, ours: Any) -> None:
    """Fill `twin` with weights of the official names, which our model knows how to derive from transformers'."""
    tensors = list(twin.state_dict().items())
    # Where a tensor went is seen from a number in its place; keys and values were joined in this order.
    labels = {name: torch.tensor([index]) for index, (name, _) in enumerate(tensors)}
    with torch.no_grad():
        for official, indices in ours.convert_checkpoint(labels).state_dict.items():
            parts = weights[official].chunk(len(indices)) if len(indices) > 1 else [weights[official]]
            for index, part in zip(indices.tolist(), parts, strict=True):
                tensors[index][1].copy_(part)
