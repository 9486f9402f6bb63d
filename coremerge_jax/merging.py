"""Merging adapters: a space and a rule over all modules."""

import dataclasses
import fnmatch
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from coremerge_jax.errors import MismatchError
from coremerge_jax.extras import merge_extras
from coremerge_jax.linalg import matmul
from coremerge_jax.lora import Adapter, Array, LoRA, Metadata, widest
from coremerge_jax.precision import computing
from coremerge_jax.rules import Chain, Context, Equivariance, Rule, Ties, TiesAbove, as_rule, chain
from coremerge_jax.spaces import Projection, Space, core
from coremerge_jax.stack import Stack, label, stack_adapters


def merge(
    adapters: Sequence[Adapter],
    rule: Rule | Callable[[jax.Array], jax.Array],
    *,
    space: Space | None = None,
    weights: Sequence[float] | Array | None = None,
    scale: float | Mapping[str, float] = 1.0,
    key: jax.Array | None = None,
    precision: str | None = None,
    extras: str = "error",
    allow_mismatch: bool = False,
) -> Adapter:
    """Merges adapters of one base model into one adapter.

    Modules of equal signature are merged together by one compiled program. A module that only
    some adapters have is merged from those. May be called inside a jitted or differentiated
    function with traced factors.

    Args:
        adapters: at least one.
        rule: how to merge, see `coremerge_jax.rules`; or a function ``(T, p, q) -> (p, q)``.
        space: where to merge, see `coremerge_jax.spaces`; core space by default. Linear rules give
            the same in every space and are computed without any.
        weights: one per adapter, multiplies its updates before anything else. An adapter of
            weight 0 counts as absent.
        scale: multiplies the merged updates. A mapping from patterns (as in `fnmatch`) of module
            paths to scales takes, for each module, the first pattern that matches, else 1.
        key: PRNG key, for rules that draw random numbers.
        precision: ``"float64"`` or ``"float32"`` for the computation. By default float64, except
            on TPU and for traced factors, which keep their precision (at least float32). JAX's
            global x64 switch is neither needed nor changed.
        extras: what to do with tensors that are not low-rank updates: ``"error"``, ``"first"``,
            ``"mean"`` or ``"keep=NAME"``.
        allow_mismatch: merge also adapters that name different base models or share no module.

    Returns:
        The merged adapter, its rank at most the sum of the ranks (and at most m and n). Factors
        have the widest dtype of the sources', and are NumPy arrays where all of theirs are.

    Raises:
        MismatchError: the adapters do not belong together.
        UnsupportedError: adapters have extras and no policy for them was given.
        ValueError: a parameter is out of range.
    """
    parts = chain(as_rule(rule))
    space = space or core()
    if not adapters:
        raise MismatchError("no adapters to merge; expected at least one")
    check_weights(parts, weights, len(adapters))
    if parts.needs_key and key is None:
        raise ValueError(f"{parts!r} draws random numbers: pass key=jax.random.key(seed)")
    tasks = [t for t in range(len(adapters)) if not _is_zero(weights, t)]
    if not tasks:
        raise MismatchError("all weights are 0: nothing to merge")
    present = [adapters[t] for t in tasks]
    if not allow_mismatch:
        check_compatible(present)
    merged_extras, config = merge_extras(present, extras)

    stacks = list(stack_adapters(present))
    paths = [path for stack in stacks for path in stack.paths]
    scales = dict(zip(paths, module_scales(paths, scale), strict=True))
    modules: dict[str, LoRA] = {}
    factors = [x for stack in stacks for x in (stack.a, stack.b)]
    traced = [x for x in jax.tree.leaves((parts, weights, scale)) if _is_traced(x)]
    with computing(precision, *factors, *traced) as dtype:
        inputs = [_inputs(stack, tasks, weights, scales, dtype) for stack in stacks]
        settings = [_Settings(stack.ranks, space, dtype) for stack in stacks]
        if any(isinstance(part, Ties) and part.scope == "model" for part in parts.rules):
            parts = _with_thresholds(parts, inputs, settings, len(adapters), key)
        for stack, arrays, fixed in zip(stacks, inputs, settings, strict=True):
            a, b = stack.like(*_merge_stack(parts, arrays, key, fixed))
            for i, path in enumerate(stack.paths):
                kind = next(adapter[path].kind for adapter in present if path in adapter)
                modules[path] = LoRA(a=a[i], b=b[i], kind=kind)
    return Adapter(
        {path: modules[path] for adapter in present for path in adapter},
        metadata=_metadata(present, config),
        extras=merged_extras,
    )


