"""Coefficients of the adapters, learned by gradient descent through the merge."""

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from coremerge_jax.errors import FormatError, MismatchError, RecipeError
from coremerge_jax.lora import Adapter
from coremerge_jax.merging.checks import check_function, check_number, check_whole, short
from coremerge_jax.merging.projected import Projected, project
from coremerge_jax.rules import Chain, as_rule, chain
from coremerge_jax.search.parameters import MergeRule
from coremerge_jax.search.sweeping import progress_line

if TYPE_CHECKING:  # an optional library
    from matplotlib.figure import Figure


def entropy(logits: jax.Array) -> jax.Array:
    """Returns the mean entropy of predictions, without labels (AdaMerging, arXiv 2310.02575).

    Args:
        logits: ``(..., classes)``.

    Returns:
        A scalar, in nats.
    """
    log_probabilities = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.sum(jnp.exp(log_probabilities) * log_probabilities, axis=-1))


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy of the predictions.

    Args:
        logits: ``(..., classes)``.
        labels: ``(...)``, integers.

    Returns:
        A scalar, in nats.
    """
    return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels))


Batch = Any  # a pytree, as the user's loss takes it

Loss = Callable[[Adapter, Batch], jax.Array]


@dataclasses.dataclass(frozen=True)
class Fit:
    """Result of `fit`.

    Attributes:
        adapter: merged with the best coefficients.
        weights: these coefficients, ``(T,)`` for each module path.
        groups: the same, ``(T,)`` for each group of modules by its name.
        step: number of the step after which they were found.
        history: entries with ``"step"``, ``"loss"`` (the mean since the last entry) and, if there
            are validation batches, ``"validation"`` (their mean loss).
    """

    adapter: Adapter
    weights: Mapping[str, np.ndarray]
    groups: Mapping[str, np.ndarray]
    step: int
    history: tuple[Mapping[str, float], ...]

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Draws the losses by step. Needs matplotlib.

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

    Args:
        loss: function of a merged adapter and a batch that returns a scalar and is differentiable
            by JAX; for example `entropy` or `cross_entropy` of the logits of a model with the
            adapter.
        adapters: the adapters to merge; or `project` of them, which also fixes the space, weights
            and precision.
        rule: the merge rule; not `dc_merge`, which has no derivative.
        batches: one for each step, pytrees of equal shapes. Large arrays, such as the parameters
            of the model, belong here too: arrays that ``loss`` closes over become constants of
            the compiled program.
        validation: batches whose mean loss decides when to stop and which coefficients are kept.
            Without any, all batches are used and the last coefficients kept.
        per: ``"adapter"``: a coefficient for each adapter; ``"module"``: for each adapter and
            module; or patterns of module paths (as in `fnmatch`), each for a group of modules. A
            module belongs to the first pattern that it matches; modules that match none form a
            group of their own.
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
    check_whole("every", every, 1)
    check_whole("patience", patience, 1)
    if isinstance(batches, str) or not isinstance(batches, Iterable):
        raise RecipeError(f"batches: expected a list of batches, got {short(batches)}")
    projected = adapters if isinstance(adapters, Projected) else project(adapters)
    groups = _groups(projected.order, per)
    for coefficient in initial if isinstance(initial, Iterable) else [initial]:
        check_number("initial", coefficient)
    first = np.asarray(initial)
    if first.shape not in ((), (projected.adapters,)):
        raise MismatchError(
            f"initial coefficients of shape {first.shape} for {projected.adapters} adapters; "
            "expected one for all, or one each"
        )
    names = list(dict.fromkeys(groups.values()))
    chosen = optimizer or optax.adam(0.01)
    descent = _Descent(loss, projected, chain(as_rule(rule)), groups, chosen, key)
    table = np.broadcast_to(first, (len(names), projected.adapters))
    kept = _descend(descent, table, batches, validation, every, patience, progress)
    learned = dict(zip(names, np.asarray(kept.table), strict=True))
    weights = {path: learned[group] for path, group in groups.items()}
    adapter = projected.merge(rule, weights=weights, key=key)
    return Fit(adapter, weights, learned, kept.step, tuple(kept.history))


def _groups(paths: Sequence[str], per: str | Sequence[str]) -> dict[str, str]:
    """Returns the name of each module's group."""
    if per == "module":
        return {path: path for path in paths}
    if per == "adapter":
        return dict.fromkeys(paths, "*")
    patterns = [per] if isinstance(per, str) else list(per)
    for pattern in patterns:
        if not fnmatch.filter(paths, pattern):
            raise MismatchError(
                f"pattern {pattern!r} matches no module; module paths look like {paths[0]!r}"
            )
    return {
        path: next((x for x in patterns if fnmatch.fnmatchcase(path, x)), "*") for path in paths
    }


