"""CvT's attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastvit_kernels.nn import checks, fused
from fastvit_kernels.ops.packing import PackedWeights

METHODS = ("dw_bn", "avg", "linear")


class ConvProjectionAttention(nn.Module):
    """Attention whose q, k and v come from depthwise convolutions of the token map: CvT's `Attention`, fused.

    Constructor arguments, parameter names and initialisation are those of the official module, so weights load both
    ways with `strict=True`. What the fused operators cannot stand in for (`fusion_obstacles` lists it: an active
    attention dropout, hooks on a submodule, a foreign batch norm, `SyncBatchNorm` among several processes, ...) runs by
    calling the submodules.

    Args:
        dim_in: channels of the input.
        dim_out: channels of q, k, v and the output.
        num_heads: heads; divides `dim_out`.
        qkv_bias: whether the linears of q, k and v have a bias.
        attn_drop: dropout rate of the attention probabilities.
        proj_drop: dropout rate behind the output projection.
        method: `"dw_bn"`: depthwise convolution and batch norm; `"avg"`: average pooling for k and v, nothing for q;
            `"linear"`: nothing, ordinary attention.
        kernel_size: of convolution or pooling.
        stride_kv, stride_q, padding_kv, padding_q: of convolution or pooling.
        with_cls_token: the first row is a class token, which skips convolution, batch norm and pooling.

    Attributes:
        backend: runs this module's operators on one backend; None for the usual choice.

    Raises:
        TypeError, ValueError: an unknown `method`, a `kernel_size` below 1, or `num_heads` does not divide `dim_out`.

    Source: Wu et al., "CvT: Introducing Convolutions to Vision Transformers", section 3.2. The softmax scale is
    `dim_out ** -0.5`, as in the official code, whatever the number of heads.
    """

    backend: str | None = None

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        num_heads: int,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        method: str = "dw_bn",
        kernel_size: int = 3,
        stride_kv: int = 1,
        stride_q: int = 1,
        padding_kv: int = 1,
        padding_q: int = 1,
        with_cls_token: bool = True,
    ) -> None:
        super().__init__()
        if method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
        num_heads = checks.as_integer("num_heads", num_heads)
        if num_heads < 1 or dim_out % num_heads:
            raise ValueError(f"num_heads: {num_heads} does not divide dim_out = {dim_out}")
        kernel_size = checks.as_integer("kernel_size", kernel_size)
        if kernel_size < 1:
            raise ValueError(f"kernel_size: expected at least 1, got {kernel_size}")
        self.method = method
        self.num_heads = num_heads
        self.scale = dim_out**-0.5
        self.with_cls_token = with_cls_token
        # Created in the order of the official module: the same seed gives the same weights.
        method_q = "linear" if method == "avg" else method
        self.register_module("conv_proj_q", _map_step(method_q, dim_in, kernel_size, stride_q, padding_q))
        self.register_module("conv_proj_k", _map_step(method, dim_in, kernel_size, stride_kv, padding_kv))
        self.register_module("conv_proj_v", _map_step(method, dim_in, kernel_size, stride_kv, padding_kv))
        self.proj_q = nn.Linear(dim_in, dim_out, bias=qkv_bias)
        self.proj_k = nn.Linear(dim_in, dim_out, bias=qkv_bias)
        self.proj_v = nn.Linear(dim_in, dim_out, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim_out, dim_out)
        self.proj_drop = nn.Dropout(proj_drop)
        self._packed: dict[str, PackedWeights] | None = None

    def forward(
        self, x: Tensor, h: int, w: int, *, norm: nn.LayerNorm | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """`residual + attention(norm(x))`; without the optional arguments the official module's forward.

        Args:
            x: `[B, N, dim_in]` tokens of an `h x w` map, row-major, behind the class token if there is one.
            h, w: height and width of the map.
            norm: LayerNorm to apply to x first, fused where possible.
            residual: `[B, N, dim_out]`, added to the result; dropout is applied before.

        Returns:
            `[B, N_q, dim_out]`; `N_q = N` at `stride_q = 1`.

        Raises:
            TypeError, ValueError: naming the argument, what came and what was expected.
        """
        q, k, v = self._project(x, h, w, norm)
        drops_nothing = fused.drops_nothing(self.proj_drop)
        if fused.global_attention_obstacles(self.proj, self.attn_drop):
            out = self.proj(self._attend(q, k, v))
        else:
            out = fused.global_attention(
                q,
                k,
                v,
                self.proj,
                num_heads=self.num_heads,
                scale=self.scale,
                residual=residual if drops_nothing else None,
                packed=self._packed,
                backend=self.backend,
            )
            if drops_nothing:
                return out
        out = self.proj_drop(out)
        return checks.add_residual(residual, out)

    def fusion_obstacles(self, norm: nn.LayerNorm | None = None) -> list[str]:
        """Every reason why `forward`, with this `norm`, would call submodules now instead of the fused operators."""
        _, projection = self._branches(norm)
        return projection + fused.global_attention_obstacles(self.proj, self.attn_drop)

    def prepare_inference(self, enabled: bool) -> None:
        """Keep the weights in the layout of the CPU kernels between calls (`enabled`), or stop doing so."""
        self._packed = {name: PackedWeights() for name in ("conv_projection", "global_attention")} if enabled else None

    def _steps(self) -> list[tuple[str, nn.Module | None, nn.Linear]]:
        # From the dictionary: attribute access to submodules is what costs most here, and this runs at every call.
        modules: dict[str, Any] = self._modules
        return [(name, modules["conv_proj_" + name], modules["proj_" + name]) for name in ("q", "k", "v")]

    def _branches(self, norm: nn.LayerNorm | None) -> tuple[list[fused.Branch], list[str]]:
        """The submodules of q, k and v for the fused operator, and the obstacles to it."""
        branches, reasons = [], []
        for name, step, linear in self._steps():
            if type(step) is not DepthwiseConvNorm:
                reasons.append(f"conv_proj_{name} is {step}, expected a depthwise convolution and a batch norm")
                continue
            if fused.has_hooks(step):
                reasons.append(f"conv_proj_{name} has hooks")
            inner: dict[str, Any] = step._modules
            branches.append(fused.Branch(inner["conv"], inner["bn"], linear))
        return branches, reasons or fused.conv_projection_obstacles(branches, norm)

    def _project(self, x: Tensor, h: int, w: int, norm: nn.LayerNorm | None) -> tuple[Tensor, ...]:
        prefix = int(self.with_cls_token)
        channels = checks.input_channels(self._modules["proj_q"])
        h, w = checks.check_tokens_of_map(x, h, w, channels, prefix)
        branches, obstacles = self._branches(norm)
        if not obstacles:
            return fused.conv_projection(
                x,
                (h, w),
                branches,
                num_prefix_tokens=prefix,
                norm=norm,
                packed=self._packed,
                backend=self.backend,
            )
        u = x if norm is None else norm(x)
        cls, tokens = u.split([prefix, h * w], dim=1)
        maps = tokens.transpose(1, 2).unflatten(2, (h, w))
        projected = []
        for _, step, linear in self._steps():
            rows = u if step is None else torch.cat([cls, step(maps).flatten(2).transpose(1, 2)], dim=1)
            projected.append(linear(rows))
        return tuple(projected)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        probabilities = self.attn_drop((q * self.scale @ k.transpose(-2, -1)).softmax(-1))
        return (probabilities @ v).transpose(1, 2).flatten(2)


class DepthwiseConvNorm(nn.Module):
    """A depthwise convolution and its batch norm, on an NCHW map."""

    def __init__(self, channels: int, kernel_size: int, stride: int, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size, stride, padding, groups=channels, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        # For one image a convolution may leave channels-last memory, and then PyTorch's CPU batch norm (seen in 2.13)
        # returns a wrong input gradient when the batch stride of the gradient it gets is not H*W*C.
        return self.bn(self.conv(x).contiguous(memory_format=torch.channels_last))


def _map_step(method: str, channels: int, kernel_size: int, stride: int, padding: int) -> nn.Module | None:
    """What happens to the map in front of one linear; None for nothing."""
    if method == "dw_bn":
        return DepthwiseConvNorm(channels, kernel_size, stride, padding)
    if method == "avg":
        return nn.AvgPool2d(kernel_size, stride, padding, ceil_mode=True)
    return None
