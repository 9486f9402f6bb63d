"""Names of base models, which one model has several of: hub ids, cache paths, local folders."""

import re
from collections.abc import Iterable

# Endings of quantized copies, whose adapters fit the model itself.
_QUANTIZED = re.compile(
    r"[-_.](unsloth-bnb-4bit|bnb-[48]bit|gptq(-int[48]|-[48]bit)?|awq(-int4)?|int[48]|[48]-?bit"
    r"|fp8(-dynamic)?|bf16|fp16|mlx)$"
)
_CACHED = re.compile(r"(?:^|/)models--([^/]+?)--([^/]+)(?:/|$)")

_HUB = re.compile(r"^(https?://huggingface\.co/|hf://|file://)")
_LONGEST = 1000

# Owners that publish copies of others' models, under the same name.
_MIRRORS = ("unsloth", "mlx-community", "lmstudio-community")

# First parts of relative paths that look like ids. No organisation that publishes models has them.
_FOLDERS = re.compile(
    r"\.{0,2}|~|[a-z]:|models?|base_?models?|pretrained(_models?)?|checkpoints?|ckpts?|weights|hf"
    r"|huggingface|cache|data|downloads?|home|root|mnt|tmp|opt|srv|workspace|content|kaggle|local"
)

# Last parts of paths that say nothing about the model.
_UNTOLD = re.compile(r"(base|final|merged|output|outputs|model|latest|hf|checkpoint[-_]?\d*|\d+)?")


def same_base(one: str, other: str) -> bool:
    """Returns True if two names can be those of one base model, or of its quantized copies.

    Hub ids are one model if owner and name agree, whatever their case; a local folder and an id, or
    two folders, if the last part of their paths does.
    """
    (x_owner, x), (y_owner, y) = _split(one), _split(other)
    if x != y:
        return False
    return x_owner == y_owner or None in (x_owner, y_owner)


def best_name(names: Iterable[str]) -> str | None:
    """Returns the name that others understand best: an id before a path, and of no quantized copy.

    Among equals, the first.
    """
    return min(names, key=_rank, default=None)


def is_local(name: str) -> bool:
    """Returns True if a name is a path of some machine, rather than an id."""
    first, slash, rest = _forward(name).partition("/")
    return bool(_FOLDERS.fullmatch(first.lower()) or "/" in rest or not (slash and rest))


def _rank(name: str) -> tuple[bool, bool, bool]:
    return is_local(name), bool(_QUANTIZED.search(name.lower())), bool(_HUB.match(name))


def _split(name: str) -> tuple[str | None, str]:
    """Returns owner and name in one spelling; no owner for a path, or for a mirror of others."""
    path = _forward(name).lower()
    if cached := _CACHED.search(path):
        path = f"{cached[1]}/{cached[2]}"
    owner, _, last = path.rpartition("/")
    while (shorter := _QUANTIZED.sub("", last)) != last and shorter:
        last = shorter
    if is_local(path):
        return (path, last) if _UNTOLD.fullmatch(last) else (None, last)
    return (None if owner in _MIRRORS else owner), last


def _forward(name: str) -> str:
    path = name[:_LONGEST].strip().replace("\\", "/").replace("___", ".")  # ModelScope's dots
    return _HUB.sub("", path).rstrip("/")
