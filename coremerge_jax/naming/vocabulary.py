"""Names of modules in the way of one adapter, learned from the modules that it shares with others.

All names are templates (`spelling.template`).
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

from coremerge_jax.naming.spelling import is_expert_layer, renamed, renames
from coremerge_jax.naming.table import EXPERT_LAYERS, PLACEMENTS, UNCERTAIN

# An adapter's names: the canonical name of each kind of module, and its own.
Vocabulary = Mapping[str, str]

_PLACEMENTS = [*PLACEMENTS, *({new: old for old, new in x.items()} for x in PLACEMENTS)]
_LAYER_OF = {part: layer for layer, part in EXPERT_LAYERS.items()}


def are_releases(one: str, other: str) -> bool:
    """Returns True for two names of one module in releases of a model's code.

    False if they differ only in models around it, and no release is known to have changed these.

    Args:
        one: a name.
        other: another, with the same canonical form.
    """
    if renamed(one) != one or renamed(other) != other or "experts" in one:
        return True
    return _is_placed(one, other, _PLACEMENTS)


def _is_older(one: str, other: str) -> bool:
    """Returns True if releases have renamed a module from one name to the other."""
    return renames(one) > renames(other) or _is_placed(one, other, PLACEMENTS)


def _is_placed(one: str, other: str, placements: Iterable[Mapping[str, str]]) -> bool:
    """Returns True if two names of one module differ as parts of a model that has been moved."""
    *_, shortest = (one, other), *_starts_of_equals(one.split("."), other.split("."))
    return any(pair in x.items() for x in placements for pair in ((one, other), shortest))


class Names:
    """Names for the modules of several adapters, in the way of one of them.

    Args:
        vocabularies: the names that each adapter uses.
        keys: canonical names of all kinds of modules.

    Attributes:
        target: place of the adapter whose names these are. It shows a name for every kind. Of
            several that do, it is the first with the fewest names that others have newer ones for,
            and among these with the most names of its own: the newest release reads them.
        chosen: the name of each kind.
        missing: a kind whose name the target does not show; None if there is none.
    """

    def __init__(self, vocabularies: Sequence[Vocabulary], keys: Sequence[str]) -> None:
        older = _older_names(vocabularies)
        order = sorted(
            range(len(vocabularies)),
            key=lambda t: (
                sum(name in older[key] for key, name in vocabularies[t].items()),
                sum(key not in vocabularies[t] for key in keys),
            ),
        )
        ways = {t: _Way(vocabularies, t) for t in order}
        found = {t: {key: ways[t].name(key) for key in keys} for t in order}
        self.target = next((t for t in order if None not in found[t].values()), order[0])
        self._way = ways[self.target]
        self.chosen = {key: name for key, name in found[self.target].items() if name}
        self.missing = next((key for key in keys if key not in self.chosen), None)

    def moved(self, own: str) -> str | None:
        """Returns the target's name for another adapter's; None if it is not certain."""
        return self._way.moved(own)


def _older_names(vocabularies: Iterable[Vocabulary]) -> dict[str, set[str]]:
    """Returns the names of each kind of module that some adapter has a newer name for."""
    shown: dict[str, dict[str, None]] = {}
    for vocabulary in vocabularies:
        for key, name in vocabulary.items():
            shown.setdefault(key, {})[name] = None
    return {
        key: {name for name in names if any(_is_older(name, x) for x in names if x != name)}
        for key, names in shown.items()
    }


class _Way:
    """The way in which one adapter names modules."""

    def __init__(self, vocabularies: Sequence[Vocabulary], t: int) -> None:
        self._vocabularies, self._own = vocabularies, vocabularies[t]
        shared = [
            (theirs, self._own[key])
            for vocabulary in vocabularies
            if vocabulary is not self._own
            for key, theirs in vocabulary.items()
            if key in self._own
        ]
        changed = [(renamed(theirs) != theirs, renamed(ours) != ours) for theirs, ours in shared]
        self._is_newer, self._is_older = (True, False) in changed, (False, True) in changed
        self._moves = _moves((self._renewed(theirs), ours) for theirs, ours in shared)

    def name(self, key: str) -> str | None:
        """Returns the name of a kind of module; None if it is not certain."""
        if key in self._own:
            return self._own[key]
        others = [names[key] for names in self._vocabularies if key in names]
        beside = _beside(key, others, self._own)
        return beside or next(filter(None, map(self.moved, others)), None)

    def moved(self, name: str) -> str | None:
        """Returns this adapter's name for another's; None if it is not certain."""
        if self._is_older:  # what a new name was before depends on the model
            return None
        name = self._renewed(name)
        for start in _starts(name):
            if start in self._moves:
                there = self._moves[start]
                rest = name[len(start) :]
                return None if there is None else (there + rest).removeprefix(".")
        return None

    def _renewed(self, name: str) -> str:
        """Returns a name with new names of layers, if this adapter has these and others not."""
        return renamed(name) if self._is_newer and not is_expert_layer(name) else name


def _beside(key: str, others: Iterable[str], own: Vocabulary) -> str | None:
    """Returns a name that differs only in its last part from that of a module beside it."""
    owner, name = _cut(key)
    if not key.endswith("[#]") and any(_cut(other)[1] != name for other in others):
        return None
    for sibling, path in own.items():
        (sibling_owner, sibling_name), (place, last) = _cut(sibling), _cut(path)
        if sibling_owner == owner and last in EXPERT_LAYERS and is_expert_layer(path):
            return f"{place}.{_LAYER_OF[name]}" if name in _LAYER_OF else None
        if sibling_owner == owner and last == sibling_name:
            return f"{place}.{name}" + "[#]" * path.endswith("[#]")
    return None


def _cut(path: str) -> tuple[str, str]:
    """Returns the owner of a module, and the module's name without an index."""
    owner, _, name = path.removesuffix("[#]").rpartition(".")
    return owner, name


def _starts(name: str) -> Iterator[str]:
    """Yields a dotted name and the starts of it, the longest first."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _moves(pairs: Iterable[tuple[str, str]]) -> dict[str, str | None]:
    """Returns starts of names, and what they become; None for those that become several.

    Args:
        pairs: two names of the same module.
    """
    moves: dict[str, str | None] = {}
    for before, after in pairs:
        for start, there in _starts_of_equals(before.split("."), after.split(".")):
            if moves.setdefault(start, there) != there:
                moves[start] = None
    for family in _PLACEMENTS:
        if any(moves.get(start) == there for start, there in family.items()):
            moves = {**family, **dict.fromkeys(UNCERTAIN), **moves}
    return moves


def _starts_of_equals(before: list[str], after: list[str]) -> Iterator[tuple[str, str]]:
    """Yields starts of two names of one module that name the same part of the model."""
    rest = _equals(before[::-1], after[::-1])
    if rest == 0:  # the last parts differ: what comes before may be the same
        pairs = [(before[:i], after[:i]) for i in range(1, 1 + _equals(before, after))]
    else:
        pairs = [(before[: len(before) - i], after[: len(after) - i]) for i in range(1, rest + 1)]
    for start, there in pairs:
        if start and start.count("#") == there.count("#"):
            yield ".".join(start), ".".join(there)


def _equals(x: list[str], y: list[str]) -> int:
    """Returns the number of first elements in which two lists agree."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(x, y, strict=False))
    return sum(1 for _ in pairs)
