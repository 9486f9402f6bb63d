"""Adapters in a merge space: projected once, to be merged many times."""

import contextlib
import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from coremerge_jax.errors import MismatchError, RecipeError
from coremerge_jax.lora import Adapter, Array, Kind, LoRA, Metadata
from coremerge_jax.merging.checks import (
    as_adapters,
    as_space,
    as_weights,
    check_rule,
    common_metadata,
    module_scales,
    present_adapters,
    refuse_values,
)
from coremerge_jax.merging.extras import merge_extras
from coremerge_jax.merging.groups import Group, group_modules, label, over_modules
from coremerge_jax.merging.mesh import implicit
from coremerge_jax.merging.precision import computing
from coremerge_jax.merging.program import Settings, project_module
from coremerge_jax.rules import Chain, as_rule, chain, ties
from coremerge_jax.spaces import Projection, Space

# The merged A and B of each stack, not yet scaled and rounded: see `Projected.updates`.
Updates = list[tuple[jax.Array, jax.Array]]


@flax.struct.dataclass
class Stack:
    """Modules of one signature in a merge space; arrays have them along their first axis.

    Attributes:
        projection: the updates.
        tasks: int32 ``(L, T)``, which adapters have the modules.
        names: uint32 ``(L,)``, hashes of the paths.
        paths: of the modules.
        kinds: of the modules.
        keeps_a: whether merged factors have the A factors of the adapters.
        dtypes: of the merged A and B.
    """

    projection: Projection
    tasks: jax.Array
    names: jax.Array
    paths: tuple[str, ...] = flax.struct.field(pytree_node=False)
    kinds: tuple[Kind, ...] = flax.struct.field(pytree_node=False)
    keeps_a: bool = flax.struct.field(pytree_node=False)
    dtypes: tuple[np.dtype, np.dtype] = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Projected:
    """Adapters in a merge space, see `project`. A pytree.

    Attributes:
        stacks: all modules.
        space: where they are.
        extras: tensors that are not low-rank updates, already merged.
        order: the paths of the modules in the order of the adapters.
        adapters: how many there are, those of weight 0 included.
        metadata: of what is merged.
    """

    stacks: tuple[Stack, ...]
    extras: dict[str, Array]
    space: Space = flax.struct.field(pytree_node=False)
    order: tuple[str, ...] = flax.struct.field(pytree_node=False)
    adapters: int = flax.struct.field(pytree_node=False)
    metadata: Metadata = flax.struct.field(pytree_node=False)

    @property
    def dtype(self) -> np.dtype:
        """The dtype in which merges are computed."""
        return jax.tree.leaves(self.stacks[0].projection.factors)[0].dtype

    def astype(self, dtype: Any) -> "Projected":
        """Returns the same, to be merged in another precision."""
        with computing(str(np.dtype(dtype)), *jax.tree.leaves(self.stacks)):
            stacks = jax.tree.map(
                lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x,
                self.stacks,
            )
        return self.replace(stacks=stacks)  # type: ignore[attr-defined]

    def merge(
        self,
        rule: Any,
        *,
        weights: Any = None,
        scale: Any = 1.0,
        key: jax.Array | None = None,
    ) -> Adapter:
        """Merges, by one compiled program for all rules that differ in numbers alone.

        Args:
            rule: as in `coremerge_jax.merge`; a `ties` with ``scope="model"`` is refused.
            weights: ``(T,)``, multiply the adapters' cores before the rule; or such weights by
                path, for some modules. (Those of `project` multiply the adapters before they are
                projected, which is the same unless the rule is elementwise.)
            scale: as in `coremerge_jax.merge`.
            key: as in `coremerge_jax.merge`.

        Raises:
            MismatchError: there is not one weight per adapter, or no module of a name; or the
                merged update overflows.
            RecipeError: the rule cannot be used here, or a parameter is out of range.
        """
        return self.adapter(self.updates(rule, weights=weights, key=key), scale)

    def updates(self, rule: Any, *, weights: Any = None, key: jax.Array | None = None) -> Updates:
        """Computes merged updates before scaling, so that many scales can share them."""
        parts = chain(as_rule(rule))
        key = check_rule(parts, key, self.adapters)
        if any(isinstance(part, ties) and part.scope == "model" for part in parts.rules):
            raise RecipeError(f"{parts!r} trims over all modules at once; use merge instead")
        self._check_weights(weights)
        with self._computing():
            return [
                _merge_stack(parts, stack, self._weights(stack, weights), key)
                for stack in self.stacks
            ]

    def adapter(self, updates: Updates, scale: Any = 1.0) -> Adapter:
        """Makes an adapter of merged updates. Factors are NumPy arrays unless they are traced."""
        scales = dict(zip(self.order, module_scales(self.order, scale), strict=True))
        modules: dict[str, LoRA] = {}
        for stack, update in zip(self.stacks, updates, strict=True):
            with self._computing():
                factors = jnp.stack([jnp.asarray(scales[x], self.dtype) for x in stack.paths])
                a, b, peaks = _finish_stack(*update, factors, stack.dtypes)
                if not isinstance(b, jax.core.Tracer):
                    a, b, peaks = jax.device_get((a, b, peaks))
                    self._check_finite(stack, peaks)
            for path, kind, x, y in zip(stack.paths, stack.kinds, a, b, strict=True):
                modules[path] = LoRA(a=x, b=y, kind=kind)
        ordered = {path: modules[path] for path in self.order}
        return Adapter(ordered, metadata=self.metadata, extras=self.extras)

    def _check_finite(self, stack: Stack, peaks: np.ndarray) -> None:
        for path, peak in zip(stack.paths, peaks, strict=True):
            if not np.isfinite(peak):
                raise MismatchError(
                    f"module {path!r}: the merged update overflows {stack.dtypes[1]}; choose "
                    "smaller weights or scale"
                )

    def norms(self) -> np.ndarray:
        """Returns ``(T,)``, the Frobenius norm of each adapter in the space, over all modules."""
        squares = np.zeros(self.adapters)
        for stack in self.stacks:
            with self._computing():
                found = np.asarray(_squares(stack.projection))
            np.add.at(squares, np.asarray(stack.tasks), found)
        return np.sqrt(squares)

    def _check_weights(self, weights: Any) -> None:
        if not isinstance(weights, Mapping):
            as_weights(weights, self.adapters)
            return
        for path, row in weights.items():
            if path not in self.order:
                raise MismatchError(f"weights of {path!r}: there is no such module")
            as_weights(row, self.adapters, f"weights of {path!r}")

    def _computing(self) -> Any:
        leaves = jax.tree.leaves(self.stacks)
        if any(isinstance(x, jax.core.Tracer) for x in leaves):
            return contextlib.nullcontext()
        return computing(str(self.dtype))

    def _weights(self, stack: Stack, weights: Any) -> jax.Array | None:
        """Returns ``(L, T)``, of the adapters that have the modules."""
        if weights is None:
            return None
        ones = jnp.ones(self.adapters, self.dtype)
        if isinstance(weights, Mapping):
            rows = [jnp.asarray(weights.get(path, ones), self.dtype) for path in stack.paths]
        else:
            rows = [jnp.asarray(weights, self.dtype)] * len(stack.paths)
        return jnp.take_along_axis(jnp.stack(rows), stack.tasks, axis=1)


