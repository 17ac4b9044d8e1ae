"""The layers of Segformer as transformers 4 lays them out, for tests beside transformers 5: names and steps alone."""

from __future__ import annotations

import torch
from torch import nn

HOST = "transformers.models.segformer.modeling_segformer"


class SegformerEfficientSelfAttention(nn.Module):
    def __init__(self, hidden_size, num_attention_heads, sr_ratio, dropout):
        super().__init__()
        self.num_attention_heads = num_attention_heads
        self.attention_head_size = hidden_size // num_attention_heads
        self.query, self.key, self.value = (nn.Linear(hidden_size, hidden_size) for _ in range(3))
        self.dropout = nn.Dropout(dropout)
        self.sr_ratio = sr_ratio
        if sr_ratio > 1:
            self.sr = nn.Conv2d(hidden_size, hidden_size, sr_ratio, sr_ratio)
            self.layer_norm = nn.LayerNorm(hidden_size)

    def forward(self, hidden_states, height, width, output_attentions=False):
        rows = hidden_states
        if self.sr_ratio > 1:
            maps = self.sr(rows.transpose(1, 2).unflatten(2, (height, width)))
            rows = self.layer_norm(maps.flatten(2).transpose(1, 2))
        q, k, v = (
            layer(x).unflatten(2, (self.num_attention_heads, -1)).transpose(1, 2)
            for layer, x in ((self.query, hidden_states), (self.key, rows), (self.value, rows))
        )
        weights = self.dropout((q @ k.mT / self.attention_head_size**0.5).softmax(-1))
        context = (weights @ v).transpose(1, 2).flatten(2)
        return (context, weights) if output_attentions else (context,)


class SegformerSelfOutput(nn.Module):
    def __init__(self, hidden_size, dropout):
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states, input_tensor):
        return self.dropout(self.dense(hidden_states))


class SegformerAttention(nn.Module):
    def __init__(self, hidden_size, num_attention_heads, sr_ratio, attention_dropout, dropout):
        super().__init__()
        self.self = SegformerEfficientSelfAttention(hidden_size, num_attention_heads, sr_ratio, attention_dropout)
        self.output = SegformerSelfOutput(hidden_size, dropout)

    def forward(self, hidden_states, height, width, output_attentions=False):
        context, *weights = self.self(hidden_states, height, width, output_attentions)
        return (self.output(context, hidden_states), *weights)


class SegformerDWConv(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, hidden_states, height, width):
        maps = self.dwconv(hidden_states.transpose(1, 2).unflatten(2, (height, width)))
        return maps.flatten(2).transpose(1, 2)


class SegformerMixFFN(nn.Module):
    def __init__(self, hidden_size, mlp_ratio, dropout):
        super().__init__()
        self.dense1 = nn.Linear(hidden_size, mlp_ratio * hidden_size)
        self.dwconv = SegformerDWConv(mlp_ratio * hidden_size)
        self.intermediate_act_fn = nn.GELU()
        self.dense2 = nn.Linear(mlp_ratio * hidden_size, hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states, height, width):
        hidden = self.dwconv(self.dense1(hidden_states), height, width)
        return self.dropout(self.dense2(self.dropout(self.intermediate_act_fn(hidden))))


class SegformerDropPath(nn.Module):
    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, hidden_states):
        if not self.training:
            return hidden_states
        kept = torch.rand((len(hidden_states), 1, 1), dtype=hidden_states.dtype) < 1 - self.drop_prob
        return hidden_states / (1 - self.drop_prob) * kept


class SegformerLayer(nn.Module):
    def __init__(
        self, hidden_size, num_attention_heads, sr_ratio, mlp_ratio, drop_path, attention_dropout=0.0, dropout=0.0
    ):
        super().__init__()
        self.layer_norm_1 = nn.LayerNorm(hidden_size)
        self.attention = SegformerAttention(hidden_size, num_attention_heads, sr_ratio, attention_dropout, dropout)
        self.drop_path = SegformerDropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.layer_norm_2 = nn.LayerNorm(hidden_size)
        self.mlp = SegformerMixFFN(hidden_size, mlp_ratio, dropout)

    def forward(self, hidden_states, height, width, output_attentions=False):
        attended, *weights = self.attention(self.layer_norm_1(hidden_states), height, width, output_attentions)
        hidden_states = self.drop_path(attended) + hidden_states
        return (self.drop_path(self.mlp(self.layer_norm_2(hidden_states), height, width)) + hidden_states, *weights)


CLASSES = (
    SegformerEfficientSelfAttention,
    SegformerSelfOutput,
    SegformerAttention,
    SegformerDWConv,
    SegformerMixFFN,
    SegformerDropPath,
    SegformerLayer,
)
for _cls in CLASSES:
    _cls.__module__ = HOST


class Model(nn.Module):
    """Pixels in squares of 4, layers called as transformers 4 does, a mean, a linear."""

    def __init__(self, drop_path=0.0, **dropouts):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.block = nn.ModuleList(
            [SegformerLayer(16, 2, 3, 2, 0.0, **dropouts), SegformerLayer(16, 1, 1, 3, drop_path, **dropouts)]
        )
        self.head = nn.Linear(16, 7)

    def forward(self, images, output_attentions=False):
        maps = self.patches(images)
        grid, x, weights = maps.shape[2:], maps.flatten(2).transpose(1, 2), ()
        for layer in self.block:
            x, *found = layer(x, *grid, output_attentions)
            weights += tuple(found)
        y = self.head(x.mean(1))
        return (y, weights) if output_attentions else y