@flax.struct.dataclass
class _Inputs:
    """What one compiled program maps over: each field has the modules along its first axis."""

    a: jax.Array  # (L, R, n)
    b: jax.Array  # (L, m, R)
    weights: jax.Array  # (L, T)
    tasks: jax.Array  # (L, T), places in the list that the user gave
    names: jax.Array  # (L,), hashes of the paths
    scale: jax.Array  # (L,)


class _Settings(NamedTuple):
    """What one compiled program is compiled for."""

    ranks: tuple[int, ...]
    space: Space
    dtype: Any


def _inputs(
    stack: Stack, tasks: list[int], weights: Any, scales: Mapping[str, Any], dtype: Any
) -> _Inputs:
    places = np.asarray(tasks, np.int32)[stack.tasks]
    if weights is None:
        weights = np.ones(max(tasks) + 1)
    return _Inputs(
        a=jnp.asarray(stack.a),
        b=jnp.asarray(stack.b),
        weights=jnp.asarray(weights, dtype)[places],
        tasks=places,  # concrete, inside a user's jit too
        names=jnp.asarray([zlib.crc32(path.encode()) for path in stack.paths], jnp.uint32),
        scale=jnp.stack([jnp.asarray(scales[path], dtype) for path in stack.paths]),
    )


def _over_modules(fn: Callable, arrays: _Inputs) -> Any:
    # LAPACK works through a batch one by one on a CPU; a loop does the same in less memory.
    if jax.default_backend() == "cpu":
        return jax.lax.map(fn, arrays)
    return jax.vmap(fn)(arrays)


@partial(jax.jit, static_argnames="settings")
def _merge_stack(
    rule: Chain, arrays: _Inputs, key: jax.Array | None, settings: _Settings
) -> tuple[jax.Array, jax.Array]:
    def merge_module(module: _Inputs) -> tuple[jax.Array, jax.Array]:
        if rule.equivariance == Equivariance.LINEAR:
            lora = _merge_linear(rule, module, settings)
        else:
            projection = _project(rule, module, settings)
            lora = projection.merge(rule, key=_module_key(key, module), tasks=module.tasks)
        a, b = jnp.asarray(lora.a), jnp.asarray(lora.b) * module.scale
        return a.astype(arrays.a.dtype), b.astype(arrays.b.dtype)

    return _over_modules(merge_module, arrays)


def _module_key(key: jax.Array | None, module: _Inputs) -> jax.Array | None:
    return None if key is None else jax.random.fold_in(key, module.names)


def _project(rule: Chain, module: _Inputs, settings: _Settings) -> Projection:
    ranks, space, dtype = settings
    finest = widest(module.a.dtype, np.dtype(np.float32))
    return space.project(
        module.a.astype(dtype),
        module.b.astype(dtype) * _by_rank(module.weights, ranks)[None, :],
        ranks,
        eps=float(jnp.finfo(finest).eps),
        elementwise=rule.equivariance == Equivariance.ELEMENTWISE,
    )


def _merge_linear(rule: Chain, module: _Inputs, settings: _Settings) -> LoRA:
    """A weighted sum needs no space: its coefficients go to the factors."""
    ranks, _, dtype = settings
    tasks = len(ranks)
    units = jnp.eye(tasks, dtype=dtype)[:, None, :]
    context = Context(shape=jnp.asarray(units.shape[1:], jnp.int32), tasks=module.tasks)
    coefficients = rule(units, context=context)[0] * module.weights
    a = module.a.astype(dtype)
    b = module.b.astype(dtype) * _by_rank(coefficients, ranks)[None, :]
    m, n = b.shape[0], a.shape[1]
    if sum(ranks) <= min(m, n):
        return LoRA(a=a, b=b)
    update = matmul(b, a)
    if n <= m:
        return LoRA(a=jnp.eye(n, dtype=dtype), b=update)
    return LoRA(a=update, b=jnp.eye(m, dtype=dtype))


def _by_rank(values: jax.Array, ranks: tuple[int, ...]) -> jax.Array:
    """Repeats one value per adapter for each of its ranks: ``(T,)`` to ``(R,)``."""
    return jnp.repeat(values, np.asarray(ranks), total_repeat_length=sum(ranks))


