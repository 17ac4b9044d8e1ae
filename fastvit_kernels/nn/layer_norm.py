"""LayerNorm in fp32."""

from __future__ import annotations

from torch import Tensor, nn

from fastvit_kernels.nn import checks
from fastvit_kernels.ops.normalization import normalize


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` over the last axis, computed in at least fp32 whatever the dtype of input and parameters.

    Input `[..., C]` of any floating dtype; the result has the same dtype. With fp32 and fp64 it is `nn.LayerNorm`.
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__(dim, eps=eps, elementwise_affine=elementwise_affine, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        checks.check_any_tensor("x", x)
        return normalize(x, self.weight, self.bias, self.eps, x.dtype)
