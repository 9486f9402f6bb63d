"""Paths of modules and names of extras in an `Adapter`, which all formats share."""

import re

from coremerge_jax.errors import FormatError

# What surrounds a wrapped layer in peft. Of the base model's names, only the output projection of a
# torch.nn.MultiheadAttention keeps it: ``attention.base_layer.out_proj``.
WRAPPED = ".base_layer"

# Endings of the names of extras: trained rows of an embedding, and the bias of a B factor.
TOKENS = ".token_adapter.trainable_tokens_delta"
LORA_BIAS = ".lora_B.bias"


def unwrapped(path: str) -> str:
    """Returns a path or name without peft's wrappers."""
    return re.sub(rf"({re.escape(WRAPPED)})+(?=\.|$)", "", path)


def outermost(path: str) -> str:
    """Returns the outermost layer that a module is part of: an attention, of its projections."""
    return path.partition(WRAPPED)[0]


def split_expert(path: str) -> tuple[str, int]:
    """Returns the parameter path and index of an expert's path ``parameter[index]``.

    Raises:
        FormatError: the path has no index.
    """
    parameter, bracket, index = path.removesuffix("]").rpartition("[")
    if not bracket or not index.isdecimal() or len(index) > 9:
        raise FormatError(f"module {path!r}: an expert's path ends in [index]")
    return parameter, int(index)
