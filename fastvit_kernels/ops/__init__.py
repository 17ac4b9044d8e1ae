"""The fused operators."""

from fastvit_kernels.ops.batch_norm import BatchNorm
from fastvit_kernels.ops.batch_norm_act import batch_norm_act
from fastvit_kernels.ops.conv_projection import Projection, conv_projection
from fastvit_kernels.ops.depthwise_conv import depthwise_conv
from fastvit_kernels.ops.depthwise_mlp import depthwise_mlp
from fastvit_kernels.ops.global_attention import global_attention
from fastvit_kernels.ops.head_tokens import head_tokens
from fastvit_kernels.ops.local_attention import local_attention
from fastvit_kernels.ops.merge_head_tokens import merge_head_tokens
from fastvit_kernels.ops.patch_embedding import patch_embedding
from fastvit_kernels.ops.pointwise_mlp import pointwise_mlp
from fastvit_kernels.ops.pooled_projection import pooled_projection

__all__ = [
    "BatchNorm",
    "Projection",
    "batch_norm_act",
    "conv_projection",
    "depthwise_conv",
    "depthwise_mlp",
    "global_attention",
    "head_tokens",
    "local_attention",
    "merge_head_tokens",
    "patch_embedding",
    "pointwise_mlp",
    "pooled_projection",
]
