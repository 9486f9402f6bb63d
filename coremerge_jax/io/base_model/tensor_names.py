"""Tensors of a checkpoint, found by the names that an adapter has for their modules."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

from coremerge_jax.errors import CoreMergeWarning, MismatchError, nearest
from coremerge_jax.io.module_paths import split_expert, unwrapped
from coremerge_jax.lora import Kind
from coremerge_jax.naming.pieces import fused, parts
from coremerge_jax.naming.spelling import canonical, fill, template, towers

_SHOWN = 3

_TRIED = 100  # prefixes; of real models, a few

# From a tensor's name as the adapter's modules have it to the name in the checkpoint.
Names = Callable[[str], str]


@dataclasses.dataclass(frozen=True)
class Site:
    """Tensor that has a module's weight, maybe among others.

    Attributes:
        tensor: the tensor's name.
        index: index of the module's expert in a tensor of all experts, None in others.
        part: the place of the module's rows in the tensor, or in the matrix of its expert, and the
            number of modules whose rows are there.
    """

    tensor: str
    index: int | None = None
    part: tuple[int, int] = (0, 1)


# A site may have one of several names; a module has one or, if it is fused, several sites.
_Form = list[list[Site]]
_Forms = Mapping[str, list[_Form]]
_Sites = dict[str, tuple[Site, ...]]


@dataclasses.dataclass(frozen=True)
class Prefix:
    """The prefix by which a checkpoint's names differ: the name of the inner model.

    Attributes:
        lacking: prefix that the checkpoint's names lack, with its dot.
        added: prefix that they have in addition.
    """

    lacking: str = ""
    added: str = ""

    def __call__(self, name: str) -> str:
        """Returns the name in the checkpoint."""
        return self.added + name.removeprefix(self.lacking)

    def __str__(self) -> str:
        if self.added or self.lacking:
            return f"with {self.added!r}" if self.added else f"without {self.lacking!r}"
        return "as they are"


def find_tensors(
    modules: Mapping[str, Kind], tensors: Collection[str], where: str
) -> tuple[Names, _Sites]:
    """Returns the tensors that each module adapts.

    A checkpoint may lack the name of the inner model (``transformer.``), or have it where the
    adapted model does not, in the same way for all modules. transformers reads both. It may also
    have the names of another release of the model (`naming`), or others before a part of the path
    that only one of its tensors has.

    Args:
        modules: kind of each module, by path.
        tensors: names of the base model's tensors.
        where: the base model, for messages.

    Returns:
        The difference of the names, and the tensors of each module: several for a fused one whose
        parts are tensors.

    Raises:
        MismatchError: some modules have no tensor, or there are several ways to find them.

    Warns:
        CoreMergeWarning: names are neither equal nor those of a known release.
    """
    plain = {path: [_plain(path, kind)] for path, kind in modules.items()}
    prefixes = _prefixes(modules, tensors)
    if found := _find(plain, prefixes, tensors, where):
        _check_towers(found[1], tensors, where, renamed=False)
        return _Either(found[0], tensors), found[1]
    index = _CanonicalIndex(tensors)
    forms = {path: [_plain(path, kind), *_forms(path)] for path, kind in modules.items()}
    ways = [_Canonical(index, way) for way in _prefixes(map(canonical, modules), index.names)]
    if found := _find(forms, ways, tensors, where):
        _check_towers(found[1], tensors, where, renamed=True)
        return found
    by_end = _ByEnd(index)
    if found := _find(forms, [by_end], tensors, where):
        by_end.check(where)
        path, (site, *_) = next(iter(found[1].items()))
        warnings.warn(
            f"{where}: names of tensors are not those of the adapter's modules; {path!r} is taken "
            f"for {site.tensor!r}, and others likewise; is it the right base?",
            CoreMergeWarning,
            stacklevel=2,
        )
        return found
    attempts: list[tuple[_Forms, Names]] = [(plain, way) for way in prefixes]
    raise _missing([*attempts, (forms, ways[0])], by_end, tensors, where)


# --- Names that a tensor may have -----------------------------------------------------------------


def _plain(path: str, kind: Kind) -> _Form:
    """Returns the site of a module whose checkpoint has the adapter's names."""
    if kind.name == "expert":
        return [[Site(*split_expert(path))]]
    path = unwrapped(path)
    if kind.name == "linear":  # of a torch.nn.MultiheadAttention, whose weight is a parameter
        return [[Site(f"{path}.weight"), Site(f"{path}.in_proj_weight")]]
    return [[Site(f"{path}.weight")]]


def _forms(path: str) -> Iterator[_Form]:
    """Yields the sites that a module may have in other releases, by canonical names."""
    key = canonical(unwrapped(path))
    yield [_whole(key)]
    if split := parts(key):
        yield [_whole(part) for part in split]
    if joined := fused(key):
        whole, place, count = joined
        yield [[dataclasses.replace(site, part=(place, count)) for site in _whole(whole)]]


