"""pointwise_mlp as two launches of the row-wise linear kernel."""

from __future__ import annotations

from fastvit_kernels.ops import library
from fastvit_kernels.ops.operator import Outputs, Tensors
from fastvit_kernels.ops.pointwise_mlp.reference import Static
from fastvit_kernels.ops.triton_linear import linear


def run(tensors: Tensors, static: Static) -> Outputs:
    """LayerNorm, linear and activation into the hidden rows, then linear and residual.

    The hidden rows go through memory: kept on chip, every tile of rows would need all of both weights, and its output
    accumulators grow with the width of the model.
    """
    x, norm_weight, norm_bias, weight1, bias1, weight2, bias2, residual = library.dense(tensors)
    assert x is not None and weight1 is not None and weight2 is not None
    hidden = linear(
        x,
        weight1,
        bias1,
        static.dtype,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        norm_eps=static.norm_eps,
        activation=static.activation,
    )
    return (linear(hidden, weight2, bias2, static.dtype, residual=residual),)
