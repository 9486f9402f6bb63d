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

from coremerge_jax.errors import MismatchError
from coremerge_jax.extras import merge_extras
from coremerge_jax.lora import Adapter, Array, Kind, LoRA, Metadata
from coremerge_jax.merging import check_compatible, common_metadata, module_scales
from coremerge_jax.precision import computing
from coremerge_jax.rules import Chain, Ties, as_rule, chain
from coremerge_jax.spaces import Projection, Space, core
from coremerge_jax.stack import Group, group_modules, over_modules


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
        extras: tensors that are not low-rank updates, already merged.
        order: the paths of the modules in the order of the adapters.
        adapters: how many there are.
        metadata: of what is merged.
    """

    stacks: tuple[Stack, ...]
    extras: dict[str, jax.Array]
    order: tuple[str, ...] = flax.struct.field(pytree_node=False)
    adapters: int = flax.struct.field(pytree_node=False)
    metadata: Metadata = flax.struct.field(pytree_node=False)

    def merge(
        self,
        rule: Any,
        *,
        weights: Array | Sequence[float] | Mapping[str, Array] | None = None,
        scale: Any = 1.0,
        key: jax.Array | None = None,
    ) -> Adapter:
        """Merges, by one compiled program for all rules that differ in numbers alone.

        Args:
            rule: as in `coremerge_jax.merge`; a `ties` with ``scope="model"`` is refused.
            weights: ``(T,)``, multiply the adapters' cores before the rule; or such weights by
                path, for some modules. (Those of `coremerge_jax.merge` multiply the adapters before
                they are projected, which is the same unless the rule is elementwise.)
            scale: as in `coremerge_jax.merge`.
            key: as in `coremerge_jax.merge`.

        Raises:
            MismatchError: there is not one weight per adapter, or no module of a name.
            ValueError: the rule cannot be used here.
        """
        parts = chain(as_rule(rule))
        if any(isinstance(part, Ties) and part.scope == "model" for part in parts.rules):
            raise ValueError(f"{parts!r} trims over all modules at once; call merge instead")
        if parts.needs_key and key is None:
            raise ValueError(f"{parts!r} draws random numbers: pass key=jax.random.key(seed)")
        scales = dict(zip(self.order, module_scales(self.order, scale), strict=True))
        modules: dict[str, LoRA] = {}
        with self._computing():
            for stack in self.stacks:
                dtype = jax.tree.leaves(stack.projection.factors)[0].dtype
                given = self._weights(stack, weights, dtype)
                factor = jnp.stack([jnp.asarray(scales[path], dtype) for path in stack.paths])
                a, b = _merge_stack(parts, stack, given, factor, key)
                for i, (path, kind) in enumerate(zip(stack.paths, stack.kinds, strict=True)):
                    modules[path] = LoRA(a=a[i], b=b[i], kind=kind)
        ordered = {path: modules[path] for path in self.order}
        return Adapter(ordered, metadata=self.metadata, extras=self.extras)

    def _computing(self) -> Any:
        leaves = jax.tree.leaves(self.stacks)
        if any(isinstance(x, jax.core.Tracer) for x in leaves):
            return contextlib.nullcontext()
        return computing(str(jax.tree.leaves(self.stacks[0].projection.factors)[0].dtype))

    def _weights(self, stack: Stack, weights: Any, dtype: Any) -> jax.Array | None:
        """``(L, T)``, of the adapters that have the modules."""
        if weights is None:
            return None
        ones = jnp.ones(self.adapters, dtype)
        if isinstance(weights, Mapping):
            unknown = [path for path in weights if path not in self.order]
            if unknown:
                raise MismatchError(f"weights of {unknown[0]!r}: there is no such module")
            rows = [jnp.asarray(weights.get(path, ones), dtype) for path in stack.paths]
        else:
            rows = [jnp.asarray(weights, dtype)] * len(stack.paths)
        for row in rows:
            if row.shape != (self.adapters,):
                raise MismatchError(
                    f"weights of shape {row.shape} for {self.adapters} adapters; expected one each"
                )
        return jnp.take_along_axis(jnp.stack(rows), stack.tasks, axis=1)


def project(
    adapters: Sequence[Adapter],
    *,
    space: Space | None = None,
    elementwise: bool = True,
    precision: str | None = None,
    extras: str = "error",
    allow_mismatch: bool = False,
) -> Projected:
    """Brings all modules of adapters into a merge space.

    Args:
        adapters: as in `merge`.
        space: as in `merge`.
        elementwise: whether rules that look at single entries will be used; if not, cheaper
            coordinates do.
        precision: as in `merge`. With ``"float32"`` the result can be an argument of a function
            that is compiled without JAX's x64 mode.
        extras: as in `merge`.
        allow_mismatch: as in `merge`.

    Raises:
        MismatchError: the adapters do not belong together.
        UnsupportedError: adapters have extras and no policy for them was given.
    """
    if not adapters:
        raise MismatchError("no adapters to project; expected at least one")
    if not allow_mismatch:
        check_compatible(adapters)
    merged_extras, config = merge_extras(adapters, extras)
    outlines = [adapter.outline for adapter in adapters]
    leaves = [x for x in jax.tree.leaves(outlines) if isinstance(x, jax.core.Tracer)]
    stacks = []
    with computing(precision, *leaves) as dtype:
        for group in group_modules(adapters):
            a, b = group.stack(adapters)
            found = _project(a, b, space or core(), group.ranks, dtype, elementwise)
            stacks.append(_stack(group, outlines, *found, (a.dtype, b.dtype)))
    return Projected(
        stacks=tuple(stacks),
        extras={name: jnp.asarray(value) for name, value in merged_extras.items()},
        order=tuple(dict.fromkeys(path for adapter in outlines for path in adapter)),
        adapters=len(adapters),
        metadata=common_metadata(adapters, config),
    )


def _stack(
    group: Group,
    outlines: Sequence[Adapter],
    projection: Projection,
    kept: jax.Array,
    dtypes: tuple,
) -> Stack:
    names = [zlib.crc32(path.encode()) for path in group.paths]
    firsts = zip(group.paths, group.tasks, strict=True)
    return Stack(
        projection=projection,
        tasks=jnp.asarray(group.tasks),
        names=jnp.asarray(np.asarray(names, np.uint32)),
        paths=group.paths,
        kinds=tuple(outlines[tasks[0]][path].kind for path, tasks in firsts),
        keeps_a=not isinstance(kept, jax.core.Tracer) and bool(np.asarray(kept).all()),
        dtypes=dtypes,
    )


@partial(jax.jit, static_argnames=("space", "ranks", "dtype", "elementwise"))
def _project(
    a: jax.Array,
    b: jax.Array,
    space: Space,
    ranks: tuple[int, ...],
    dtype: Any,
    elementwise: bool,
) -> tuple[Projection, jax.Array]:
    """The modules in the space, and whether their merges can have the A of the adapters."""

    def one(pair: tuple[jax.Array, jax.Array]) -> tuple[Projection, jax.Array]:
        found = space.project(*pair, ranks, dtype=dtype, elementwise=elementwise)
        return found, jnp.asarray(found.keeps_a)

    return over_modules(one, (a, b))


@jax.jit
def _merge_stack(
    rule: Chain,
    stack: Stack,
    weights: jax.Array | None,
    scale: jax.Array,
    key: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """The merged A and B of each module."""

    def one(row: tuple) -> tuple[jax.Array, jax.Array]:
        projection, tasks, name, weight, factor = row
        if weight is not None:
            projection = projection.weighted(weight)
        lora = projection.merge(
            rule,
            key=None if key is None else jax.random.fold_in(key, name),
            tasks=tasks,
            keep_a=True if stack.keeps_a else None,
        )
        scaled = jnp.asarray(lora.b).astype(factor.dtype) * factor
        return jnp.asarray(lora.a).astype(stack.dtypes[0]), scaled.astype(stack.dtypes[1])

    rows = (stack.projection, stack.tasks, stack.names, weights, scale)
    return over_modules(one, rows)