def _whole(key: str) -> list[Site]:
    sites = [Site(f"{key}.weight")]
    return [*sites, Site(*split_expert(key))] if key.endswith("]") else sites


# --- Differences of names -------------------------------------------------------------------------


def _prefixes(modules: Iterable[str], tensors: Iterable[str]) -> list[Prefix]:
    """Returns the ways in which names may differ, the most likely first."""
    firsts = dict.fromkeys(path.partition(".")[0] for path in modules if "." in path)
    tops = dict.fromkeys(name.partition(".")[0] for name in tensors if "." in name)
    lacking = [Prefix(lacking=f"{first}.") for first in firsts]
    return [Prefix(), *lacking, *(Prefix(added=f"{top}.") for top in tops)][:_TRIED]


class _CanonicalIndex:
    """Tensors of a checkpoint by canonical name, except for those whose name others share."""

    def __init__(self, tensors: Collection[str]) -> None:
        self.tensors = tensors
        self.names: dict[str, str] = {}
        shared = set()
        for name in tensors:
            key = canonical(name)
            if self.names.setdefault(key, name) != name:
                shared.add(key)
        for key in shared:
            del self.names[key]


@dataclasses.dataclass(frozen=True)
class _Canonical:
    """Names of another release of the model, with or without the name of the inner model."""

    index: _CanonicalIndex
    prefix: Prefix

    def __call__(self, name: str) -> str:
        """Returns the name in the checkpoint; the same name if it has no such tensor."""
        if name in self.index.tensors:
            return name
        return self.index.names.get(self.prefix(canonical(name)), name)

    def __str__(self) -> str:
        return f"as in another release, {self.prefix}"


@dataclasses.dataclass(frozen=True)
class _Either:
    """Names that differ by a prefix; those of another release where a tensor is not called so.

    All modules may have the same names in both releases, but not all other trained tensors.
    """

    plain: Names
    tensors: Collection[str]

    @functools.cached_property
    def _renamed(self) -> _Canonical:
        return _Canonical(_CanonicalIndex(self.tensors), Prefix())

    def __call__(self, name: str) -> str:
        """Returns the name in the checkpoint; of what is not there, without the prefix alone."""
        there = self.plain(name)
        if there in self.tensors:
            return there
        found = self._renamed(there)
        return found if found in self.tensors else there


class _ByEnd:
    """Names of tensors that end like the adapter's, where no two kinds of tensors do.

    Attributes:
        several: two kinds of tensors for each name that ends like both.
    """

    def __init__(self, index: _CanonicalIndex) -> None:
        self._index = index
        self._ends: dict[str, list[str]] = {}
        for kind in dict.fromkeys(map(template, index.names)):
            for _, end in _cuts(kind):
                self._ends.setdefault(end, []).append(kind)
        self._known: dict[str, str | None] = {}
        self._moves: dict[str, set[str]] = {}
        self.several: dict[str, list[str]] = {}

    def __call__(self, name: str) -> str:
        """Returns the name in the checkpoint; the same name if it is not certain."""
        if name in self._index.tensors:
            return name
        key = canonical(name)
        kind = template(key)
        if kind not in self._known:
            self._known[kind] = self._search(kind)
        there = self._known[kind]
        return name if there is None else self._index.names.get(fill(there, key), name)

    def __str__(self) -> str:
        return "by their ends"

    def _search(self, kind: str) -> str | None:
        """Returns the kind of tensors with the longest common end, if there is one only.

        A kind in a vision or audio tower is none for a module elsewhere, nor the other way round.
        """
        for start, end in _cuts(kind):
            kinds = self._ends.get(end, [])
            if start and "#" not in end:  # too common, unless a tensor's whole name
                kinds = [there for there in kinds if there == end]
            if len(kinds) > 1:
                self.several[kind] = kinds
            if kinds:
                certain = len(kinds) == 1 and towers(kinds[0]) == towers(kind)
                return self._move(start, end, kinds[0]) if certain else None
        return None

    def _move(self, start: str, end: str, there: str) -> str | None:
        """Returns the kind of tensors if it has a number for each of the name's; notes the move."""
        before = there.removesuffix(end)
        if before.count("#") != start.count("#"):
            return None
        first = end.partition(".")[0]
        self._moves.setdefault(f"{start}.{first}".removeprefix("."), set()).add(before + first)
        return there

    def check(self, where: str) -> None:
        """Raises `MismatchError` if one part of the adapted model is several of the base."""
        for before, places in self._moves.items():
            if len(places) > 1:
                one, other = sorted(places)[:2]
                raise MismatchError(
                    f"{where}: names of the adapter's modules that begin with {before!r} end like "
                    f"tensors of both {one!r} and {other!r}; is it the right base?"
                )


