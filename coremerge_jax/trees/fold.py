"""Updates folded into the kernels of a base model."""

import functools
import math
import string
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from coremerge_jax.errors import FormatError
from coremerge_jax.linalg.threads import processors
from coremerge_jax.lora import FLOATS, Adapter, Array, LoRA, widest
from coremerge_jax.trees.adapters import flatten, key_of
from coremerge_jax.trees.axes import pad_rank
from coremerge_jax.trees.kernels import Kernel, find_kernels


def fold_tree(
    params: Any,
    adapter: Adapter,
    *,
    scan_axis: int | str | None = "auto",
    axes: Mapping[str, str] | None = None,
    scale: float = 1.0,
    donate: bool = False,
) -> Any:
    """Returns the parameters of a base model with an adapter's updates in them.

    Sums are computed in float32 (with float64 kernels, in float64) and rounded once. NumPy arrays
    stay on the host; JAX arrays stay sharded as they are, and each device computes its part.

    Which axes of a kernel are its inputs is known from those of the factors, if the adapter, or one
    that it is a merge of, has been read from a tree where they are several. Else it is known from
    shapes: as in all JAX stacks, the first ones are where that fits, also if others would; else
    those that fit alone; else ``axes`` has to say.

    Args:
        params: any pytree of arrays, such as an `nnx.State`, with the names that `from_tree` gives
            the adapter's modules; see `names` for other implementations' names.
        adapter: each of its modules must have a kernel in ``params``. A stack of layers may have
            some that the adapter does not change.
        scan_axis: 0 or 1, where stacked layers (or experts) are in a kernel; None for none;
            ``"auto"`` where shapes show it.
        axes: by pattern of a module's path in the tree (as in `fnmatch`), the axes of its kernel, a
            letter each: ``i`` input, ``o`` output, ``l`` stacked layers or experts; such as
            ``"oio"`` for heads, inputs and head size.
        scale: multiplies the updates.
        donate: reuse the memory of JAX arrays in ``params``, which are gone then.

    Raises:
        MismatchError: a module has no kernel, or one of another shape.
        FormatError: which axes of a kernel are inputs, or layers, cannot be told; a pattern of
            ``axes`` matches no module; or a NumPy kernel cannot hold the result.
        UnsupportedError: a kernel is quantized, or the adapter is more than low-rank updates.
    """
    kernels = find_kernels(flatten(params), adapter, scan_axis=scan_axis, axes=axes)

    def folded(path: tuple, leaf: Any) -> Any:
        kernel = kernels.get(key_of(path))
        if kernel is None:
            return leaf
        loras = adapter.read(kernel.modules)
        if isinstance(leaf, np.ndarray) and not _is_traced((loras, scale)):
            copy = leaf.copy()
            for _ in fold_on_host(copy, kernel, loras, scale):
                pass
            return copy
        return _fold(leaf, kernel, loras, scale, donate)

    # Factors on the host, and the scale, have to reach the kernels' devices: no accident.
    with jax.transfer_guard("allow"):
        return jax.tree_util.tree_map_with_path(folded, params)


def fold_on_host(
    weight: np.ndarray, kernel: Kernel, loras: Mapping[str, LoRA], scale: float
) -> Iterator[tuple[str, float]]:
    """Adds updates to a kernel, in place; gives the rounding loss of each module.

    Raises:
        FormatError: the kernel's dtype cannot hold the result.
    """
    rest = [axis for axis, letter in enumerate(kernel.axes) if letter != "l"]
    layers = weight.transpose([*kernel.find("l"), *rest])
    axes = kernel.axes.replace("l", "")
    for path, place in kernel.modules.items():
        layer = layers[np.unravel_index(place, kernel.sizes("l"))]
        yield path, _add_to_layer(kernel.key, layer, axes, loras[path], scale)


def _add_to_layer(key: str, layer: np.ndarray, axes: str, lora: LoRA, scale: float) -> float:
    # Rows are what changes slowest in memory, inputs or outputs; and a row may be part of an axis.
    ahead = layer.transpose(sorted(range(len(axes)), key=lambda axis: axes[axis] != axes[0]))
    transposed = axes.startswith("i")
    unit = lora.shape[1 if transposed else 0] // len(ahead)

    def read(start: int, stop: int) -> np.ndarray:
        return ahead[start // unit : stop // unit].reshape(stop - start, -1)

    def write(start: int, rows: np.ndarray) -> None:
        part = ahead[start // unit : (start + len(rows)) // unit]
        part[...] = rows.reshape(part.shape)

    return add_update(key, lora, read, write, transposed=transposed, unit=unit, scale=scale)


def _is_traced(tree: Any) -> bool:
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree))