def project(
    adapters: Sequence[Adapter],
    *,
    space: Space | None = None,
    weights: Sequence[float] | Array | None = None,
    elementwise: bool = True,
    precision: str | None = None,
    extras: str = "error",
    allow_mismatch: bool = False,
) -> Projected:
    """Brings all modules of adapters into a merge space, for many merges.

    Args:
        adapters: as in `merge`.
        space: as in `merge`.
        weights: as in `merge`.
        elementwise: whether rules that look at single entries will be used; if not, cheaper
            coordinates do.
        precision: as in `merge`.
        extras: as in `merge`.
        allow_mismatch: as in `merge`.

    Raises:
        FormatError: a factor has NaN or infinite values.
        MismatchError: the adapters do not belong together.
        RecipeError: an argument is of another kind, or not finite.
        UnsupportedError: adapters have extras and no policy for them was given; or factors are
            traced, and sharded as their types say.
    """
    adapters = [implicit(adapter) for adapter in as_adapters(adapters)]
    space, weights = as_space(space), as_weights(weights, len(adapters))
    tasks = present_adapters(adapters, weights, allow_mismatch)
    present = [adapters[t] for t in tasks]
    merged_extras, config = merge_extras(present, extras)
    outlines = [adapter.outline for adapter in present]
    leaves = jax.tree.leaves((outlines, weights))
    stacks = []
    with computing(precision, *(x for x in leaves if isinstance(x, jax.core.Tracer))) as dtype:
        for group in group_modules(present):
            places = np.asarray(tasks, np.int32)[group.tasks]
            given = None if weights is None else jnp.asarray(weights, dtype)[places]
            a, b = group.stack(present)
            settings = Settings(group.ranks, space, dtype, group.shape)
            projection, kept, finite = _project_stack((a, b), given, settings, elementwise)
            if not isinstance(finite, jax.core.Tracer) and not jax.device_get(finite).all():
                refuse_values(present, group.paths, label)
                raise MismatchError(
                    f"modules such as {group.paths[0]!r}: finite factors overflow in products; "
                    "scale the adapters down"
                )
            kinds = [outlines[i[0]][x].kind for x, i in zip(group.paths, group.tasks, strict=True)]
            stacks.append(_stack(group, places, kinds, projection, kept, (a.dtype, b.dtype)))
    return Projected(
        stacks=tuple(stacks),
        space=space,
        extras=merged_extras,
        order=tuple(dict.fromkeys(path for adapter in outlines for path in adapter)),
        adapters=len(adapters),
        metadata=common_metadata(present, config),
    )


