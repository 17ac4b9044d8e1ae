"""Arithmetic and traffic of an operator call or a model, from its shapes alone.

Counted: the multiply-adds of convolutions, linears and the two attention products, as is usual for published figures.
Not counted: normalisation, activation, softmax, residual additions. Traffic is the least a perfect fusion moves: inputs
and parameters read once, outputs written once, everything in the compute dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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

    def nbytes(self, itemsize: int) -> int:
        return (self.weights + self.activations) * itemsize


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


def pointwise_mlp(rows: int, channels: int, hidden: int) -> Cost:
    """LayerNorm, linear, activation, linear; the residual is the input, already read."""
    weights = 2 * channels * hidden + hidden + channels + 2 * channels
    return Cost(2 * rows * channels * hidden, weights, 2 * rows * channels)


def patch_embedding(
    batch: int, in_channels: int, channels: int, grid: Grid, *, kernel: int, stride: int, padding: int
) -> Cost:
    """A strided convolution with bias and the LayerNorm behind it."""
    filters = channels * in_channels * kernel**2
    out = tokens(output_grid(grid, kernel, stride, padding))
    activations = batch * (tokens(grid) * in_channels + out * channels)
    return Cost(batch * out * filters, filters + 3 * channels, activations)


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
