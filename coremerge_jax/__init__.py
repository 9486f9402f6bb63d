"""Core Space merging of LoRA adapters in JAX (arXiv 2509.17786)."""

from coremerge_jax.errors import CoreMergeError, FormatError, MismatchError, UnsupportedError
from coremerge_jax.lora import Adapter, Kind, LoRA, Metadata
from coremerge_jax.merge import merge
from coremerge_jax.rules import (
    cart,
    chain,
    dare,
    from_function,
    isotropize,
    mean,
    task_arithmetic,
    ties,
    tsv,
)
from coremerge_jax.spaces import core, full, knots

__all__ = [
    "Adapter",
    "CoreMergeError",
    "FormatError",
    "Kind",
    "LoRA",
    "Metadata",
    "MismatchError",
    "UnsupportedError",
    "cart",
    "chain",
    "core",
    "dare",
    "from_function",
    "full",
    "isotropize",
    "knots",
    "mean",
    "merge",
    "task_arithmetic",
    "ties",
    "tsv",
]
