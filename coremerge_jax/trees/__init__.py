"""Adapters in trees of parameters: layouts, names, axes, and kernels of JAX models."""

from coremerge_jax import pytrees as pytrees
from coremerge_jax.trees.families import find_names, translate
from coremerge_jax.trees.names import NameMap

__all__ = ["NameMap", "find_names", "translate"]
