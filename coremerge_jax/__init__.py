"""Core Space merging of LoRA adapters in JAX (arXiv 2509.17786)."""

from coremerge_jax.checkpoint import load_peft, save_peft
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
from coremerge_jax.truncate import truncate

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
    "load_peft",
    "mean",
    "merge",
    "save_peft",
    "task_arithmetic",
    "ties",
    "truncate",
    "tsv",
]
