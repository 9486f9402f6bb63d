"""Search methods: generators that propose values of parameters and receive their scores."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Generator, Iterable
from typing import Any, Protocol

import numpy as np

from coremerge_jax.errors import RecipeError
from coremerge_jax.merging.checks import check_whole, short
from coremerge_jax.search.parameters import SCALE, Choices, Distribution

Proposals = Generator[dict[str, Any], float, None]


class Method(Protocol):
    """A search method."""

    def propose(self, values: Choices) -> Proposals:
        """Yields values of parameters by name, and receives the score of each; more is better.

        Parameters that are not in a proposal keep the values that the rule has.

        Args:
            values: the values to try, in order, by name of the parameter.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Grid:
    """All combinations of the values."""

    def propose(self, values: Choices) -> Proposals:
        """Proposes; see `Method`. The scale varies fastest, because all scales share one merge."""
        names = sorted(values, key=lambda name: name == SCALE)
        for row in itertools.product(*(listed(name, values[name]) for name in names)):
            found = dict(zip(names, row, strict=True))
            yield {name: found[name] for name in values}


@dataclasses.dataclass(frozen=True)
class Line:
    """One parameter after another, in the order given (arXiv 2509.17786, appendix D.3).

    Tries the values of a parameter in order, and goes on to the next parameter with the best of
    them.

    Attributes:
        patience: a parameter is done after so many values in a row that are no better than the
            best before. The default is that of the authors' code.
    """

    patience: int = 2

    def __post_init__(self) -> None:
        check_whole("patience", self.patience, 1)

    def propose(self, values: Choices) -> Proposals:
        """Proposes; see `Method`."""
        best: dict[str, Any] = {}
        if not values:
            yield best
        for name, choices in values.items():
            top, chosen, worse = -math.inf, None, 0
            for value in listed(name, choices):
                score = yield {**best, name: value}
                if chosen is None or score > top:
                    top, chosen, worse = score, value, 0
                else:
                    worse += 1
                if worse == self.patience:
                    break
            best[name] = chosen


@dataclasses.dataclass(frozen=True)
class Random:
    """Random combinations of the values, each at most once.

    Values may be distributions of `scipy.stats` (objects with ``rvs(random_state=...)``).

    Attributes:
        trials: the largest number of combinations.
        seed: seed of the draws.
    """

    trials: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole("trials", self.trials, 1)
        check_whole("seed", self.seed, 0)

    def propose(self, values: Choices) -> Proposals:
        """Proposes; see `Method`."""
        rng = np.random.default_rng(self.seed)
        if any(isinstance(choices, Distribution) for choices in values.values()):
            for _ in range(self.trials):
                yield {name: _draw(name, choices, rng) for name, choices in values.items()}
            return
        lists = [listed(name, choices) for name, choices in values.items()]
        size = math.prod(map(len, lists))
        for i in rng.choice(size, min(size, self.trials), replace=False, shuffle=True):
            places = np.unravel_index(i, [len(choices) for choices in lists])
            yield {name: x[int(j)] for name, x, j in zip(values, lists, places, strict=True)}


def listed(name: str, choices: Iterable[Any] | Distribution) -> list[Any]:
    """Returns the values of a parameter as a list of Python objects.

    Raises:
        RecipeError: there is no value, or they are a distribution.
    """
    if isinstance(choices, Distribution):
        raise RecipeError(f"values of {name!r} are a distribution; only random() can draw from it")
    if isinstance(choices, str | int | float):
        choices = [choices]
    if not isinstance(choices, Iterable):
        raise RecipeError(f"values of {name!r}: expected a list of them, got {short(choices)}")
    found = [_plain(value) for value in choices]
    if not found:
        raise RecipeError(f"values of {name!r}: expected at least one")
    return found


def _plain(value: Any) -> Any:
    """Returns a value as a Python object: arrays and lists as tuples, which rules take."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return tuple(value) if isinstance(value, list) else value


def _draw(name: str, choices: Iterable[Any] | Distribution, rng: np.random.Generator) -> Any:
    if isinstance(choices, Distribution):
        value = choices.rvs(random_state=rng)
        return _plain(value)
    found = listed(name, choices)
    return found[rng.integers(len(found))]


grid = Grid

line = Line

random = Random

METHODS: dict[str, Callable[..., Method]] = {"grid": grid, "line": line, "random": random}
