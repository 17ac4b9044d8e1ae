"""Drop-in modules on fused operators: constructor arguments, parameter names and initialisation of the originals."""

from fastvit_kernels.nn.activations import QuickGELU
from fastvit_kernels.nn.conv_projection_attention import ConvProjectionAttention
from fastvit_kernels.nn.daff import DAFF
from fastvit_kernels.nn.dense_conv import DenseConv2d
from fastvit_kernels.nn.dense_linear import DenseLinear
from fastvit_kernels.nn.drop_path import DropPath
from fastvit_kernels.nn.hat_mlp import HatMLP
from fastvit_kernels.nn.hi_mhsa import HIMHSA
from fastvit_kernels.nn.hierarchical_attention import HierarchicalAttention
from fastvit_kernels.nn.irffn import IRFFN
from fastvit_kernels.nn.layer_norm import LayerNorm
from fastvit_kernels.nn.lmhsa import LMHSA
from fastvit_kernels.nn.lpu import LPU
from fastvit_kernels.nn.mix_ffn import MixFFN
from fastvit_kernels.nn.patch_embedding import PatchEmbedding
from fastvit_kernels.nn.pointwise_mlp import PointwiseMLP
from fastvit_kernels.nn.spatial_reduction_attention import SpatialReductionAttention

__all__ = [
    "DAFF",
    "HIMHSA",
    "IRFFN",
    "LMHSA",
    "LPU",
    "ConvProjectionAttention",
    "DenseConv2d",
    "DenseLinear",
    "DropPath",
    "HatMLP",
    "HierarchicalAttention",
    "LayerNorm",
    "MixFFN",
    "PatchEmbedding",
    "PointwiseMLP",
    "QuickGELU",
    "SpatialReductionAttention",
]
