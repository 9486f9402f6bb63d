"""Keys of leaves in a tree of parameters, the paths of modules that they name, and patterns."""

import collections
import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

# Any pytree, and one of its leaves: JAX has no types for them.
Tree = Any
Leaf = Any

# Names of parameters that do not identify the module.
_UNNAMED = ("kernel", "w", "embeddings")

# Parts of a path below which layers lie: numbered, or scanned if no number follows. Both may be
# there: MaxText scans over blocks of a few layers (decoder/layers/layers_0).
_CONTAINERS = "(?:[a-z]+_)*(?:layers|blocks)|layer|block|h"

_CONTAINER = re.compile(_CONTAINERS)

_NUMBERED = re.compile(rf"(^|/)({_CONTAINERS})[_/](\d+)(?=/|$)")


def flatten(tree: Tree) -> dict[str, Leaf]:
    """Returns leaves by key, in order; see `keys_of`."""
    return dict(zip(keys_of(tree), jax.tree.leaves(tree), strict=True))


def keys_of(tree: Tree) -> list[str]:
    """Returns the key of each leaf, in the order of `jax.tree.leaves`.

    Parts are joined by ``/``. The level ``value`` that flax has below a variable is left out: what
    has other leaves beside it is a parameter of that name.
    """
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    parts = [jax.tree_util.keystr(path, simple=True, separator="/").split("/") for path in paths]
    below = collections.Counter(tuple(x[:end]) for x in parts for end in range(len(x)))
    alone = ((x, x[-1] == "value" and below[tuple(x[:-1])] == 1) for x in parts)
    return ["/".join(x[:-1] if stripped else x) for x, stripped in alone]


def map_leaves(change: Callable[[str, Leaf], Leaf], tree: Tree) -> Tree:
    """Returns a tree with each leaf replaced by what a function of its key and it returns."""
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, map(change, keys_of(tree), leaves))


def module_paths(module: str, param: str, batch: tuple[int, ...]) -> tuple[str, ...]:
    """Returns the module path of each kernel of a batch, parts joined by dots.

    Args:
        module: its path in the tree, parts joined by ``/``.
        param: the name of the kernel.
        batch: the lengths of the axes of layers and experts.
    """
    module = re.sub(r"^(params/)+", "", module)
    parts = [part for part in separate_numbers(module).split("/") if part]
    parts += [param] * (param not in _UNNAMED or not parts)
    at = container(module)
    found = []
    for index in np.ndindex(batch):
        names, rest = list(parts), list(index)
        if at is not None and rest:
            names.insert(at + 1, str(rest.pop(0)))
        found.append(".".join(names) + "".join(f"[{i}]" for i in rest))
    return tuple(found)


def is_numbered(module: str) -> bool:
    """Returns True if a path names one layer, as ``layers/0`` or ``layers_0``."""
    return _NUMBERED.search(module) is not None


def separate_numbers(module: str) -> str:
    """Returns a path with ``layers/0`` in place of ``layers_0``."""
    return _NUMBERED.sub(r"\1\2/\3", module)


def container(module: str) -> int | None:
    """Returns the place of the last part that holds layers which have no numbers in the path.

    It is the place in the path as `separate_numbers` gives it; None if there is no such part.
    """
    parts = separate_numbers(module).split("/")
    pairs = zip(parts, [*parts[1:], ""], strict=True)
    places = [
        i
        for i, (part, following) in enumerate(pairs)
        if _CONTAINER.fullmatch(part) and not following.isdigit()
    ]
    return places[-1] if places else None


def matches(key: str, patterns: Iterable[str]) -> bool:
    """Returns True if a key matches one of the patterns, as in `fnmatch`."""
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)


def first_match(key: str, patterns: Mapping[str, str]) -> str | None:
    """Returns the value of the first pattern that a key matches, as in `fnmatch`."""
    found = (value for pattern, value in patterns.items() if fnmatch.fnmatchcase(key, pattern))
    return next(found, None)
