"""One form for all spellings of a module's path."""

import functools
import re

from coremerge_jax.naming.table import EQUAL, EXPERT_LAYERS, LISTED, RENAMES, TOWERS, WRAPPERS

# Not the index of a gate's only weight.
_NUMBER = re.compile(
    r"(?<![^.\[])(?<!\bgate\.weight\[)(?<!\brouter\.weight\[)\d+(?![^.\]])", re.ASCII
)
_END = r"(?![^.\[])"
_WRAPPERS = re.compile(rf"^(?:(?:{'|'.join(WRAPPERS)})\.)+")
_RENAMES = [(re.compile(old + _END), new) for old, new in RENAMES]
_EQUAL = [(re.compile(old + _END), new) for old, new in EQUAL]
_LAYER = re.compile(rf"\bexperts\.#\.(\w+){_END}")
_LISTED = re.compile(rf"\bexperts\.({'|'.join(LISTED)})\.#{_END}")
_TOWERS = {kind: re.compile("|".join(words)) for kind, words in TOWERS.items()}


def canonical(path: str) -> str:
    """Returns a form of a module's path that all its spellings share.

    It is for comparison, and no name in any model. The layer of an expert ``experts.3.w2`` and its
    part of a parameter ``experts.down_proj[3]`` have one form, that of the parameter. Names of
    tensors (``path.weight``) may be given, too.
    """
    return fill(canonical_template(template(path)), path)


def template(path: str) -> str:
    """Returns a path with ``#`` in place of each component that is a number."""
    return _NUMBER.sub("#", path)


def fill(pattern: str, path: str) -> str:
    """Returns a template with the numbers of a path, which has as many; else the path."""
    numbers, texts = _NUMBER.findall(path), pattern.split("#")
    if len(texts) != len(numbers) + 1:  # the path itself has a "#"
        return path
    return "".join(x for pair in zip(texts, [*numbers, ""], strict=True) for x in pair)


@functools.lru_cache(maxsize=2**14)
def canonical_template(pattern: str) -> str:
    """Returns `canonical` of a template."""
    pattern = _WRAPPERS.sub("", renamed(pattern))
    for old, new in _EQUAL:
        pattern = old.sub(new, pattern)
    pattern = _LAYER.sub(lambda found: f"experts.{expert_part(found[1])}[#]", pattern)
    return _LISTED.sub(lambda found: f"experts.{LISTED[found[1]]}[#]", pattern)


def renamed(pattern: str) -> str:
    """Returns a template with the new names of layers; those of models around them stay."""
    for old, new in _RENAMES:
        pattern = old.sub(new, pattern)
    return pattern


def renames(pattern: str) -> frozenset[int]:
    """Returns the places in the table of the renames that apply to a template."""
    found = set()
    for place, (old, new) in enumerate(_RENAMES):
        before, pattern = pattern, old.sub(new, pattern)
        if pattern != before:
            found.add(place)
    return frozenset(found)


def towers(path: str) -> frozenset[str]:
    """Returns what the part of a model with this path takes in: images, sounds, or neither."""
    return frozenset(kind for kind, word in _TOWERS.items() if word.search(path))


def is_expert_layer(pattern: str) -> bool:
    """Returns True for the template of a layer of one expert, as ``experts.#.w1``."""
    return _LAYER.search(pattern) is not None


def is_listed_expert(pattern: str) -> bool:
    """Returns True for the template of an expert in a list, as ``experts.down_projs.#``."""
    return _LISTED.search(pattern) is not None


def expert_part(layer: str) -> str:
    """Returns the part of the fused parameters that a layer of an expert is: of w1, gate_proj."""
    return EXPERT_LAYERS.get(layer, layer)