def _with_thresholds(
    rule: Chain,
    inputs: list[_Inputs],
    settings: list[_Settings],
    adapters: int,
    key: jax.Array | None,
) -> Chain:
    """Finds the trimming thresholds of a model-wide `ties`, over the cores of all modules."""
    ties = rule.reducer
    assert isinstance(ties, Ties)
    magnitudes: list[list[jax.Array]] = [[] for _ in range(adapters)]
    sizes = [jnp.zeros((), jnp.int32)] * adapters
    for arrays, fixed in zip(inputs, settings, strict=True):
        cores, shapes = _prepare_stack(rule, arrays, key, fixed)
        for module, row in enumerate(np.asarray(arrays.tasks)):
            for t, task in enumerate(row):
                magnitudes[task].append(jnp.abs(cores[module, t]).ravel())
                sizes[task] += shapes[module, 0] * shapes[module, 1]
    thresholds = [
        ties.threshold(jnp.concatenate(parts), size) if parts else jnp.zeros(())
        for parts, size in zip(magnitudes, sizes, strict=True)
    ]
    fitted = TiesAbove(ties=ties, thresholds=jnp.stack(thresholds))
    return dataclasses.replace(rule, reducer=fitted)


@partial(jax.jit, static_argnames="settings")
def _prepare_stack(
    rule: Chain, arrays: _Inputs, key: jax.Array | None, settings: _Settings
) -> tuple[jax.Array, jax.Array]:
    """The cores ``(L, T, p, q)`` as the rule that merges gets them, and their shapes."""

    def prepare(module: _Inputs) -> tuple[jax.Array, jax.Array]:
        projection = _project(rule, module, settings)
        context = Context(shape=projection.shape, tasks=module.tasks)
        cores = rule.prepare(projection.cores, key=_module_key(key, module), context=context)
        return cores, projection.shape

    return _over_modules(prepare, arrays)


def _is_zero(weights: Any, t: int) -> bool:
    if weights is None or _is_traced(weights):
        return False
    return not _is_traced(weights[t]) and float(weights[t]) == 0


def _is_traced(x: Any) -> bool:
    return isinstance(x, jax.core.Tracer)


def check_weights(rule: Chain, weights: Any, adapters: int) -> None:
    """Checks that there is one weight per adapter, for `merge` and for the rule.

    Raises:
        MismatchError: naming the number of weights and of adapters.
    """
    own = [getattr(part, "weights", None) for part in rule.rules]
    for given in (weights, *own):
        if given is not None and len(given) != adapters:
            raise MismatchError(f"{len(given)} weights for {adapters} adapters; expected one each")


def check_compatible(adapters: Sequence[Adapter]) -> None:
    """Checks that adapters belong to one base model, as far as they tell.

    Raises:
        MismatchError: two name different base models, or one shares no module with the others.
    """
    bases: dict[str, int] = {}
    for t, adapter in enumerate(adapters):
        if adapter.metadata.base_model:
            bases.setdefault(adapter.metadata.base_model.rstrip("/"), t)
    if len(bases) > 1:
        (x, i), (y, j) = list(bases.items())[:2]
        raise MismatchError(
            f"{label(adapters, i)} was trained on base model {x!r}, {label(adapters, j)} on {y!r};"
            " if they are the same model, allow it with allow_mismatch (--allow-mismatch)"
        )
    for t, adapter in enumerate(adapters):
        others = [other for other in adapters if other is not adapter]
        if others and not any(path in other for other in others for path in adapter):
            raise MismatchError(
                f"{label(adapters, t)} has no module in common with the others (its first is "
                f"{next(iter(adapter))!r}, theirs {next(iter(others[0]))!r}); if that is meant, "
                "allow it with allow_mismatch (--allow-mismatch)"
            )


def module_scales(paths: Sequence[str], scale: float | Mapping[str, float]) -> list[Any]:
    """The scale of each module.

    Raises:
        MismatchError: a pattern matches no module.
    """
    if not isinstance(scale, Mapping):
        return [scale] * len(paths)
    for pattern in scale:
        if not fnmatch.filter(paths, pattern):
            raise MismatchError(
                f"scale pattern {pattern!r} matches no module; module paths look like {paths[0]!r}"
            )
    return [next((scale[p] for p in scale if fnmatch.fnmatchcase(path, p)), 1.0) for path in paths]


def _metadata(adapters: Sequence[Adapter], config: Mapping[str, Any]) -> Metadata:
    def common(field: str) -> Any:
        values = {getattr(adapter.metadata, field) for adapter in adapters} - {None}
        return values.pop() if len(values) == 1 else None

    base = next((a.metadata.base_model for a in adapters if a.metadata.base_model), None)
    return Metadata(base_model=base, task_type=common("task_type"), config=config)
