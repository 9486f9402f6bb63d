"""Stacks: the factors of a group's modules, batched along a leading axis."""

import math
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from coremerge_jax.linalg import in_loop
from coremerge_jax.lora import AdapterSource, Array, widest
from coremerge_jax.merging.groups import Group


def stacked_shapes(
    group: Group, outlines: Sequence[AdapterSource]
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Returns the shapes and dtypes of the results of `stack_factors`."""
    pairs = zip(group.paths, group.tasks, strict=True)
    loras = [outlines[t][path] for path, tasks in pairs for t in tasks]
    (m, n), length, rank = group.shape, group.length, sum(group.ranks)
    return (
        jax.ShapeDtypeStruct((length, rank, n), widest(*{x.a.dtype for x in loras})),
        jax.ShapeDtypeStruct((length, m, rank), widest(*{x.b.dtype for x in loras})),
    )


def stack_factors(
    group: Group, adapters: Sequence[AdapterSource], scratch: "Scratch | None" = None
) -> tuple[Array, Array]:
    """Reads and stacks the factors of all adapters.

    Args:
        group: the modules.
        adapters: T of them.
        scratch: memory for the stacked B; new memory by default.

    Returns:
        The A of the adapters below each other, ``(L, R, n)``, and their B side by side,
        ``(L, m, R)``. NumPy arrays if all factors are.
    """
    paths: dict[int, list[str]] = {}
    for path, tasks in zip(group.paths, group.tasks, strict=True):
        for t in tasks:
            paths.setdefault(t, []).append(path)
    read = {t: adapters[t].read(paths[t]) for t in paths}
    pairs = zip(group.paths, group.tasks, strict=True)
    rows = group.padded([[read[t][path] for t in tasks] for path, tasks in pairs])
    a, b = [[x.a for x in row] for row in rows], [[x.b for x in row] for row in rows]
    return _pile(a, 0, _empty), _pile(b, 1, scratch.empty if scratch else _empty)


class Scratch(threading.local):
    """Memory that each thread reuses for its stacks, as the system is slow to give new memory."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Returns an array that is valid until the next call in this thread."""
        size = math.prod(shape) * dtype.itemsize
        if size > self._memory.size:
            self._memory = _empty((size,), np.dtype(np.uint8))
        return self._memory[:size].view(dtype).reshape(shape)


def over_modules(fn: Callable, arrays: Any) -> Any:
    """Maps ``fn`` over modules: in a loop on CPU, where that takes less memory, else at once."""
    if jax.default_backend() != "cpu":
        return jax.vmap(fn)(arrays)
    return jax.lax.map(in_loop(fn), arrays)


def _pile(rows: list[list[Array]], axis: int, empty: Callable) -> Array:
    """Joins the factors of each module along the rank axis and stacks the modules."""
    flat = [x for row in rows for x in row]
    dtype = widest(*{x.dtype for x in flat})
    if not all(isinstance(x, np.ndarray) for x in flat):
        return _pile_on_device(rows, axis, dtype)
    shape = list(rows[0][0].shape)
    shape[axis] = sum(x.shape[axis] for x in rows[0])
    piled = empty((len(rows), *shape), dtype)
    for out, row in zip(piled, rows, strict=True):
        np.concatenate(row, axis=axis, out=out, casting="unsafe")
    return piled


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns memory so aligned that JAX on CPU uses it in place; other memory is copied first."""
    size, alignment = math.prod(shape) * dtype.itemsize, 64
    memory = np.empty(size + alignment, np.uint8)
    start = -memory.ctypes.data % alignment
    return memory[start : start + size].view(dtype).reshape(shape)


@partial(jax.jit, static_argnames=("axis", "dtype"))
def _pile_on_device(rows: list[list[jax.Array]], axis: int, dtype: np.dtype) -> jax.Array:
    return jnp.stack([jnp.concatenate([x.astype(dtype) for x in row], axis=axis) for row in rows])
