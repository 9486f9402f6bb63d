"""Coefficients learned from the adapters' own predictions on unlabelled inputs."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from coremerge_jax.lora import Adapter, widest
from coremerge_jax.merging.auto_scale import given_scale
from coremerge_jax.merging.checks import check_whole
from coremerge_jax.merging.projected import Projected
from coremerge_jax.rules import Chain, as_rule, chain, task_arithmetic
from coremerge_jax.search.descent import Batch, Judge
from coremerge_jax.search.fitting import Fit, learn, mean_loss
from coremerge_jax.search.losses import Likeness, likeness, ratio
from coremerge_jax.search.parameters import MergeRule
from coremerge_jax.search.teachers import (
    Inputs,
    Lesson,
    Reader,
    as_projected,
    mean_over_tasks,
    measures_of,
)

RATE = 0.08
"""Learning rate, as a share of the coefficients' natural size."""


def distill(
    forward: Callable[..., jax.Array],
    adapters: Sequence[Adapter] | Projected,
    rule: MergeRule,
    inputs: Inputs,
    *,
    params: Any = None,
    validation: Inputs = (),
    per: str | Sequence[str] = "module",
    loss: str | Likeness = "kl",
    temperature: float = 1.0,
    mask: Callable[[Batch], jax.Array] | None = None,
    teachers: Sequence[Adapter] | None = None,
    steps: int = 40,
    initial: float | Sequence[float] | None = None,
    optimizer: optax.GradientTransformation | None = None,
    every: int = 10,
    patience: int = 10,
    key: jax.Array | None = None,
    progress: bool = False,
) -> Fit:
    """Learns coefficients of a merge that make it predict like each adapter, without labels.

    The merge is Σ_t c_t D_t for each module, with the shares D_t that the adapters have in the
    rule's merge (`Projected.pieces`): a step decomposes nothing, and costs one pass forward and
    backward for a batch of each task. The loss is the mean over tasks of KL(adapter ‖ merge), and
    80 inputs a task are enough, 8 in a batch. The adapters' predictions are computed once, before.

    Args:
        forward: function of an adapter and a batch that returns logits ``(..., classes)`` (or
            embeddings) and is differentiable by JAX.
        adapters: the adapters to merge; or `project` of them, which also fixes the space, weights,
            precision and statistics of inputs. Not their pieces.
        rule: `mean`, `task_arithmetic`, `tsv` or `regmean`, and steps before it.
        inputs: for each adapter, in their order, a list of batches of unlabelled inputs of its own
            task: pytrees of arrays, as ``forward`` takes them. Tasks may have batches of other
            shapes, with their own heads and classes in them; those of one task should have one
            shape. Step i takes the i-th batch of each task, and begins again after the last.
        params: parameters of the model, any pytree of arrays. If given, it is called as
            ``forward(params, adapter, batch)``. Arrays that ``forward`` closes over become
            constants of the compiled program, which large ones should not.
        validation: further inputs, in the same form, on which the agreement of predictions (and if
            equal, KL) decides when to stop and which coefficients are kept; for another loss than
            ``"kl"``, its mean. Without any, the last coefficients are kept.
        per: groups of modules that share a coefficient of each adapter, as in `fit`.
        loss: ``"kl"``; ``"cosine"``, 1 - the cosine of embeddings; or a function of predictions and
            of the adapter's, ``(..., classes)`` both, that returns a number for each position,
            ``(...)``.
        temperature: divides the logits of both in ``"kl"``.
        mask: function of a batch that returns weights of the positions, ``(...)``: 0 for padding.
        teachers: adapters to learn from, one for each task; by default, the adapters as they were
            projected. Needed if the adapters have extras, such as heads of their own.
        steps: number of steps.
        initial: coefficients to start from: one, or one per adapter; by default, the
            automatic scale of ``merge``.
        optimizer: an optimizer of optax; by default Adam (0.9, 0.95), with a learning rate of 0.08
            of that number, which falls to 0 by a cosine.
        every: steps between two evaluations of the validation inputs.
        patience: number of evaluations in a row without improvement after which to stop.
        key: PRNG key, for rules that draw random numbers.
        progress: True to show progress on stderr, where that is a terminal.

    Returns:
        The merge and its coefficients: it is ``projected.pieces(rule)``, merged by
        `task_arithmetic` with ``weights`` and scale 1.

    Raises:
        FormatError: the loss, or an adapter's own predictions, are not finite.
        MismatchError: there are not inputs of each adapter, a pattern matches no module, or there
            is not one initial coefficient per adapter.
        RecipeError: an argument is of another kind, or the adapters have extras and there are no
            teachers.
        UnsupportedError: the rule is no sum of shares, or needs statistics.
    """
    check_whole("steps", steps, 1)
    measure = likeness(loss, temperature)
    reader, parts = Reader(forward, params, mask), chain(as_rule(rule))
    projected = as_projected(adapters, teachers)
    pieces = projected.pieces(parts, key=key)
    size = natural_size(parts, projected, key)
    lessons = reader.teach(projected, inputs, teachers)
    judge = None
    if len(validation):
        asked = reader.teach(projected, validation, teachers)
        judge = _judge(reader, asked, None if loss != "kl" else temperature, measure)
    return learn(
        _loss(reader, measure),
        pieces,
        chain(task_arithmetic()),
        _batches(params, lessons, steps),
        judge=judge,
        per=per,
        initial=size if initial is None else initial,
        optimizer=optimizer or _adam(RATE * size, steps),
        every=every,
        patience=patience,
        key=None,
        progress=progress,
    )


