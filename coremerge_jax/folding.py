"""Adapters folded into the parameters of a model in memory: W + ΔW in each kernel's own layout."""

import functools
import math
import string
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from coremerge_jax.addition import add_update
from coremerge_jax.kernels import Kernel, find_kernels
from coremerge_jax.layouts.axes import pad_rank
from coremerge_jax.lora import Adapter, Array, LoRA, widest
from coremerge_jax.trees import flatten, key_of


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