def _cuts(name: str) -> Iterator[tuple[str, str]]:
    """Yields the ways to cut a dotted name in two, the longest end first."""
    names = name.split(".")
    return ((".".join(names[:i]), ".".join(names[i:])) for i in range(len(names)))


# --- Search ---------------------------------------------------------------------------------------


def _find(
    forms: _Forms, ways: Sequence[Names], tensors: Collection[str], where: str
) -> tuple[Names, _Sites] | None:
    """Returns the first way if it finds all modules, else the only one that does; or None.

    Raises:
        MismatchError: several do.
    """
    whole = []
    for way in ways:
        sites = _sites(forms, way, tensors)
        if sites is not None:
            whole.append((way, sites))
        if whole and way is ways[0]:
            break
    if len(whole) > 1:
        told = ", or ".join(str(way) for way, _ in whole)
        raise MismatchError(
            f"{where}: the adapter's modules fit there in {len(whole)} ways ({told}); "
            "train the adapter on the whole model, whose names are certain"
        )
    return whole[0] if whole else None


def _check_towers(sites: _Sites, tensors: Collection[str], where: str, *, renamed: bool) -> None:
    """Checks that names without a prefix, or with one more, are not those of another tower.

    The checkpoint of a tower alone has them, but that of a model with several parts has the
    tower's own: a module ``vision_tower.layers.0.fc`` is no ``layers.0.fc`` there.

    Args:
        sites: the sites of each module.
        tensors: names of the base model's tensors.
        where: the base model, for messages.
        renamed: whether names are those of another release, in which more than a prefix differs.

    Raises:
        MismatchError: they are.
    """
    for path, (site, *_) in sites.items():
        if towers(path) == towers(site.tensor):
            continue
        if renamed or len({towers(name) for name in tensors if "#" in template(name)}) > 1:
            raise MismatchError(
                f"{where}: no tensor is certain to be that of module {path!r}; nearest is "
                f"{site.tensor!r}, of another part of the model; is it the right base?"
            )


def _sites(forms: _Forms, names: Names, tensors: Collection[str]) -> _Sites | None:
    """Returns the sites of all modules; None if one has none."""
    found: _Sites = {}
    for path, ways in forms.items():
        sites = _first(ways, names, tensors)
        if sites is None:
            return None
        found[path] = sites
    return found


def _first(
    ways: Sequence[_Form], names: Names, tensors: Collection[str]
) -> tuple[Site, ...] | None:
    """Returns the sites of the first form that is in the checkpoint as a whole."""
    for form in ways:
        sites = []
        for choices in form:
            named = ((site, names(site.tensor)) for site in choices)
            site = next((dataclasses.replace(x, tensor=n) for x, n in named if n in tensors), None)
            if site is None:
                break
            sites.append(site)
        else:
            return tuple(sites)
    return None


def _missing(
    attempts: Iterable[tuple[_Forms, Names]],
    by_end: _ByEnd,
    tensors: Collection[str],
    where: str,
) -> MismatchError:
    """Returns the error for modules without a tensor, by the way in which most have one."""
    found = [
        (forms, names, {path for path, ways in forms.items() if _first(ways, names, tensors)})
        for forms, names in attempts
    ]
    forms, names, there = max(found, key=lambda attempt: len(attempt[2]))
    missing = {path: ways[0][0][0].tensor for path, ways in forms.items() if path not in there}
    for path, tensor in missing.items():
        if kinds := by_end.several.get(template(canonical(tensor))):
            filled = dict.fromkeys(fill(kind, canonical(tensor)) for kind in kinds)
            one, other = [*filled][:2] if len(filled) > 1 else kinds[:2]
            return MismatchError(
                f"{where}: module {path!r} ends like both {one!r} and {other!r}, so its tensor is "
                "not certain; is it the right base?"
            )
    named = [
        f"{path!r}, nearest to {nearest_tensors(names(tensor), tensors)}"
        for path, tensor in list(missing.items())[:_SHOWN]
    ]
    if len(missing) == len(forms):
        return MismatchError(
            f"{where}: none of the adapter's {len(forms)} modules is in this model; the first "
            f"is {named[0]}; is it the right base?"
        )
    return MismatchError(
        f"{where}: {len(missing)} of the adapter's {len(forms)} modules are not in this model: "
        f"{'; '.join(named)}; is it the right base?"
    )


def nearest_tensors(name: str, tensors: Iterable[str]) -> str:
    """Returns the tensors whose names are most like this one, for messages."""
    return ", ".join(map(repr, nearest(name, tensors, _SHOWN))) or "nothing: it has no tensors"