def _adam(rate: float, steps: int) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(rate, steps), b1=0.9, b2=0.95)


def natural_size(rule: Chain, projected: Projected, key: jax.Array | None) -> float:
    """Returns the automatic scale of a merge: of the modules that most adapters have."""
    most = max(stack.tasks.shape[1] for stack in projected.stacks)
    if (known := given_scale(rule, most)) is not None:
        return known
    scales = projected.auto_scales(projected.updates(rule, key=key))
    return float(scales[max(scales, key=lambda kind: (kind[0], not kind[1]))])


def _batches(
    params: Any, lessons: Sequence[Sequence[Lesson]], steps: int
) -> Iterator[tuple[Any, list[Lesson]]]:
    for step in range(steps):
        yield params, [task[step % len(task)] for task in lessons]


def _loss(reader: Reader, measure: Likeness) -> Callable[[Adapter, Any], jax.Array]:
    """Returns the loss of a merge, and of parameters with a lesson of each task."""

    def loss(merged: Adapter, batch: tuple[Any, list[Lesson]]) -> jax.Array:
        params, lessons = batch

        def of_task(adapter: Adapter, lesson: Lesson) -> jax.Array:
            sums, count = reader.compare({"loss": measure}, params, adapter, lesson)
            return ratio(sums["loss"], count) / len(lessons)

        return sum_over(of_task, merged, lessons)

    return loss


def sum_over(
    term: Callable[[Adapter, Any], jax.Array], merged: Adapter, lessons: Sequence[Any]
) -> jax.Array:
    """Returns the sum of a term over lessons, with its derivative by the merged adapter.

    Lessons of equal shapes share one compiled body. The derivatives are taken one lesson after
    another, so that memory need hold the activations of one.

    Args:
        term: function of an adapter and a lesson.
        merged: the adapter.
        lessons: pytrees.
    """
    extras, own = merged.extras, merged.replace(extras={})
    fixed = jax.lax.stop_gradient(own)

    def slope(adapter: Adapter, lesson: Any) -> tuple[jax.Array, Adapter]:
        return jax.value_and_grad(lambda x: term(x.replace(extras=extras), lesson))(adapter)

    def add(total: Any, lesson: Any) -> tuple[Any, None]:
        found = slope(fixed, lesson)
        return jax.tree.map(lambda x, y: x + y.astype(x.dtype), total, found), None

    def zeros(x: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.zeros(x.shape, widest(x.dtype, np.dtype(np.float32)))

    total = jax.tree.map(zeros, jax.eval_shape(slope, fixed, lessons[0]))
    for alike in _alike(lessons):
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *alike)
        total, _ = jax.lax.scan(add, total, stacked)
    value, slopes = total

    def change(slope: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.sum(slope * (x - y).astype(slope.dtype)).astype(value.dtype)

    # Adds a linear function that is 0 here, and has these derivatives.
    return jax.tree.reduce(jnp.add, jax.tree.map(change, slopes, own, fixed), value)


def _alike(lessons: Sequence[Any]) -> list[list[Any]]:
    """Groups lessons that have one tree and equal shapes."""
    found: dict[Any, list[Any]] = {}
    for lesson in lessons:
        leaves, tree = jax.tree.flatten(lesson)
        kind = tree, tuple((jnp.shape(x), jnp.result_type(x)) for x in leaves)
        found.setdefault(kind, []).append(lesson)
    return list(found.values())


def _judge(
    reader: Reader,
    lessons: Sequence[Sequence[Lesson]],
    temperature: float | None,
    measure: Likeness,
) -> Judge:
    """Returns a judge by agreement and KL at a temperature; or, without one, by the loss."""
    measures = {"validation": measure} if temperature is None else measures_of(temperature)

    def compare(merged: Adapter, batch: tuple[Any, Lesson]) -> Any:
        params, lesson = batch
        return reader.compare(measures, params, merged, lesson)

    def summarize(found: list[Any]) -> tuple[dict[str, float], tuple[float, ...]]:
        rest = iter(found)
        means = mean_over_tasks([[next(rest) for _ in task] for task in lessons])
        if temperature is None:
            return mean_loss([means["validation"]])
        return means, (-means["agreement"], means["kl"])

    batches = [(reader.params, lesson) for task in lessons for lesson in task]
    return Judge(compare, batches, summarize)