def _stack(
    group: Group,
    places: np.ndarray,
    kinds: Sequence[Kind],
    projection: Projection,
    kept: jax.Array,
    dtypes: tuple[np.dtype, np.dtype],
) -> Stack:
    names = [zlib.crc32(path.encode()) for path in group.paths]
    return Stack(
        projection=projection,
        tasks=jnp.asarray(places),
        names=jnp.asarray(np.asarray(names, np.uint32)),
        paths=group.paths,
        kinds=tuple(kinds),
        keeps_a=not isinstance(kept, jax.core.Tracer) and bool(np.asarray(kept).all()),
        dtypes=dtypes,
    )


@partial(jax.jit, static_argnames=("settings", "elementwise"))
def _project_stack(
    factors: tuple[Array, Array], weights: jax.Array | None, settings: Settings, elementwise: bool
) -> tuple[Projection, jax.Array, jax.Array]:
    """Projects modules; returns also if merges can have the adapters' A, and if all is finite."""

    def one(row: tuple) -> tuple[Projection, jax.Array, jax.Array]:
        (a, b), weights = row
        found = project_module(a, b, weights, settings, elementwise=elementwise)
        peaks = [jnp.max(jnp.abs(x)) for x in (a, b, *jax.tree.leaves(found.factors))]
        finite = jnp.all(jnp.stack([jnp.isfinite(peak) for peak in peaks]))
        return found, jnp.asarray(found.keeps_a), finite

    return over_modules(one, (factors, weights))


@jax.jit
def _merge_stack(
    rule: Chain, stack: Stack, weights: jax.Array | None, key: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Returns the merged A and B of each module, in the precision that is computed in."""

    def one(row: tuple) -> tuple[jax.Array, jax.Array]:
        projection, tasks, name, weight = row
        if weight is not None:
            projection = projection.weighted(weight)
        lora = projection.merge(
            rule,
            key=None if key is None else jax.random.fold_in(key, name),
            tasks=tasks,
            keep_a=True if stack.keeps_a else None,
        )
        return jnp.asarray(lora.a), jnp.asarray(lora.b)

    return over_modules(one, (stack.projection, stack.tasks, stack.names, weights))


@partial(jax.jit, static_argnames="dtypes")
def _finish_stack(
    a: jax.Array, b: jax.Array, factors: jax.Array, dtypes: tuple[np.dtype, np.dtype]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the factors as they are given out, and the largest magnitude in each B."""
    scaled = b.astype(factors.dtype) * factors[:, None, None]
    of_a, of_b = map(jax.dtypes.canonicalize_dtype, dtypes)
    scaled = scaled.astype(of_b)
    return a.astype(of_a), scaled, jnp.max(jnp.abs(scaled), axis=(1, 2)).astype(jnp.float32)


@jax.jit
def _squares(projection: Projection) -> jax.Array:
    return over_modules(lambda one: one.squares, projection)
