"""Core Space merging of LoRA adapters in JAX (arXiv 2509.17786)."""

from coremerge_jax.errors import CoreMergeError, FormatError, MismatchError, UnsupportedError
from coremerge_jax.lora import Adapter, Kind, LoRA, Metadata

__all__ = [
    "Adapter",
    "CoreMergeError",
    "FormatError",
    "Kind",
    "LoRA",
    "Metadata",
    "MismatchError",
    "UnsupportedError",
]
