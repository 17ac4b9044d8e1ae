"""The suites `hat_net_tiny` to `hat_net_large`: whole classifiers; and the stages of all published HAT-Nets."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastvit_kernels.bench import flops, plain_hat_net
from fastvit_kernels.bench.cases import Case
from fastvit_kernels.bench.suites import depthwise_mlp, pooled_projection, query_attention
from fastvit_kernels.bench.suites.models import IMAGE, accelerated, images, ours
from fastvit_kernels.models import create_model
from fastvit_kernels.models.hat_net import STEM_CHANNELS, HATNet

MODELS = ("hat_net_tiny", "hat_net_small", "hat_net_medium", "hat_net_large")
# HAT-Net-Medium differs from HAT-Net-Small in depths and depthwise filters, HAT-Net-Large in its last stage besides.
DIFFERENT = {"hat_net_tiny": (0, 1, 2, 3), "hat_net_small": (0, 1, 2, 3), "hat_net_large": (3,)}


class Stage(NamedTuple):
    """The shape that all blocks of a stage share.

    Attributes:
        window: side of the attention's windows; 1 for one level, all pixels.
        pool: side of the squares that make the keys of the second level.
        kernel: of the MLP's depthwise convolution.
    """

    name: str
    grid: tuple[int, int]
    channels: int
    head_dim: int
    window: int
    pool: int
    hidden: int
    kernel: int

    @property
    def num_heads(self) -> int:
        return self.channels // self.head_dim

    @property
    def queries(self) -> int:
        return flops.tokens(self.grid)

    @property
    def keys(self) -> int:
        """Of the second level."""
        return flops.tokens((self.grid[0] // self.pool, self.grid[1] // self.pool))

    def rows(self, batch: int) -> Tensor:
        return torch.randn(batch, self.queries, self.channels)


def cases(name: str, batch: int) -> list[Case]:
    """The one case of the suite `name`."""
    return [case(name, batch)]


def case(name: str, batch: int, **overrides: Any) -> Case:
    """A classifier on 224 x 224 images; `overrides` of the plain model's sizes."""
    sizes = {**plain_hat_net.VARIANTS[name], **overrides}
    return Case(
        suite=name,
        name=name,
        batch=batch,
        count=lambda: cost(sizes, batch),
        build=lambda: plain_hat_net.HATNet(**sizes),
        make_inputs=lambda: (images(batch, IMAGE),),
        fuse=lambda plain: accelerated(ours(name, plain, **_names(sizes))),
        attention=True,
        end_to_end=True,
    )


def stages() -> list[Stage]:
    """Every stage shape of the published models."""
    found = []
    for name, indices in DIFFERENT.items():
        with torch.device("meta"):
            model = create_model(name)
        assert isinstance(model, HATNet)
        for index in indices:
            block: Any = model.blocks[index][0]  # type: ignore[index]
            side = IMAGE // model.feature_info[index].reduction
            attention, depthwise = block.attn, block.conv.conv2[0]
            stage = Stage(
                name=f"{name}-stage{index + 1}",
                grid=(side, side),
                channels=model.feature_info[index].channels,
                head_dim=attention.head_dim,
                window=attention.grid_size,
                pool=attention.ds_ratio,
                hidden=depthwise.in_channels,
                kernel=depthwise.kernel_size[0],
            )
            found.append(stage)
    return found


def mlps() -> list[depthwise_mlp.Shape]:
    """Those of every stage, and HAT-Net-Medium's wider filters."""
    found = [
        depthwise_mlp.Shape(s.name, depthwise_mlp.HAT_NET, s.grid, s.channels, s.hidden, s.kernel) for s in stages()
    ]
    wide = [shape for shape in found if shape.name in ("hat_net_small-stage1", "hat_net_small-stage3")]
    return found + [shape._replace(name=shape.name.replace("small", "medium"), kernel=5) for shape in wide]


def attentions() -> list[query_attention.Shape]:
    """The second level of every stage that has two: every pixel to the pooled map."""
    return [
        query_attention.Shape(s.name, s.queries, s.keys, s.channels, s.num_heads, "group", add_query_input=True)
        for s in stages()
        if s.window > 1
    ]


def poolings() -> list[pooled_projection.Shape]:
    """The keys and values of every second level."""
    return [pooled_projection.Shape(s.name, s.channels, s.grid, s.pool) for s in stages() if s.window > 1]


def cost(sizes: dict[str, Any], batch: int) -> flops.Cost:
    """Of a classifier with these sizes of the plain model."""
    with torch.device("meta"):
        plain = plain_hat_net.HATNet(**sizes)
    blocks: list[Any] = [stage[0] for stage in plain.blocks]  # type: ignore[index]
    pools: list[Any] = [getattr(block.attn, "avg_pool", nn.AvgPool2d(1)).kernel_size for block in blocks]
    return flops.hat_net(
        batch,
        (IMAGE, IMAGE),
        dims=[block.attn.proj.in_channels for block in blocks],
        depths=[len(stage) for stage in plain.blocks],  # type: ignore[arg-type]
        hidden=[block.conv.conv2[0].in_channels for block in blocks],
        windows=[block.attn.grid_size for block in blocks],
        pools=pools,
        kernels=[block.conv.conv2[0].kernel_size[0] for block in blocks],
        in_channels=3,
        stem_channels=STEM_CHANNELS,
        num_classes=plain.classifier[1].out_features,  # type: ignore[arg-type]
    )


def _names(sizes: dict[str, Any]) -> dict[str, Any]:
    """The plain model's sizes under our names."""
    return {"kernel_sizes" if key == "kernels" else key: value for key, value in sizes.items()}
