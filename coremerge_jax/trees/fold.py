"""Updates folded into the kernels of a base model."""

import functools
import math
import string
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from coremerge_jax.errors import FormatError
from coremerge_jax.linalg.threads import processors
from coremerge_jax.lora import FLOATS, Adapter, Array, LoRA, widest
from coremerge_jax.merging.precision import are_traced
from coremerge_jax.trees.arrays import stack
from coremerge_jax.trees.kernels import Kernel, find_kernels
from coremerge_jax.trees.paths import Leaf, Tree, flatten, map_leaves

_Array = TypeVar("_Array", np.ndarray, jax.Array)


def fold_tree(
    params: Tree,
    adapter: Adapter,
    *,
    scan_axis: int | str | None = "auto",
    axes: Mapping[str, str] | None = None,
    scale: float = 1.0,
    donate: bool = False,
) -> Tree:
    """Returns the parameters of a base model with an adapter's updates in them.

    Sums are computed in float32 (with float64 kernels, in float64) and rounded once. NumPy arrays
    stay on the host; JAX arrays stay sharded as they are, and each device computes its part.

    Which axes of a kernel are its inputs is known from those of the factors, if the adapter, or one
    that it is a merge of, has been read from a tree where they are several. Else it is known from
    shapes: as in all JAX stacks, the first ones are where that fits, also if others would; else
    those that fit alone; else ``axes`` has to say.

    Args:
        params: any pytree of arrays, such as an `nnx.State`, with the names that `from_tree` gives
            the adapter's modules; `coremerge_jax.trees.translate` has other implementations' names.
        adapter: each of its modules must have a kernel in ``params``. A stack of layers may have
            some that the adapter does not change.
        scan_axis: 0 or 1, where stacked layers (or experts) are in a kernel; None for none;
            ``"auto"`` to find it from shapes.
        axes: by pattern of a module's path in the tree (as in `fnmatch`), the axes of its kernel, a
            letter each: ``i`` input, ``o`` output, ``l`` stacked layers or experts; such as
            ``"oio"`` for heads, inputs and head size.
        scale: multiplies the updates.
        donate: reuse the memory of JAX arrays in ``params``, which are gone then.

    Raises:
        MismatchError: a module has no kernel, or one of another shape.
        FormatError: which axes of a kernel are inputs, or layers, is not clear; a pattern of
            ``axes`` matches no module; or a NumPy kernel cannot hold the result.
        UnsupportedError: a kernel is quantized, or the adapter is more than low-rank updates.
    """
    kernels = find_kernels(flatten(params), adapter, scan_axis=scan_axis, axes=axes)

    def folded(key: str, leaf: Leaf) -> Leaf:
        kernel = kernels.get(key)
        if kernel is None:
            return leaf
        loras = adapter.read(kernel.modules)
        if isinstance(leaf, np.ndarray) and not are_traced((loras, scale)):
            copy = leaf.copy()
            for _ in fold_on_host(copy, kernel, loras, scale):
                pass
            return copy
        return _fold_on_device(leaf, kernel, loras, scale, donate)

    # Factors on the host, and the scale, have to reach the kernels' devices: no accident.
    with jax.transfer_guard("allow"):
        return map_leaves(folded, params)


def _fold_on_device(
    weight: Array, kernel: Kernel, loras: Mapping[str, LoRA], scale: float, donate: bool
) -> Array:
    rank = max(lora.rank for lora in loras.values())
    m, n = next(iter(loras.values())).shape
    unchanged = LoRA(a=np.zeros((0, n), np.float32), b=np.zeros((m, 0), np.float32))
    layers = [unchanged] * math.prod(kernel.sizes("l"))
    for path, place in kernel.modules.items():
        layers[place] = loras[path]
    wide = widest(*(x.dtype for x in jax.tree.leaves(layers)))
    a, b = stack([jax.tree.map(lambda x: x.astype(wide), lora) for lora in layers], rank)
    a = a.reshape(*kernel.sizes("l"), rank, *kernel.sizes("i"))
    b = b.reshape(*kernel.sizes("l"), *kernel.sizes("o"), rank)
    # One product with the axes of the kernel, so that it is sharded as the kernel is.
    names = string.ascii_uppercase[: len(kernel.axes)]
    batch, i, o = ("".join(names[axis] for axis in kernel.find(letter)) for letter in "lio")
    # Compilers choose a sharding of the result, if not given. A traced array's is theirs to choose.
    sharding = None if are_traced(weight) else getattr(weight, "sharding", None)
    if sharding is not None:
        a, b = (_move(x, sharding) for x in (a, b))
    program = _program(f"{batch}r{i},{batch}{o}r->{names}", sharding, donate)
    return program(weight, a, b, jnp.float32(scale))


def _move(x: Array, sharding: Sharding) -> Array:
    """Copies an array to each of the devices of a sharding, if it is on others."""
    if isinstance(x, np.ndarray) or are_traced(x) or x.sharding.device_set == sharding.device_set:
        return x
    if isinstance(sharding, NamedSharding):
        return jax.device_put(x, NamedSharding(sharding.mesh, PartitionSpec()))
    return jax.device_put(x, sharding) if sharding.is_fully_replicated else x


