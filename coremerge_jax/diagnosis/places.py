"""Place of a module in a model, layer and kind, as far as its path shows it."""

import re
from collections.abc import Sequence
from typing import NamedTuple

_NUMBER = re.compile(r"(?:(?<=[./_\[])|^)\d+(?=[./_\]]|$)")


class Grid(NamedTuple):
    """Modules by layer and kind.

    Attributes:
        layers: their numbers, ascending.
        kinds: short names.
        cells: for each module, its row (layer) and column (kind).
    """

    layers: tuple[int, ...]
    kinds: tuple[str, ...]
    cells: tuple[tuple[int, int], ...]


def arrange(paths: Sequence[str]) -> Grid | None:
    """Returns the grid of modules, or None where paths do not tell of several layers.

    The first number in a path is the layer. What is left, with any other number (of an expert)
    made general, is the kind.
    """
    found = [_split(path) for path in paths]
    if any(pair is None for pair in found):
        return None
    pairs = [pair for pair in found if pair is not None]
    layers = sorted({layer for layer, _ in pairs})
    if len(layers) < 2:
        return None
    kinds = list(dict.fromkeys(kind for _, kind in pairs))
    cells = tuple((layers.index(layer), kinds.index(kind)) for layer, kind in pairs)
    return Grid(tuple(layers), tuple(shorten(kinds)), cells)


def _split(path: str) -> tuple[int, str] | None:
    number = _NUMBER.search(path)
    if number is None:
        return None
    kind = path[: number.start()] + "*" + _NUMBER.sub("*", path[number.end() :])
    return int(number[0]), kind


def shorten(paths: Sequence[str]) -> list[str]:
    """Returns the shortest endings, in whole parts, that tell the paths apart."""
    split = [path.split(".") for path in paths]
    names = []
    for parts in split:
        length = 1
        while length < len(parts) and sum(x[-length:] == parts[-length:] for x in split) > 1:
            length += 1
        names.append(".".join(parts[-length:]))
    return names
