"""Drop-in modules on fused operators: constructor arguments, parameter names and initialisation of the originals."""

from fastvit_kernels.nn.activations import QuickGELU
from fastvit_kernels.nn.conv_projection_attention import ConvProjectionAttention
from fastvit_kernels.nn.drop_path import DropPath
from fastvit_kernels.nn.hat_mlp import HatMLP
from fastvit_kernels.nn.hierarchical_attention import HierarchicalAttention
from fastvit_kernels.nn.layer_norm import LayerNorm
from fastvit_kernels.nn.patch_embedding import PatchEmbedding
from fastvit_kernels.nn.pointwise_mlp import PointwiseMLP

__all__ = [
    "ConvProjectionAttention",
    "DropPath",
    "HatMLP",
    "HierarchicalAttention",
    "LayerNorm",
    "PatchEmbedding",
    "PointwiseMLP",
    "QuickGELU",
]