@functools.lru_cache
def _program(product: str, sharding: Sharding | None, donate: bool) -> Callable[..., jax.Array]:
    """Returns a program that adds a product of factors to a kernel."""

    def fold(weight: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
        wide = widest(np.dtype(np.float32), weight.dtype)
        update = jnp.einsum(
            product,
            a.astype(wide),
            b.astype(wide) * scale.astype(wide),
            precision=jax.lax.Precision.HIGHEST,
            out_sharding=jax.typeof(weight).sharding,
        )
        return _sum(weight, update)[0]

    return jax.jit(fold, out_shardings=sharding, donate_argnums=0 if donate else ())


def _sum(weight: _Array, update: _Array) -> tuple[_Array, _Array]:
    """Returns the sum, rounded once to the dtype of the weight, and the weight as it was added.

    Sums are computed in float32, or in the dtype of the weight if that is wider.
    """
    wide = weight.astype(widest(np.dtype(np.float32), weight.dtype))
    return (wide + update).astype(weight.dtype), wide


def fold_on_host(
    weight: np.ndarray, kernel: Kernel, loras: Mapping[str, LoRA], scale: float
) -> Iterator[tuple[str, float]]:
    """Adds updates to a kernel, in place; yields the rounding loss of each module.

    Raises:
        FormatError: the kernel's dtype cannot hold the result.
    """
    # Rows of a layer are the axes that change slowest in memory, inputs or outputs.
    transposed = kernel.axes.replace("l", "").startswith("i")
    order = "lio" if transposed else "loi"
    axes = sorted(range(weight.ndim), key=lambda axis: order.index(kernel.axes[axis]))
    layers = weight.transpose(axes)
    for path, place in kernel.modules.items():
        layer = layers[np.unravel_index(place, kernel.sizes("l"))]
        yield path, _add_to_layer(kernel.key, layer, loras[path], transposed, scale)


def _add_to_layer(key: str, layer: np.ndarray, lora: LoRA, transposed: bool, scale: float) -> float:
    unit = lora.shape[1 if transposed else 0] // len(layer)  # rows can be a part of an axis

    def read(start: int, stop: int) -> np.ndarray:
        return layer[start // unit : stop // unit].reshape(stop - start, -1)

    def write(start: int, rows: np.ndarray) -> None:
        part = layer[start // unit : (start + len(rows)) // unit]
        part[...] = rows.reshape(part.shape)

    return add_update(key, lora, read, write, transposed=transposed, unit=unit, scale=scale)


# Elements of a weight that are in memory at a time, a few times over: they fit into caches.
BLOCK = 2**18

# Values that overflow are found in the result, and refused.
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

    Several threads compute blocks; one of them at a time reads or writes.

    Args:
        name: of the weight, for messages.
        lora: the update.
        read: returns the rows from a first to before a last.
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
        if scale != 1:
            delta *= np.float32(scale)
        with lock:
            weight = read(start, start + len(delta))
        changed, rest = _add(weight, delta)
        lost = _square(rest)
        if not math.isfinite(lost):  # as it is wherever the result is not; this saves a pass
            _check_finite(name, changed)
        with lock:
            write(start, changed)
        return _square(delta), lost

    with ThreadPoolExecutor(processors()) as pool:
        norms, losses = zip(*pool.map(add_block, range(0, len(left), step)), strict=True)
    norm, lost = sum(norms), sum(losses)
    return (lost / norm) ** 0.5 if norm else 0.0


def _square(x: np.ndarray) -> float:
    """Returns the sum of squares, to half the digits of the dtype or better."""
    flat = x.reshape(-1)
    found = float(np.dot(flat, flat))  # much faster than in float64
    if 1e-30 < found < math.inf:
        return found
    return float(np.square(flat, dtype=np.float64).sum())


@_unwarned
def add(name: str, weight: np.ndarray, delta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the sum in the dtype of the weight, and what rounding took from the update.

    Raises:
        FormatError: the dtype cannot hold the sum, or it is not finite.
    """
    changed, rest = _add(weight, delta)
    _check_finite(name, changed)
    return changed, rest


def _add(weight: np.ndarray, delta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Does as `add`, without a check."""
    if weight.dtype != np.float16:
        return _rounded_sum(weight, delta)
    # NumPy converts float16 by software, much slower than a program of XLA.
    with jax.transfer_guard("allow"), jax.default_device(jax.local_devices(backend="cpu")[0]):
        changed, rest = _program_of_sum()(weight, delta)
        return np.asarray(changed), np.asarray(rest)


@functools.cache
def _program_of_sum() -> Callable[..., tuple[jax.Array, jax.Array]]:
    return jax.jit(_rounded_sum)


def _rounded_sum(weight: _Array, delta: _Array) -> tuple[_Array, _Array]:
    """Returns the sum in the dtype of the weight, and what rounding took from the update."""
    changed, wide = _sum(weight, delta)
    # In this order exact, but for updates larger than the weight.
    return changed, delta - (changed.astype(wide.dtype) - wide)


@_unwarned
def cast(name: str, value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Returns the values in another dtype.

    Raises:
        FormatError: it cannot hold them, or they are not finite.
    """
    changed = value.astype(dtype)
    _check_finite(name, changed)
    return changed


def _check_finite(name: str, value: np.ndarray) -> None:
    if value.dtype.name in FLOATS and not np.isfinite(value).all():
        raise FormatError(
            f"tensor {name!r}: the result has values that {value.dtype} cannot hold, or that are "
            "not finite; check base and adapter, or apply to a base in a wider dtype"
        )
