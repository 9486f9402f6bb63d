"""Predictions of the adapters themselves, which a merge of them is compared with."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from coremerge_jax.errors import FormatError, MismatchError, RecipeError
from coremerge_jax.lora import Adapter
from coremerge_jax.merging.checks import as_adapters, check_function
from coremerge_jax.merging.projected import Projected, project
from coremerge_jax.rules import task_arithmetic
from coremerge_jax.search.descent import Batch
from coremerge_jax.search.losses import Likeness, likeness, weighted_sums
from coremerge_jax.text import short

# A batch, and the predictions of the task's own adapter.
Lesson = tuple[Batch, Any]

# The batches of each task.
Inputs = Sequence[Sequence[Batch]]


@dataclasses.dataclass(frozen=True)
class Reader:
    """A user's model.

    Attributes:
        forward: function of an adapter and a batch; of parameters, too, if there are any.
        params: the parameters, or None.
        mask: function of a batch, that returns the weight of each position; None for 1.
    """

    forward: Callable[..., jax.Array]
    params: Any = None
    mask: Callable[[Batch], jax.Array] | None = None

    def __post_init__(self) -> None:
        check_function("forward", self.forward)
        if self.mask is not None:
            check_function("mask", self.mask)

    def predict(self, params: Any, adapter: Adapter, batch: Batch) -> jax.Array:
        """Returns predictions ``(..., classes)``.

        Raises:
            RecipeError: ``forward`` gives something else than such an array.
        """
        given = (adapter, batch) if params is None else (params, adapter, batch)
        found = self.forward(*given)
        if not isinstance(found, jax.Array) or found.ndim < 1:
            what = f"shape {found.shape}" if isinstance(found, jax.Array) else short(found)
            raise RecipeError(f"forward gave {what}; expected an array of JAX, (..., classes)")
        return found

    def compare(
        self, measures: Mapping[str, Likeness], params: Any, adapter: Adapter, lesson: Lesson
    ) -> tuple[dict[str, jax.Array], jax.Array]:
        """Returns sums of measures over the positions of a batch, and the sum of their weights.

        Raises:
            RecipeError: a measure or the mask gives other shapes than it should.
        """
        batch, teacher = lesson
        found, teacher = self.predict(params, adapter, batch), jnp.asarray(teacher)
        weights = None if self.mask is None else jnp.asarray(self.mask(batch))
        sums = {}
        for name, measure in measures.items():
            values = measure(found, teacher)
            if not isinstance(values, jax.Array) or values.shape != found.shape[:-1]:
                what = f"shape {values.shape}" if isinstance(values, jax.Array) else short(values)
                raise RecipeError(
                    f"{name}: gave {what} for predictions {found.shape}; expected a number for "
                    f"each position, {found.shape[:-1]}"
                )
            sums[name], count = weighted_sums(values, weights)
        return sums, count

    def teach(
        self, projected: Projected, inputs: Inputs, teachers: Sequence[Adapter] | None
    ) -> list[list[Lesson]]:
        """Returns the batches of each task with the predictions of its own adapter, on the host.

        Raises:
            FormatError: predictions are not finite.
            MismatchError: there are not inputs of each task, or not as many teachers as tasks.
            RecipeError: there must be teachers, as the adapters have extras; or the inputs are no
                lists of batches.
        """
        predict = jax.jit(self.predict)
        lessons = []
        for t, batches in enumerate(as_inputs(inputs, projected.adapters, "inputs")):
            adapter = own_adapter(projected, t) if teachers is None else teachers[t]
            with jax.transfer_guard("allow"):
                found = [jax.device_get(predict(self.params, adapter, x)) for x in batches]
            if any(np.isnan(np.asarray(x, np.float32)).any() for x in found):
                raise FormatError(
                    f"adapter {t} itself predicts NaN on its inputs; check forward and the inputs"
                )
            lessons.append(list(zip(batches, found, strict=True)))
        return lessons


def as_projected(
    adapters: Sequence[Adapter] | Projected, teachers: Sequence[Adapter] | None
) -> Projected:
    """Returns the projected adapters.

    Raises:
        MismatchError: there are not as many teachers as adapters.
        RecipeError: there are no teachers, and the adapters have extras.
    """
    projected = adapters if isinstance(adapters, Projected) else project(adapters)
    if teachers is not None and len(as_adapters(teachers)) != projected.adapters:
        raise MismatchError(
            f"{len(teachers)} teachers for {projected.adapters} adapters; expected one each"
        )
    if teachers is None and projected.extras:
        raise RecipeError(
            f"the adapters have tensors that are merged, as {next(iter(projected.extras))!r}, and "
            "for their own predictions need their own; give the adapters as teachers=[...]"
        )
    return projected


def own_adapter(projected: Projected, task: int) -> Adapter:
    """Returns one of the projected adapters, with all modules and paths that a merge has."""
    weights = np.eye(projected.adapters)[task]
    return projected.merge(task_arithmetic(), weights=weights, scale=1.0)


def as_inputs(inputs: Inputs, tasks: int, name: str) -> Inputs:
    """Returns the inputs of each task as they are.

    Raises:
        MismatchError: there are not as many tasks, or one has no inputs.
        RecipeError: they are no lists of batches.
    """
    if not _is_list(inputs):
        raise RecipeError(f"{name}: expected a list of batches for each task, got {short(inputs)}")
    if len(inputs) != tasks:
        raise MismatchError(
            f"{name} of {len(inputs)} tasks for {tasks} adapters; expected a list of batches for "
            "each adapter, in their order"
        )
    for t, batches in enumerate(inputs):
        if not _is_list(batches):
            raise RecipeError(f"{name}[{t}]: expected a list of batches, got {short(batches)}")
        if not batches:
            raise MismatchError(f"{name}[{t}]: no batches of this task; expected at least one")
    return inputs


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def agree(logits: jax.Array, teacher: jax.Array) -> jax.Array:
    """Returns 1 where both predict the same class, and 0 elsewhere: ``(...)``, float32."""
    return (jnp.argmax(logits, axis=-1) == jnp.argmax(teacher, axis=-1)).astype(jnp.float32)


def agreement(
    forward: Callable[..., jax.Array],
    adapters: Sequence[Adapter] | Projected,
    inputs: Inputs,
    *,
    params: Any = None,
    mask: Callable[[Batch], jax.Array] | None = None,
    temperature: float = 1.0,
    teachers: Sequence[Adapter] | None = None,
) -> Callable[[Adapter], dict[str, float]]:
    """Makes a function that compares a merge with each adapter's own predictions.

    It is meant as ``evaluate`` of `sweep` and `masks`, where there are no labels: ``"agreement"``
    is the first metric, and so what decides. The adapters' predictions are computed here, once.

    It measures likeness to the adapters, and not accuracy. It fails where these are poor
    themselves: where an adapter is wrong on many of its inputs, a merge that is right counts as
    worse. It also needs inputs of each adapter's own task. On the demo it chose the same scale as
    labels for four of six rules, and one that is 2.8 points worse for `tsv`.

    Args:
        forward: as in `distill`.
        adapters: those that are merged, or `project` of them.
        inputs: as in `distill`.
        params: as in `distill`.
        mask: as in `distill`.
        temperature: of ``"kl"``.
        teachers: as in `distill`.

    Returns:
        A function from a merged adapter to ``{"agreement": share, "kl": nats}``, means over tasks:
        the share of positions at which merge and adapter predict the same class, and
        KL(adapter ‖ merge).

    Raises:
        FormatError: an adapter's own predictions are not finite.
        MismatchError: there are not inputs of each adapter.
        RecipeError: an argument is of another kind, or adapters have extras and there are no
            teachers.
    """
    reader = Reader(forward, params, mask)
    measures = measures_of(temperature)
    lessons = reader.teach(as_projected(adapters, teachers), inputs, teachers)
    compare = jax.jit(partial(reader.compare, measures))

    def evaluate(merged: Adapter) -> dict[str, float]:
        with jax.transfer_guard("allow"):
            found = [[compare(params, merged, x) for x in task] for task in lessons]
            return mean_over_tasks(jax.device_get(found))

    return evaluate


def measures_of(temperature: float) -> dict[str, Likeness]:
    """Returns what `agreement` measures."""
    return {"agreement": agree, "kl": likeness("kl", temperature)}


def mean_over_tasks(found: Sequence[Sequence[tuple[dict[str, Any], Any]]]) -> dict[str, float]:
    """Returns means over tasks of means over positions, from sums for each task and batch."""
    counts = [float(sum(count for _, count in task)) for task in found]
    sums = {
        name: [float(sum(batch[name] for batch, _ in task)) for task in found]
        for name in found[0][0][0]
    }
    return {
        name: float(np.mean([x / y if y else 0.0 for x, y in zip(totals, counts, strict=True)]))
        for name, totals in sums.items()
    }
