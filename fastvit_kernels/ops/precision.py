"""The dtype of sums, statistics and softmax."""

from __future__ import annotations

import torch


def wide(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for everything narrower. (`torch.promote_types` would enter exported graphs as a node.)"""
    return torch.float64 if dtype is torch.float64 else torch.float32
