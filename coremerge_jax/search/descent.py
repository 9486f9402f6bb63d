"""Gradient descent in coefficients of adapters: one compiled program a step."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from coremerge_jax.errors import FormatError, RecipeError
from coremerge_jax.lora import Adapter
from coremerge_jax.merging.precision import is_available
from coremerge_jax.merging.projected import Projected
from coremerge_jax.rules import Chain
from coremerge_jax.search.losses import check_scalar
from coremerge_jax.search.sweeping import progress_line

Batch = Any  # a pytree, as the user's loss takes it

Loss = Callable[[Adapter, Batch], jax.Array]


@dataclasses.dataclass(frozen=True)
class Judge:
    """A measure of merges that decides when to stop.

    Attributes:
        measure: function of a merged adapter and a batch that JAX can trace.
        batches: to measure with, in order.
        summarize: from what was found with each batch to numbers by name for the history, and a
            key: the lower, the better.
    """

    measure: Callable[[Adapter, Batch], Any]
    batches: Sequence[Batch]
    summarize: Callable[[list[Any]], tuple[dict[str, float], tuple[float, ...]]]


@dataclasses.dataclass
class Kept:
    """The best table of coefficients, the step after which it was found, and the course."""

    table: Any
    step: int
    history: list[dict[str, float]]
    seconds: list[float]


class Descent:
    """Gradient descent in a table of coefficients ``(groups, T)``.

    Args:
        loss: of a merged adapter and a batch.
        projected: the adapters.
        rule: how to merge.
        groups: the name of each module's group, by path.
        optimizer: of optax.
        key: PRNG key, for rules that draw random numbers.
    """

    def __init__(
        self,
        loss: Loss,
        projected: Projected,
        rule: Chain,
        groups: Mapping[str, str],
        optimizer: optax.GradientTransformation,
        key: jax.Array | None,
    ) -> None:
        # In the precision of all else that the user computes in these programs.
        as_it_is = is_available(projected.dtype)
        self._projected = projected if as_it_is else projected.astype("float32")
        self._optimizer = optimizer
        names = list(dict.fromkeys(groups.values()))
        self._rows = {path: names.index(group) for path, group in groups.items()}
        self._rule, self._key = rule, key
        of_table = self._of_table(lambda merged, batch: check_scalar(loss(merged, batch)))

        def update(
            table: jax.Array, state: optax.OptState, projected: Projected, batch: Batch
        ) -> tuple[jax.Array, optax.OptState, jax.Array]:
            value, gradient = jax.value_and_grad(of_table)(table, projected, batch)
            with jax.numpy_dtype_promotion("standard"):  # as optax is written
                changes, state = optimizer.update(gradient, state, table)
                return optax.apply_updates(table, changes), state, value

        self._update = jax.jit(update)

    def _of_table(self, measure: Callable[[Adapter, Batch], Any]) -> Callable[..., Any]:
        """Returns a function of merges as one of their coefficients."""

        def of_table(table: jax.Array, projected: Projected, batch: Batch) -> Any:
            weights = {path: table[row] for path, row in self._rows.items()}
            merged = projected.merge(self._rule, weights=weights, scale=1.0, key=self._key)
            return measure(merged, batch)

        return of_table

    def judged(self, judge: Judge) -> Callable[[jax.Array], tuple[dict, tuple[float, ...]]]:
        """Returns a judge of merges as one of their coefficients."""
        measure = jax.jit(self._of_table(judge.measure))

        def judged(table: jax.Array) -> tuple[dict, tuple[float, ...]]:
            with jax.transfer_guard("allow"):
                found = [measure(table, self._projected, batch) for batch in judge.batches]
                return judge.summarize(jax.device_get(found))

        return judged

    def run(
        self,
        start: np.ndarray,
        batches: Iterable[Batch],
        judge: Judge | None,
        every: int,
        patience: int,
        progress: bool,
    ) -> Kept:
        """Descends until the batches end, or the judge has found nothing better for some time.

        Raises:
            FormatError: a loss is not finite.
            RecipeError: there are no batches.
        """
        judged = judge and self.judged(judge)
        kept, worse, step = Kept(start, 0, [], []), 0, 0
        best: tuple[float, ...] = (math.inf,)
        with progress_line("fit", progress) as say:
            for step, table, losses in self._steps(start, batches, every, kept.seconds):
                row: dict[str, float] = {"step": step}
                if losses:
                    row["loss"] = float(np.mean(losses))
                found: tuple[float, ...] = (-step,)  # without a judge, the last is the best
                if judged:
                    numbers, found = judged(table)
                    for value in numbers.values():
                        check_finite(value, step)
                    row |= numbers
                if found < best or not kept.history:
                    kept.table, kept.step, best, worse = table, step, found, 0
                else:
                    worse += 1
                kept.history.append(row)
                say(", ".join(f"{name} {value:.4g}" for name, value in row.items()))
                if worse == patience:
                    break
        if step == 0:
            raise RecipeError("no batches to learn from; expected at least one")
        return kept

    def _steps(
        self, start: np.ndarray, batches: Iterable[Batch], every: int, seconds: list[float]
    ) -> Iterator[tuple[int, jax.Array, list[float]]]:
        """Yields step, table and losses since the last entry: every few steps, and at the end."""
        with jax.transfer_guard("allow"), jax.numpy_dtype_promotion("standard"):
            table = jnp.asarray(start, self._projected.dtype)
            state = self._optimizer.init(table)
        step, losses = 0, list[float]()
        yield step, table, losses
        for step, batch in enumerate(batches, 1):
            started = time.perf_counter()
            with jax.transfer_guard("allow"):
                table, state, value = self._update(table, state, self._projected, batch)
                losses.append(check_finite(float(value), step))
            seconds.append(time.perf_counter() - started)
            if step % every == 0:
                yield step, table, losses
                losses = []
        if losses:
            yield step, table, losses


def check_finite(loss: float, step: int) -> float:
    """Returns a loss as it is.

    Raises:
        FormatError: it is not finite.
    """
    if not math.isfinite(loss):
        when = "at the initial coefficients; check the loss and its batches"
        if step > 1:
            when = f"after {step - 1} steps; try a lower learning rate"
        raise FormatError(f"the loss is {loss} {when}")
    return loss
