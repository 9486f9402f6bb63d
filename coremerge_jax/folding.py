"""Adapters folded into the parameters of a model in memory: W + ΔW in each kernel's own layout."""

import itertools
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from coremerge_jax.errors import FormatError, MismatchError
from coremerge_jax.layouts.axes import Shape
from coremerge_jax.lora import Adapter, Array, LoRA
from coremerge_jax.trees import flatten, key_of, module_paths, nearest


def fold_tree(
    params: Any,
    adapter: Adapter,
    *,
    scan_axis: int | str | None = "auto",
    scale: float = 1.0,
    donate: bool = False,
) -> Any:
    """Parameters of a base model with an adapter's updates in them.

    Sums are computed in float32 and rounded once. Sharded parameters stay sharded as they are.

    Args:
        params: any pytree of arrays, such as an `nnx.State`, with the names that `from_tree` gives
            the adapter's modules; see `names` for other implementations' names.
        adapter: each of its modules must have a kernel in ``params``. Inputs are the kernel's
            first axes where that fits, else those that fit alone.
        scan_axis: 0 or 1, where stacked layers are in a kernel; ``"auto"`` where shapes show it.
        scale: multiplies the updates.
        donate: reuse the memory of JAX arrays in ``params``, which are gone then.

    Raises:
        MismatchError: a module has no kernel, or one of another shape.
        FormatError: which axes of a kernel are inputs, or layers, cannot be told.
    """
    leaves = flatten(params)
    places = {key: _places(key, leaf, adapter, scan_axis) for key, leaf in leaves.items()}
    found = {path for paths, _ in filter(None, places.values()) for path in paths}
    missing = [path for path in adapter if path not in found]
    if missing:
        raise MismatchError(
            f"no kernel for module {missing[0]!r}{nearest(missing[0], leaves)} ({len(missing)} of "
            f"{len(adapter)} modules)"
        )

    def folded(path: tuple, leaf: Any) -> Any:
        place = places[key_of(path)]
        if place is None:
            return leaf
        paths, order = place
        loras = adapter.read(paths)
        return _fold(leaf, [loras[p] for p in paths], order, scale, donate)

    return jax.tree_util.tree_map_with_path(folded, params)


# The axes of a kernel in the order batch, outputs, inputs; and how many are of the batch.
Order = tuple[tuple[int, ...], bool]


def _places(
    key: str, leaf: Any, adapter: Adapter, scan_axis: int | str | None
) -> tuple[tuple[str, ...], Order] | None:
    """The modules whose kernel this is, and its axes; None if it is no adapted kernel."""
    module, _, param = key.rpartition("/")
    shape: Shape = tuple(getattr(leaf, "shape", ()))
    outline = adapter.outline
    (path,) = module_paths(module, param, ())
    if path in outline:
        return (path,), (_axes(key, shape, outline[path]), False)
    axes = (0, 1) if scan_axis == "auto" else (scan_axis,)
    found = []
    for axis in axes:
        if not isinstance(axis, int) or axis >= len(shape):
            continue
        paths = module_paths(module, param, (shape[axis],))
        if all(path in outline for path in paths):
            rest = shape[:axis] + shape[axis + 1 :]
            order = _axes(key, rest, outline[paths[0]])
            found.append((paths, ((axis, *(k + (k >= axis) for k in order)), True)))
    if len(found) > 1:
        raise FormatError(
            f"{key}: layers of kernel {shape} can be stacked along axis 0 or 1; say which with "
            "scan_axis (--scan-axis)"
        )
    return found[0] if found else None


def _axes(key: str, shape: Shape, lora: LoRA) -> tuple[int, ...]:
    """The output axes, then the input axes, of a kernel ``shape``."""
    every = tuple(range(len(shape)))
    m, n = lora.shape
    if math.prod(shape) == m * n:
        for k in every:
            if math.prod(shape[:k]) == n and k > 0:
                return (*every[k:], *every[:k])
        fitting = [
            inputs
            for k in range(1, len(shape))
            for inputs in itertools.combinations(every, k)
            if math.prod(shape[i] for i in inputs) == n
        ]
        if len(fitting) == 1:
            return (*(i for i in every if i not in fitting[0]), *fitting[0])
        if fitting:
            raise FormatError(
                f"{key}: which axes of kernel {shape} are the {n} inputs is not clear"
            )
    raise MismatchError(f"{key}: kernel {shape} does not fit an update of {m} outputs, {n} inputs")


def _fold(leaf: Array, loras: list[LoRA], order: Order, scale: float, donate: bool) -> Array:
    a = [lora.a for lora in loras]
    b = [lora.b for lora in loras]
    if isinstance(leaf, np.ndarray):
        return np.asarray(_sum(np, leaf, a, b, order, scale))
    fold = jax.jit(partial(_sum, jnp, order=order), donate_argnums=0 if donate else ())
    return fold(leaf, a, b, scale=jnp.float32(scale))


def _sum(xp: Any, kernel: Array, a: list, b: list, order: Order, scale: Any) -> Array:
    axes, stacked = order
    shape = [kernel.shape[i] for i in axes]
    pairs = [(x.astype(xp.float32), y.astype(xp.float32)) for x, y in zip(a, b, strict=True)]
    updates = [_matmul(xp, y * xp.float32(scale) if xp is np else y * scale, x) for x, y in pairs]
    update = xp.stack(updates) if stacked else updates[0]
    update = update.reshape(shape).transpose(np.argsort(axes).tolist())
    return (kernel.astype(xp.float32) + update).astype(kernel.dtype)


def _matmul(xp: Any, b: Array, a: Array) -> Array:
    return b @ a if xp is np else jnp.matmul(b, a, precision=jax.lax.Precision.HIGHEST)
