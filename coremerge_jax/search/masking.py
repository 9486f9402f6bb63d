"""Masks of adapters by layers, searched for by an evolution strategy."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from coremerge_jax.errors import FormatError, UnsupportedError
from coremerge_jax.lora import Adapter
from coremerge_jax.merging.checks import Scale, check_function, check_scale, check_whole
from coremerge_jax.merging.projected import Projected, project
from coremerge_jax.rules import as_rule, chain
from coremerge_jax.rules.rule import AUTO
from coremerge_jax.search.fitting import Fit
from coremerge_jax.search.grouping import groups_of
from coremerge_jax.search.parameters import MergeRule
from coremerge_jax.search.sweeping import Metrics, Record, measured, progress_line, score

START, SPREAD = 1.0, 1.0
"""Mean and standard deviation of the variables at first; an adapter is there if its is above 0."""


def masks(
    adapters: Sequence[Adapter] | Projected,
    rule: MergeRule,
    evaluate: Callable[[Adapter], Metrics],
    *,
    per: str | Sequence[str] = "layer",
    scale: Scale = AUTO,
    budget: int = 200,
    objective: str | None = None,
    maximize: bool = True,
    seed: int = 0,
    key: jax.Array | None = None,
    progress: bool = False,
) -> Fit:
    """Searches for adapters that harm a merge in some layers, and leaves them out there.

    Masks of layer × adapter are those of a Gaussian's variables that are above 0, and CMA-ES adapts
    the Gaussian to the masks with the best scores (ENMP, arXiv 2604.17753). The merge of all
    adapters comes first, so that the result is no worse by ``evaluate``. The adapters are projected
    once. Needs cmaes: pip install 'coremerge-jax[masks]'.

    A search fits the inputs that it is judged on: check the result on others.

    The cores of an adapter that is left out are 0. For `task_arithmetic` and `tsv`, also with
    `isotropize`, that is the same as if it had no such module, and for `regmean` nearly so. But
    `mean` and `cart` still divide by the number of all, and elementwise rules such as `ties` keep
    the coordinates of all. Of ``projected.pieces(rule)``, merged by `task_arithmetic`, its
    share alone is left out.

    Args:
        adapters: the adapters to merge; or `project` of them, or its pieces.
        rule: how to merge.
        evaluate: gets the merged adapter, and returns a number, or numbers by name; for example
            `agreement`.
        per: groups of modules with a common mask, as in `fit`.
        scale: multiplies the merged updates, as in `merge`.
        budget: number of masks to try.
        objective: the metric that decides; by default the first.
        maximize: True if more of it is better.
        seed: of the search.
        key: PRNG key, for rules that draw random numbers; the same in all merges.
        progress: True to show progress on stderr, where that is a terminal.

    Returns:
        The best merge; ``weights`` are 1 where an adapter is there, and 0 where it is left out.

    Raises:
        FormatError: no merge has a finite score.
        MismatchError: a pattern matches no module.
        RecipeError: there is no such metric, or an argument is of another kind.
        UnsupportedError: cmaes is not installed.
    """
    check_function("evaluate", evaluate)
    check_scale(scale)
    check_whole("budget", budget, 1)
    check_whole("seed", seed, 0)
    projected = adapters if isinstance(adapters, Projected) else project(adapters)
    groups = groups_of(projected.order, per)
    names = list(dict.fromkeys(groups.values()))
    parts, judge = chain(as_rule(rule)), measured(evaluate)

    def weights_of(mask: np.ndarray) -> dict[str, np.ndarray]:
        rows = dict(zip(names, mask.astype(np.float64), strict=True))
        return {path: rows[group] for path, group in groups.items()}

    def merge(mask: np.ndarray) -> Adapter:
        return projected.merge(parts, weights=weights_of(mask), scale=scale, key=key)

    def metrics_of(mask: np.ndarray) -> dict[str, float]:
        record = Record("masks", parts, {"left out": int((~mask).sum())}, {}, 0.0)
        found = judge(record, merge(mask))
        named = found if isinstance(found, Mapping) else {objective or "score": found}
        return {name: float(value) for name, value in named.items()}

    search = _Search(metrics_of, objective, maximize)
    with progress_line("masks", progress) as say:
        for row in search.run((len(names), projected.adapters), budget, seed):
            say(", ".join(f"{name} {value:.4g}" for name, value in row.items()))
    best = search.best()
    rows = dict(zip(names, best.astype(np.float64), strict=True))
    return Fit(
        adapter=merge(best),
        weights=weights_of(best),
        groups=rows,
        step=search.step,
        history=tuple(search.history),
        seconds=tuple(search.seconds),
    )


class _Search:
    """A search for the mask with the best score; masks that come again are not evaluated again.

    Args:
        metrics_of: of a mask.
        objective: the metric that decides; None for the first.
        maximize: True if more of it is better.
    """

    def __init__(
        self,
        metrics_of: Callable[[np.ndarray], dict[str, float]],
        objective: str | None,
        maximize: bool,
    ) -> None:
        self._metrics_of, self._objective, self._maximize = metrics_of, objective, maximize
        self._scores: dict[bytes, float] = {}
        self._best: tuple[float, np.ndarray] | None = None
        self.step, self.history, self.seconds = 0, list[dict[str, float]](), list[float]()

    def run(self, shape: tuple[int, int], budget: int, seed: int) -> Iterator[dict[str, float]]:
        """Yields the metrics of masks of a shape as they come; the first leaves nothing out."""
        size = int(np.prod(shape))
        strategy = _strategy(max(size, 2), seed)  # the least; one more has no effect
        yield self._try(np.ones(shape, bool))
        asked = 1
        while asked < budget and not strategy.should_stop():
            told = []
            for _ in range(min(strategy.population_size, budget - asked)):
                point = strategy.ask()
                mask = (point[:size] > 0).reshape(shape)
                if mask.tobytes() not in self._scores:
                    yield self._try(mask)
                told.append((point, -self._scores[mask.tobytes()]))
            asked += len(told)
            if len(told) == strategy.population_size:
                strategy.tell(told)

    def _try(self, mask: np.ndarray) -> dict[str, float]:
        started = time.perf_counter()
        metrics = self._metrics_of(mask)
        self.seconds.append(time.perf_counter() - started)
        found = score(metrics, self._objective, self._maximize)
        self._scores[mask.tobytes()] = found
        self.history.append({"step": len(self.history), **metrics})
        if self._best is None or found > self._best[0]:
            self._best, self.step = (found, mask), len(self.history) - 1
        return self.history[-1]

    def best(self) -> np.ndarray:
        """Returns the best mask.

        Raises:
            FormatError: none has a finite score.
        """
        assert self._best is not None
        if not np.isfinite(self._best[0]):
            raise FormatError(
                f"none of {len(self.history)} masks has a finite score; check the function that "
                "evaluates"
            )
        return self._best[1]


def _strategy(size: int, seed: int) -> Any:
    """Returns CMA-ES in so many variables, at least 2; with a diagonal covariance of many."""
    try:
        import cmaes
    except ImportError as error:
        raise UnsupportedError("masks need cmaes: pip install 'coremerge-jax[masks]'") from error
    kind = cmaes.CMA if size <= _FULL else cmaes.SepCMA
    return kind(mean=np.full(size, START), sigma=SPREAD, seed=seed)


_FULL = 1000  # variables; a step takes time by their number squared
