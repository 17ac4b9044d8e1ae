"""Arithmetic and traffic of an operator call or a model, from its shapes alone.

Counted: the multiply-adds of convolutions, linears and the two attention products, as is usual for published figures.
Not counted: normalisation, activation, softmax, residual additions. Traffic is the least a perfect fusion moves: inputs
and parameters read once, outputs written once, everything in the compute dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

Grid = tuple[int, int]


@dataclass(frozen=True)
class Cost:
    """What one call computes and the least it moves.

    Attributes:
        macs: multiply-adds.
        weights: parameters and running statistics read.
        activations: values of the inputs and outputs.
    """

    macs: int
    weights: int
    activations: int

    @property
    def flops(self) -> int:
        return 2 * self.macs

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.macs + other.macs, self.weights + other.weights, self.activations + other.activations)

    def nbytes(self, itemsize: int) -> int:
        return (self.weights + self.activations) * itemsize


def macs(call: Callable[..., object], *inputs: Tensor) -> int:
    """Multiply-adds of plain PyTorch called with these inputs; on the meta device it computes nothing."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call(*inputs)
    return counter.get_total_flops() // 2


def counted(module: nn.Module, *inputs: Tensor) -> Cost:
    """Of a module in plain PyTorch that is called with these inputs, all of them on the meta device."""
    with torch.no_grad():
        found = module(*inputs)
    outputs = (found,) if isinstance(found, Tensor) else tuple(found)
    weights = sum(t.numel() for t in module.state_dict().values() if t.is_floating_point())
    return Cost(macs(module, *inputs), weights, sum(t.numel() for t in (*inputs, *outputs)))