def _fold(
    weight: Array, kernel: Kernel, loras: Mapping[str, LoRA], scale: float, donate: bool
) -> Array:
    rank = max(lora.rank for lora in loras.values())
    m, n = next(iter(loras.values())).shape
    unchanged = LoRA(a=np.zeros((0, n), np.float32), b=np.zeros((m, 0), np.float32))
    layers = [unchanged] * math.prod(kernel.sizes("l"))
    for path, place in kernel.modules.items():
        layers[place] = loras[path]
    on_host = all(isinstance(x, np.ndarray) for x in jax.tree.leaves(layers))
    xp: Any = np if on_host else jnp
    wide = widest(*(x.dtype for x in jax.tree.leaves(layers)))
    a = xp.stack([pad_rank(lora.a.astype(wide), -2, rank) for lora in layers])
    b = xp.stack([pad_rank(lora.b.astype(wide), -1, rank) for lora in layers])
    a = a.reshape(*kernel.sizes("l"), rank, *kernel.sizes("i"))
    b = b.reshape(*kernel.sizes("l"), *kernel.sizes("o"), rank)
    # One product with the axes of the kernel, so that it is sharded as the kernel is.
    names = string.ascii_uppercase[: len(kernel.axes)]
    batch, i, o = ("".join(names[axis] for axis in kernel.find(letter)) for letter in "lio")
    # Compilers choose a sharding of the result, if not told. A traced array's is theirs to choose.
    sharding = None if _is_traced(weight) else getattr(weight, "sharding", None)
    program = _program(f"{batch}r{i},{batch}{o}r->{names}", sharding, donate)
    return program(weight, a, b, jnp.float32(scale))


@functools.lru_cache
def _program(product: str, sharding: Any, donate: bool) -> Any:
    return jax.jit(
        functools.partial(_sum, product=product),
        out_shardings=sharding,
        donate_argnums=0 if donate else (),
    )


def _sum(weight: Array, a: Array, b: Array, scale: Array, *, product: str) -> Array:
    wide = widest(np.dtype(np.float32), weight.dtype)
    update = jnp.einsum(
        product,
        a.astype(wide),
        b.astype(wide) * scale.astype(wide),
        precision=jax.lax.Precision.HIGHEST,
        out_sharding=jax.typeof(weight).sharding,
    )
    return (weight.astype(wide) + update).astype(weight.dtype)


# Elements of a weight that are in memory at a time, a few times over: they fit into caches.
BLOCK = 2**18

# What overflows is found in the result, and refused.
_unwarned = np.errstate(over="ignore", invalid="ignore")


def add_update(
    name: str,
    lora: LoRA,
    read: Callable[[int, int], np.ndarray],
    write: Callable[[int, np.ndarray], None],
    *,
    transposed: bool = False,
    unit: int = 1,
    scale: float = 1.0,
) -> float:
    """Adds an update to a weight ``(m, n)`` that is read and written by blocks of rows.

    Blocks are computed by several threads, of which one at a time reads or writes.

    Args:
        name: of the weight, for messages.
        lora: the update.
        read: gives the rows from a first to before a last.
        write: takes the first row, and the rows to put there.
        transposed: whether the weight is ``(n, m)``.
        unit: blocks are of multiples of so many rows.
        scale: of the update.

    Returns:
        The rounding loss ``‖cast(W + ΔW) - (W + ΔW)‖ / ‖ΔW‖``: the share of the update that
        rounding to the dtype of the weight changed; 0 without an update.

    Raises:
        FormatError: the result does not fit into the dtype of the weight.
    """
    a, b = np.asarray(lora.a, np.float32), np.asarray(lora.b, np.float32)
    left, right = (a.T, b.T) if transposed else (b, a)
    step = unit * max(1, BLOCK // (unit * right.shape[1]))
    lock = threading.Lock()

    @_unwarned
    def add_block(start: int) -> tuple[float, float]:
        delta = left[start : start + step] @ right
        delta *= np.float32(scale)
        with lock:
            weight = read(start, start + len(delta))
        changed, rest = add(name, weight, delta)
        with lock:
            write(start, changed)
        return _square(delta), _square(rest)

    with ThreadPoolExecutor(processors()) as pool:
        norms, losses = zip(*pool.map(add_block, range(0, len(left), step)), strict=True)
    norm, lost = sum(norms), sum(losses)
    return (lost / norm) ** 0.5 if norm else 0.0


@_unwarned
def add(name: str, weight: np.ndarray, delta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the sum in the dtype of the weight, and what rounding took from the update.

    Raises:
        FormatError: see `cast`.
    """
    wide = weight.astype(widest(np.dtype(np.float32), weight.dtype))
    changed = cast(name, wide + delta, weight.dtype)
    # In this order exact, but for updates larger than the weight.
    return changed, delta - (changed.astype(wide.dtype) - wide)


@_unwarned
def cast(name: str, value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Returns the values in another dtype.

    Raises:
        FormatError: it cannot hold them, or they are not finite.
    """
    changed = value.astype(dtype)
    if dtype.name in FLOATS and not np.isfinite(changed).all():
        raise FormatError(
            f"tensor {name!r}: the result has values that {dtype} cannot hold, or that are not "
            "finite; check base and adapter, or apply to a base in a wider dtype"
        )
    return changed


def _square(x: np.ndarray) -> float:
    """Returns the sum of squares."""
    return float(np.square(x, dtype=np.float64).sum())