class _Kept(NamedTuple):
    """The best table, the step after which it was found, and all losses."""

    table: jax.Array
    step: int
    history: list[dict[str, float]]


class _Descent:
    """Gradient descent in a table of coefficients ``(groups, T)``: one compiled program a step."""

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
        wide = jax.config.jax_enable_x64  # type: ignore[attr-defined]  # jax has no stub of it
        self._projected = projected if wide else projected.astype("float32")
        self._optimizer = optimizer
        names = list(dict.fromkeys(groups.values()))
        rows = {path: names.index(group) for path, group in groups.items()}

        def of_table(table: jax.Array, projected: Projected, batch: Batch) -> jax.Array:
            weights = {path: table[row] for path, row in rows.items()}
            found = loss(projected.merge(rule, weights=weights, key=key), batch)
            if not isinstance(found, jax.Array) or found.shape != ():
                shape = f"shape {found.shape}" if isinstance(found, jax.Array) else short(found)
                raise RecipeError(f"the loss gave {shape}; expected a scalar array of JAX")
            return found

        def update(
            table: jax.Array, state: optax.OptState, projected: Projected, batch: Batch
        ) -> tuple[jax.Array, optax.OptState, jax.Array]:
            value, gradient = jax.value_and_grad(of_table)(table, projected, batch)
            with jax.numpy_dtype_promotion("standard"):  # as optax is written
                changes, state = optimizer.update(gradient, state, table)
                return optax.apply_updates(table, changes), state, value

        self._loss, self._update = jax.jit(of_table), jax.jit(update)

    def steps(
        self, start: np.ndarray, batches: Iterable[Batch], every: int
    ) -> Iterator[tuple[int, jax.Array, list[float]]]:
        """Yields step, table and losses since the last entry: every few steps, and at the end."""
        with jax.transfer_guard("allow"), jax.numpy_dtype_promotion("standard"):
            table = jnp.asarray(start, self._projected.dtype)
            state = self._optimizer.init(table)
        step, losses = 0, list[float]()
        yield step, table, losses
        for step, batch in enumerate(batches, 1):
            with jax.transfer_guard("allow"):
                table, state, value = self._update(table, state, self._projected, batch)
                losses.append(_finite(float(value), step))
            if step % every == 0:
                yield step, table, losses
                losses = []
        if losses:
            yield step, table, losses

    def mean_loss(self, table: jax.Array, batches: Sequence[Batch], step: int) -> float:
        """Returns the mean loss over batches."""
        with jax.transfer_guard("allow"):
            found = [float(self._loss(table, self._projected, batch)) for batch in batches]
        return _finite(float(np.mean(found)), step)


def _finite(loss: float, step: int) -> float:
    if not math.isfinite(loss):
        when = "at the initial coefficients; check the loss and its batches"
        if step > 1:
            when = f"after {step - 1} steps; try a lower learning rate"
        raise FormatError(f"the loss is {loss} {when}")
    return loss


def _descend(
    descent: _Descent,
    start: np.ndarray,
    batches: Iterable[Batch],
    validation: Sequence[Batch],
    every: int,
    patience: int,
    progress: bool,
) -> _Kept:
    """Descends until the batches end, or the validation loss has not fallen for some time."""
    history: list[dict[str, float]] = []
    best, worse = math.inf, 0
    with progress_line("fit", progress) as say:
        for step, table, losses in descent.steps(start, batches, every):
            row: dict[str, float] = {"step": step}
            if losses:
                row["loss"] = float(np.mean(losses))
            if validation:
                row["validation"] = descent.mean_loss(table, validation, step)
            found = row.get("validation", -step)  # without validation, the last is the best
            if found < best or not history:
                kept, best, worse = (table, step), found, 0
            else:
                worse += 1
            history.append(row)
            say(", ".join(f"{name} {value:.4g}" for name, value in row.items()))
            if worse == patience:
                break
    if step == 0:
        raise RecipeError("no batches to learn from; expected at least one")
    return _Kept(*kept, history)
