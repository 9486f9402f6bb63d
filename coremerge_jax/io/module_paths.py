"""Paths of modules and names of extras in an `Adapter`, which all formats share."""

import re

from coremerge_jax.errors import FormatError

# What surrounds a wrapped layer in peft. Of the base model's names, only the output projection of a
# torch.nn.MultiheadAttention keeps it: ``attention.base_layer.out_proj``.
WRAPPED = ".base_layer"

# What peft puts before the paths of the base model.
PREFIX = "base_model.model."

# Names that training puts into paths: torch.compile and FSDP anywhere, DataParallel at the start;
# and peft's own, again, for a model that peft wrapped twice.
_ANYWHERE = re.compile(
    r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_flat_param)\."
)
_FIRST = re.compile(rf"(module\.|{re.escape(PREFIX)})+")

# Ending of the name of an extra: the bias of a B factor.
LORA_BIAS = ".lora_B.bias"


def without_wrappers(key: str) -> tuple[bool, str]:
    """Removes what peft and training wrap around a model from the name of a tensor.

    Returns:
        True if peft's prefix was there, and the name in the base model.
    """
    key = _ANYWHERE.sub("", key)
    first = _FIRST.match(key)
    return (PREFIX in first[0], key[first.end() :]) if first else (False, key)


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
