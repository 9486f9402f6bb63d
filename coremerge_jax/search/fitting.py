"""Coefficients of the adapters, learned by gradient descent through the merge."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import optax

from coremerge_jax.errors import MismatchError, RecipeError
from coremerge_jax.lora import Adapter
from coremerge_jax.merging.checks import check_function, check_number, check_whole, short
from coremerge_jax.merging.projected import Projected, project
from coremerge_jax.rules import Chain, as_rule, chain
from coremerge_jax.search.descent import Batch, Descent, Judge, Loss
from coremerge_jax.search.grouping import groups_of
from coremerge_jax.search.losses import check_scalar
from coremerge_jax.search.parameters import MergeRule

if TYPE_CHECKING:  # an optional library
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Fit:
    """Result of `fit`, `distill` and `masks`.

    Attributes:
        adapter: merged with the best coefficients.
        weights: these coefficients, ``(T,)`` for each module path.
        groups: the same, ``(T,)`` for each group of modules by its name.
        step: number of the step after which they were found.
        history: entries with ``"step"``, ``"loss"`` (the mean since the last entry) and what
            decided: of `fit` ``"validation"`` (the mean loss of the validation batches), of
            `distill` also ``"agreement"`` and ``"kl"``, of `masks` the metrics.
        seconds: of each step; the first has the compilation too.
    """

    adapter: Adapter
    weights: Mapping[str, np.ndarray]
    groups: Mapping[str, np.ndarray]
    step: int
    history: tuple[Mapping[str, float], ...]
    seconds: tuple[float, ...] = ()

    @property
    def seconds_per_step(self) -> float:
        """The median time of a step, without the first; NaN for fewer than two."""
        return float(np.median(self.seconds[1:])) if len(self.seconds) > 1 else float("nan")

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Draws the history by step. Needs matplotlib.

        Args:
            path: file to write the figure to, if any; its ending gives the format.
        """
        from coremerge_jax.search.plot import draw_fit, save

        return save(draw_fit(self.history, self.step), path)


def fit(
    loss: Loss,
    adapters: Sequence[Adapter] | Projected,
    rule: MergeRule,
    batches: Iterable[Batch],
    *,
    validation: Sequence[Batch] = (),
    per: str | Sequence[str] = "adapter",
    initial: float | Sequence[float] = 1.0,
    optimizer: optax.GradientTransformation | None = None,
    every: int = 10,
    patience: int = 10,
    key: jax.Array | None = None,
    progress: bool = False,
) -> Fit:
    """Learns coefficients of the adapters' cores by gradient descent through the merge.

    The rule merges the cores times their coefficients, and ``loss`` of the merged adapter is
    minimized. Each step is one compiled program.

    ``projected.pieces(rule)`` in place of the adapters, and `task_arithmetic` as the rule, learns
    coefficients of the shares that the adapters have in the rule's merge: it decomposes nothing in
    its steps, and costs little more than the model. For a loss that needs no labels, use `distill`.

    Args:
        loss: function of a merged adapter and a batch that returns a scalar and is differentiable
            by JAX; for example `cross_entropy` of the logits of a model with the adapter.
        adapters: the adapters to merge; or `project` of them, which also fixes the space, weights
            and precision.
        rule: the merge rule; not `dc_merge`, which has no derivative.
        batches: one for each step, pytrees of equal shapes. Large arrays, such as the parameters
            of the model, belong here too: arrays that ``loss`` closes over become constants of
            the compiled program.
        validation: batches whose mean loss decides when to stop and which coefficients are kept.
            Without any, all batches are used and the last coefficients kept.
        per: ``"adapter"``: a coefficient for each adapter; ``"module"``: for each adapter and
            module; ``"layer"``: for each adapter and group of modules whose paths are equal up to
            the first number; or patterns of module paths (as in `fnmatch`), each for a group of
            modules. A module belongs to the first pattern that it matches; modules that match none
            form a group of their own.
        initial: coefficients to start from: one, or one per adapter.
        optimizer: an optimizer of optax; by default Adam with learning rate 0.01.
        every: steps between two evaluations of the validation batches.
        patience: number of evaluations in a row without improvement after which to stop.
        key: PRNG key, for rules that draw random numbers; the same in all steps.
        progress: True to show progress on stderr, where that is a terminal.

    Raises:
        MismatchError: a pattern matches no module, or there is not one initial coefficient per
            adapter.
        FormatError: the loss is not finite.
        RecipeError: there are no batches, or an argument is of another kind.
    """
    check_function("loss", loss)
    if isinstance(batches, str) or not isinstance(batches, Iterable):
        raise RecipeError(f"batches: expected a list of batches, got {short(batches)}")

    def measure(merged: Adapter, batch: Batch) -> jax.Array:
        return check_scalar(loss(merged, batch))

    return learn(
        loss,
        adapters if isinstance(adapters, Projected) else project(adapters),
        chain(as_rule(rule)),
        batches,
        judge=Judge(measure, validation, mean_loss) if validation else None,
        per=per,
        initial=initial,
        optimizer=optimizer or optax.adam(0.01),
        every=every,
        patience=patience,
        key=key,
        progress=progress,
    )


def mean_loss(found: list[Any]) -> tuple[dict[str, float], tuple[float, ...]]:
    """Returns the mean of losses, for the history and to compare; see `Judge`."""
    mean = float(np.mean(found))
    return {"validation": mean}, (mean,)


def learn(
    loss: Loss,
    projected: Projected,
    rule: Chain,
    batches: Iterable[Batch],
    *,
    judge: Judge | None,
    per: str | Sequence[str],
    initial: float | Sequence[float],
    optimizer: optax.GradientTransformation,
    every: int,
    patience: int,
    key: jax.Array | None,
    progress: bool,
) -> Fit:
    """Learns coefficients; see `fit`, whose validation batches are a judge here."""
    check_whole("every", every, 1)
    check_whole("patience", patience, 1)
    groups = groups_of(projected.order, per)
    names = list(dict.fromkeys(groups.values()))
    start = _start(initial, projected.adapters)
    table = np.broadcast_to(start, (len(names), projected.adapters))
    descent = Descent(loss, projected, rule, groups, optimizer, key)
    kept = descent.run(table, batches, judge, every, patience, progress)
    learned = dict(zip(names, np.asarray(kept.table), strict=True))
    weights = {path: learned[group] for path, group in groups.items()}
    adapter = projected.merge(rule, weights=weights, scale=1.0, key=key)
    return Fit(adapter, weights, learned, kept.step, tuple(kept.history), tuple(kept.seconds))


def _start(initial: float | Sequence[float], adapters: int) -> np.ndarray:
    """Returns coefficients to start from: ``()``, or ``(T,)``."""
    for coefficient in initial if isinstance(initial, Iterable) else [initial]:
        check_number("initial", coefficient)
    first = np.asarray(initial)
    if first.shape not in ((), (adapters,)):
        raise MismatchError(
            f"initial coefficients of shape {first.shape} for {adapters} adapters; "
            "expected one for all, or one each"
        )
    return first