def output_grid(grid: Grid, kernel: int, stride: int, padding: int) -> Grid:
    """Height and width of a convolution's output."""
    height, width = ((size + 2 * padding - kernel) // stride + 1 for size in grid)
    return height, width


def tokens(grid: Grid, num_prefix_tokens: int = 0) -> int:
    return num_prefix_tokens + grid[0] * grid[1]


def conv_projection(
    batch: int,
    channels: int,
    grid: Grid,
    *,
    num_prefix_tokens: int = 0,
    kernel: int = 3,
    strides: Sequence[int] = (1, 2, 2),
) -> Cost:
    """LayerNorm, then depthwise convolution, batch normalisation and a C x C linear for each of q, k and v."""
    macs, weights = 0, 2 * channels
    rows = [batch * tokens(grid, num_prefix_tokens)]
    for stride in strides:
        out = output_grid(grid, kernel, stride, kernel // 2)
        rows.append(batch * tokens(out, num_prefix_tokens))
        macs += batch * tokens(out) * channels * kernel**2 + rows[-1] * channels**2
        weights += channels * (kernel**2 + 4) + channels**2 + channels
    return Cost(macs, weights, sum(rows) * channels)


def global_attention(batch: int, queries: int, keys: int, channels: int) -> Cost:
    """Both products of softmax attention, the C x C output projection, the residual; heads do not change the count."""
    macs = batch * (2 * queries * keys * channels + queries * channels**2)
    queries_residual_output, keys_values = 3 * queries, 2 * keys
    return Cost(macs, channels**2 + channels, batch * channels * (queries_residual_output + keys_values))


def local_attention(
    batch: int,
    grid: Grid,
    channels: int,
    window: int,
    *,
    projection: bool = False,
    table: int = 0,
    statistics: bool = False,
) -> Cost:
    """A norm, linear of q, k and v, softmax attention in whole windows, the C x C output projection, the residual.

    The residual is the input, already read. `table`: heads of a bias that is added to the scores of every window.
    `statistics`: mean and variance of each sample are returned as well.
    """
    pixels = batch * tokens(grid)
    macs = pixels * (3 * channels**2 + 2 * window**2 * channels)
    weights = 2 * channels + 3 * (channels**2 + channels) + table * window**4
    if projection:
        macs += pixels * channels**2
        weights += channels**2 + channels
    return Cost(macs, weights, 2 * pixels * channels + 2 * batch * statistics)


def query_attention(batch: int, queries: int, keys: int, channels: int) -> Cost:
    """Global attention behind a GroupNorm and a C x C linear of the queries, which are added to its output."""
    linear = Cost(batch * queries * channels**2, 2 * channels + channels**2 + channels, 0)
    return global_attention(batch, queries, keys, channels) + linear


def pointwise_mlp(rows: int, channels: int, hidden: int) -> Cost:
    """LayerNorm, linear, activation, linear; the residual is the input, already read."""
    weights = 2 * channels * hidden + hidden + channels + 2 * channels
    return Cost(2 * rows * channels * hidden, weights, 2 * rows * channels)


def convolution(
    batch: int, in_channels: int, channels: int, grid: Grid, *, kernel: int, stride: int, padding: int
) -> Cost:
    """A strided convolution with bias."""
    filters = channels * in_channels * kernel**2
    out = tokens(output_grid(grid, kernel, stride, padding))
    activations = batch * (tokens(grid) * in_channels + out * channels)
    return Cost(batch * out * filters, filters + channels, activations)


def patch_embedding(
    batch: int, in_channels: int, channels: int, grid: Grid, *, kernel: int, stride: int, padding: int
) -> Cost:
    """A strided convolution with bias and the norm behind it."""
    conv = convolution(batch, in_channels, channels, grid, kernel=kernel, stride=stride, padding=padding)
    return conv + Cost(0, 2 * channels, 0)


def classifier(batch: int, channels: int, num_classes: int) -> Cost:
    """LayerNorm and linear on one row per image."""
    weights = 2 * channels + channels * num_classes + num_classes
    return Cost(batch * channels * num_classes, weights, batch * (channels + num_classes))


def cvt(
    batch: int,
    image: Grid,
    *,
    dims: Sequence[int],
    depths: Sequence[int],
    hidden: Sequence[int],
    patch_sizes: Sequence[int],
    patch_strides: Sequence[int],
    patch_paddings: Sequence[int],
    prefix_tokens: Sequence[int],
    in_channels: int,
    num_classes: int,
) -> Cost:
    """A CvT classifier; the arguments' entries are per stage. Its activations are the image and the logits alone."""
    parts = []
    grid, channels = image, in_channels
    for stage, (width, depth, prefix) in enumerate(zip(dims, depths, prefix_tokens, strict=True)):
        kernel, stride, padding = patch_sizes[stage], patch_strides[stage], patch_paddings[stage]
        parts.append(patch_embedding(batch, channels, width, grid, kernel=kernel, stride=stride, padding=padding))
        grid = output_grid(grid, kernel, stride, padding)
        rows, keys = tokens(grid, prefix), tokens(output_grid(grid, 3, 2, 1), prefix)
        block = (
            conv_projection(batch, width, grid, num_prefix_tokens=prefix),
            global_attention(batch, rows, keys, width),
            pointwise_mlp(batch * rows, width, hidden[stage]),
        )
        parts += [*block] * depth
        parts.append(Cost(0, prefix * width, 0))
        channels = width
    parts.append(classifier(batch, channels, num_classes))
    activations = batch * (in_channels * image[0] * image[1] + num_classes)
    return Cost(sum(part.macs for part in parts), sum(part.weights for part in parts), activations)


def hierarchical_attention(batch: int, grid: Grid, channels: int, window: int, pool: int) -> Cost:
    """Both levels of HAT-Net's attention on a map of whole windows; a window of 1 stands for one level, all pixels."""
    if window == 1:
        # Every pixel of a square map attends to as many as a window of its side has.
        return local_attention(batch, grid, channels, math.isqrt(tokens(grid)), projection=True)
    keys = tokens((grid[0] // pool, grid[1] // pool))
    pooled = Cost(batch * keys * 2 * channels**2, 2 * channels + 2 * (channels**2 + channels), 0)
    levels = local_attention(batch, grid, channels, window) + query_attention(batch, tokens(grid), keys, channels)
    return levels + pooled


def hat_mlp(batch: int, grid: Grid, channels: int, hidden: int, kernel: int) -> Cost:
    """GroupNorm, linear, depthwise convolution, linear, all without bias, GroupNorm; the residual is the input."""
    pixels = batch * tokens(grid)
    weights = 2 * channels * hidden + hidden * kernel**2
    return Cost(pixels * weights, weights + 4 * channels, 2 * pixels * channels)


def hat_net(
    batch: int,
    image: Grid,
    *,
    dims: Sequence[int],
    depths: Sequence[int],
    hidden: Sequence[int],
    windows: Sequence[int],
    pools: Sequence[int],
    kernels: Sequence[int],
    in_channels: int,
    stem_channels: int,
    num_classes: int,
) -> Cost:
    """A HAT-Net classifier on a square image of whole windows; the arguments' entries are per stage.

    Its activations are the image and the logits alone. The norms that its checkpoints hold in vain are not counted.
    """
    grid = output_grid(image, 3, 2, 1)
    parts = [patch_embedding(batch, in_channels, stem_channels, image, kernel=3, stride=2, padding=1)]
    channels = stem_channels
    for stage, (width, depth) in enumerate(zip(dims, depths, strict=True)):
        down = convolution if stage == 0 else patch_embedding
        parts.append(down(batch, channels, width, grid, kernel=3, stride=2, padding=1))
        grid, channels = output_grid(grid, 3, 2, 1), width
        attention = hierarchical_attention(batch, grid, width, windows[stage], pools[stage])
        parts += [attention, hat_mlp(batch, grid, width, hidden[stage], kernels[stage])] * depth
    parts.append(Cost(batch * channels * num_classes, channels * num_classes + num_classes, 0))
    activations = batch * (in_channels * tokens(image) + num_classes)
    return Cost(sum(part.macs for part in parts), sum(part.weights for part in parts), activations)
