"""Drop-in modules on fused operators: constructor arguments, parameter names and initialisation of the originals."""

from fastvit_kernels.nn.activations import QuickGELU
from fastvit_kernels.nn.drop_path import DropPath
from fastvit_kernels.nn.layer_norm import LayerNorm

__all__ = ["DropPath", "LayerNorm", "QuickGELU"]
