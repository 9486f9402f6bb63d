"""Results of a diagnosis, by module, layer and kind."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from coremerge_jax.diagnosis.measures import Measures, Pairs
from coremerge_jax.errors import RecipeError

_NUMBER = re.compile(r"(?:(?<=[./_\[])|^)\d+(?=[./_\]]|$)")


class Arrangement(NamedTuple):
    """Modules by layer and kind.

    Attributes:
        layers: their numbers, ascending.
        kinds: short names.
        cells: for each module, its row (layer) and column (kind).
    """

    layers: tuple[int, ...]
    kinds: tuple[str, ...]
    cells: tuple[tuple[int, int], ...]


def arrange(paths: Sequence[str]) -> Arrangement | None:
    """Returns the grid of modules, or None if the paths do not have several layers.

    The first number in a path is the layer. The rest, with ``*`` for any other number (of an
    expert), is the kind.
    """
    pairs = [pair for path in paths if (pair := _split(path))]
    if len(pairs) < len(paths):
        return None
    layers = sorted({layer for layer, _ in pairs})
    if len(layers) < 2:
        return None
    kinds = list(dict.fromkeys(kind for _, kind in pairs))
    cells = tuple((layers.index(layer), kinds.index(kind)) for layer, kind in pairs)
    return Arrangement(tuple(layers), tuple(shorten(kinds)), cells)


def _split(path: str) -> tuple[int, str] | None:
    """Returns the layer and the kind that a path names."""
    number = _NUMBER.search(path)
    if number is None:
        return None
    kind = path[: number.start()] + "*" + _NUMBER.sub("*", path[number.end() :])
    return int(number[0]), kind


def shorten(paths: Sequence[str]) -> list[str]:
    """Returns the shortest endings, in whole parts, by which the paths differ."""
    split = [path.split(".") for path in paths]
    names = []
    for parts in split:
        length = 1
        while length < len(parts) and sum(x[-length:] == parts[-length:] for x in split) > 1:
            length += 1
        names.append(".".join(parts[-length:]))
    return names


def mean_known(values: np.ndarray, axis: int = 0) -> np.ndarray:
    """Returns the mean over an axis of all values but NaN; NaN if there is none."""
    count = np.sum(~np.isnan(values), axis=axis)
    return np.where(count > 0, np.nansum(values, axis=axis) / np.maximum(count, 1), np.nan)


@dataclasses.dataclass(frozen=True)
class Module:
    """A module and its measures.

    Attributes:
        path: its path.
        shape: ``(m, n)``.
        adapters: places in `Diagnosis.adapters` of the T adapters that have it.
        ranks: of the factors of each of these.
        measures: the numbers, as NumPy arrays.
    """

    path: str
    shape: tuple[int, int]
    adapters: tuple[int, ...]
    ranks: tuple[int, ...]
    measures: Measures


@dataclasses.dataclass(frozen=True)
class RuleCost:
    """Cost of a merge by one rule in core space; see `merging.cost.cost`.

    Attributes:
        rule: its name.
        products: floating-point operations in products of matrices.
        core: all other floating-point operations.
        memory: bytes while the largest module is merged.
        seconds: estimate for reading, merging and writing, one after the other, without
            compilation; None if the machine was not measured.
    """

    rule: str
    products: float
    core: float
    memory: int
    seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class Results:
    """Measures of adapters, module by module, and their sums.

    Attributes:
        adapters: their names.
        merged: the name of the merged adapter; None if there is none.
        base_model: of the adapters; None if unknown.
        modules: in the order of the adapters.
        costs: of merging the adapters by each rule.
    """

    adapters: tuple[str, ...]
    merged: str | None
    base_model: str | None
    modules: tuple[Module, ...]
    costs: tuple[RuleCost, ...]

    def __iter__(self) -> Iterator[Module]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)

    def by_adapter(self, name: str) -> np.ndarray:
        """Returns a measure of each module and adapter.

        Args:
            name: ``"norms"`` or ``"outvoted"``, or a field of `Contribution` with an entry for
                each adapter.

        Returns:
            ``(L, T)``, NaN where the adapter, or the merged one, does not have the module.
        """
        found = np.full((len(self), len(self.adapters)), np.nan)
        for row, module in zip(found, self, strict=True):
            measures = module.measures
            source = measures if hasattr(measures, name) else measures.contribution
            if source is not None:
                row[list(module.adapters)] = getattr(source, name)
        return found

    def pairs(self, name: str) -> np.ndarray:
        """Returns the mean of a field of `Pairs` over the modules that both adapters have.

        Returns:
            ``(T, T)``, NaN where two adapters have no module in common.
        """
        size = len(self.adapters)
        total, count = np.zeros((size, size)), np.zeros((size, size))
        for module in self:
            places = np.ix_(module.adapters, module.adapters)
            total[places] += getattr(module.measures.pairs, name)
            count[places] += 1
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)

    def pair_means(self, name: str) -> np.ndarray:
        """Returns the mean of a field of `Pairs` over all pairs of different adapters, by module.

        Returns:
            ``(L,)``, NaN for a module of one adapter alone.
        """
        found = []
        for module in self:
            matrix, size = getattr(module.measures.pairs, name), len(module.adapters)
            pairs = size * (size - 1)
            found.append((matrix.sum() - np.trace(matrix)) / pairs if pairs else np.nan)
        return np.asarray(found)

    def energy_kept(self, update: str = "merged") -> np.ndarray:
        """Returns the share of all energy that is kept if each module is cut to rank 1, 2, ….

        Args:
            update: ``"merged"``, or ``"total"`` for the sum of the adapters.

        Returns:
            ``(k,)``, increasing to 1; all 1 for an update of zeros; empty without any update.
        """
        found = [getattr(module.measures.spectra, update) for module in self]
        squares = [s**2 for s in found if s is not None]
        kept = np.zeros(max(map(len, squares), default=0))
        for row in squares:
            kept[: len(row)] += row
        kept = np.cumsum(kept)
        return kept / kept[-1] if len(kept) and kept[-1] > 0 else np.ones_like(kept)

    def rank_for(self, share: float, update: str = "merged") -> int:
        """Returns the smallest rank that keeps a share of the energy; see `energy_kept`.

        Raises:
            RecipeError: the share is not in (0, 1], or there is no such update.
        """
        if not 0 < share <= 1:
            raise RecipeError(f"share={share!r:.60}: expected a number in (0, 1]")
        if not len(self.energy_kept(update)):
            raise RecipeError(
                f"there is no {update} update; diagnose with merged=, or take 'total'"
            )
        return int(np.searchsorted(self.energy_kept(update), share * (1 - 1e-12))) + 1

    def totals(self) -> dict[str, np.ndarray]:
        """Returns the fields of `Contribution`, averaged over all modules by their energy.

        Returns:
            ``"kept"``, ``"share"`` and ``"alignment"``, ``(T,)`` each, and ``"unexplained"``, a
            scalar. Empty without a merged adapter.
        """
        found = [(x, x.measures.contribution) for x in self]
        known = [(list(x.adapters), x.measures.norms**2, part) for x, part in found if part]
        if not known:
            return {}
        own, merged = np.zeros(len(self.adapters)), 0.0
        kept, share, aligned = np.zeros((3, len(self.adapters)))
        for here, squares, part in known:
            energy = float(part.norm) ** 2
            own[here] += squares
            merged += energy
            kept[here] += part.kept * squares
            share[here] += part.share * energy
            aligned[here] += part.alignment**2 * squares
        own, share = np.where(own > 0, own, 1), share / (merged or 1.0)
        return {
            "kept": kept / own,
            "share": share,
            "alignment": np.sqrt(aligned / own),
            "unexplained": np.asarray(1 - share.sum() if merged > 0 else 0.0),
        }

    def to_dict(self) -> dict[str, Any]:
        """Returns all numbers, and their means over modules, as data for JSON; None for NaN."""
        names = [field.name for field in dataclasses.fields(Pairs)]
        return {
            **_plain(self),
            "mean": {
                "pairs": {name: _plain(self.pairs(name)) for name in names},
                "energy_kept": {x: _plain(self.energy_kept(x)) for x in ("total", "merged")},
                **_plain(self.totals()),
            },
        }


def _plain(value: Any) -> Any:
    """Returns a value as JSON-like data."""
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return {field.name: _plain(getattr(value, field.name)) for field in fields}
    if isinstance(value, dict):
        return {name: _plain(x) for name, x in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    return None if isinstance(value, float) and value != value else value
