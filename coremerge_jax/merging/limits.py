"""Limits of a merged adapter's size, and the ranks that a budget over the whole model gives.

NumPy is imported in methods only: recipes have limits too, and help has to come at once.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from coremerge_jax.errors import RecipeError

if TYPE_CHECKING:
    import numpy as np

# Share of a module's largest squared singular value up to which others are rounding errors.
_NOTHING = 1e-12


@dataclasses.dataclass(frozen=True)
class Limit:
    """A limit of an adapter's size: of each module, or of the whole model.

    Attributes:
        rank: the most singular directions of each module.
        energy: the share of its squared Frobenius norm that each module keeps, if ``rank`` allows
            it; the fewest directions that do are kept.
        budget: the mean rank: all modules together keep at most ``budget`` directions per module.
        parameters: the most entries of all factors together.

    Raises:
        RecipeError: a module and the whole model are limited, or the whole model twice.
    """

    rank: int | None = None
    energy: float | None = None
    budget: float | None = None
    parameters: int | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) > 1 and set(given) != {"rank", "energy"}:
            told = " and ".join(f"{name}={value}" for name, value in given.items())
            raise RecipeError(
                f"{told}: rank and energy limit each module, budget and parameters the whole "
                "model; give rank, energy or both, or one of the others"
            )

    @property
    def nothing(self) -> bool:
        """True if nothing is cut."""
        return all(value is None for value in vars(self).values())

    @property
    def whole_model(self) -> bool:
        """True if ranks depend on all modules together."""
        return self.budget is not None or self.parameters is not None

    def rank_of(self, share: "np.ndarray") -> int:
        """Returns the rank of one module, if each is limited for itself.

        Args:
            share: ``(k,)``, the share of energy in the first 1, 2, … directions.
        """
        import numpy as np

        whole = len(share)
        needed = whole if self.energy is None else int(np.searchsorted(share, self.energy)) + 1
        return min(needed, whole, whole if self.rank is None else self.rank)

    def ranks(
        self, squares: Mapping[str, "np.ndarray"], shapes: Mapping[str, tuple[int, int]]
    ) -> dict[str, int]:
        """Returns the ranks that keep most energy of the whole model, at least 1 of each module.

        Directions are taken by their energy, or for ``parameters`` by their energy per parameter,
        and passed over where they do not fit. Equal ones are taken by the modules' paths.

        Args:
            squares: ``(k,)`` by path, the energy of each direction, descending.
            shapes: ``(m, n)`` by path.

        Raises:
            RecipeError: there are fewer parameters than one direction of each module takes.
        """
        paths = sorted(squares)
        costs = {path: self.cost(shapes[path]) for path in paths}
        least = sum(costs.values())
        left = self._whole(len(paths)) - least
        if left < 0:
            raise RecipeError(
                f"parameters={self.parameters}: {len(paths)} modules have {least} at rank 1; give "
                "at least as many"
            )
        ranks = dict.fromkeys(paths, 1)
        for path in _by_gain(paths, squares, costs):
            if costs[path] <= left:
                ranks[path] += 1
                left -= costs[path]
        return ranks

    def cost(self, shape: tuple[int, int]) -> int:
        """Returns what one direction of a module ``(m, n)`` takes of a limit of the whole model."""
        return 1 if self.parameters is None else sum(shape)

    def _whole(self, modules: int) -> int:
        """Returns the number of directions, or of parameters, of the whole model."""
        if self.parameters is not None:
            return self.parameters
        assert self.budget is not None
        return math.floor(self.budget * modules)

    def largest(self, shapes: Mapping[str, tuple[int, int]], ranks: Mapping[str, int]) -> int:
        """Returns the most parameters that the limit of a whole model allows.

        Args:
            shapes: ``(m, n)`` by path.
            ranks: of the modules before the cut, by path.
        """
        import numpy as np

        if self.parameters is not None:
            return min(self.parameters, sum(ranks[path] * sum(shapes[path]) for path in ranks))
        widths = {path: np.full(ranks[path], float(sum(shapes[path]))) for path in ranks}
        widest = self.ranks(widths, shapes)
        return sum(rank * sum(shapes[path]) for path, rank in widest.items())

    def most(self, ranks: Mapping[str, int]) -> dict[str, int]:
        """Returns the largest rank of each module that the limit allows, by path.

        Args:
            ranks: of the modules before the cut.
        """
        most: Any = self.rank
        if self.budget is not None:
            most = self._whole(len(ranks)) - len(ranks) + 1
        return {path: rank if most is None else min(rank, most) for path, rank in ranks.items()}


def _by_gain(
    paths: list[str], squares: Mapping[str, "np.ndarray"], costs: Mapping[str, int]
) -> list[str]:
    """Returns the module of each direction but the first ones, by descending energy per cost."""
    import numpy as np

    owners = np.concatenate([np.full(len(squares[path]) - 1, i) for i, path in enumerate(paths)])
    places = np.concatenate([np.arange(1, len(squares[path])) for path in paths])
    gains = np.concatenate([squares[path][1:] / costs[path] for path in paths])
    least = np.asarray([_NOTHING * squares[path][0] / costs[path] for path in paths])
    order = np.lexsort((places, owners, -gains))
    return [paths[i] for i in owners[order][(gains > least[owners])[order]]]
