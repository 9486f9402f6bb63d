"""Arrays of a tree: stacked to one rank, resharded, and put where others are on devices."""

import math
from collections.abc import Sequence
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from coremerge_jax.lora import Array, LoRA
from coremerge_jax.merging.mesh import is_spread
from coremerge_jax.trees.axes import Shape
from coremerge_jax.trees.paths import Leaf, Tree


def numpy_or_jax(tree: Tree) -> ModuleType:
    """Returns NumPy if all leaves are on the host, else `jax.numpy`."""
    return np if all(isinstance(x, np.ndarray) for x in jax.tree.leaves(tree)) else jnp


def stack(loras: Sequence[LoRA], rank: int) -> tuple[Array, Array]:
    """Returns updates as ``(L, rank, n)`` and ``(L, m, rank)``; zeros fill up smaller ranks."""
    xp = numpy_or_jax(loras)
    return (
        xp.stack([_pad(lora.a, -2, rank) for lora in loras]),
        xp.stack([_pad(lora.b, -1, rank) for lora in loras]),
    )


def _pad(x: Array, axis: int, size: int) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = 0, size - x.shape[axis]
    return numpy_or_jax(x).pad(x, widths) if any(widths[axis]) else x


def gather_stack(x: Array, letters: str) -> Array:
    """Reshards an array with a typed sharding, so that its layers and axes can be taken apart.

    Of axes that become one, the first can stay sharded.
    """
    if not isinstance(x, jax.Array):
        return x
    typed = jax.typeof(x).sharding
    if not any(typed.spec):
        return x
    spec = [
        names if letter not in "le" and letters.index(letter) == axis else None
        for axis, (letter, names) in enumerate(zip(letters, typed.spec, strict=True))
    ]
    if not isinstance(x, jax.core.Tracer):
        typed = x.sharding  # with a mesh of devices
    return jax.sharding.reshard(x, NamedSharding(typed.mesh, PartitionSpec(*spec)))


def place_like(x: Array, leaf: Leaf) -> Array:
    """Puts an array where another one is on devices; not if that is on the host, or either traced.

    An axis of another length stays spread over the same devices where these divide it.
    """
    if isinstance(x, jax.core.Tracer) or isinstance(leaf, jax.core.Tracer):
        return x
    if not isinstance(leaf, jax.Array):
        return x
    if not leaf.committed and leaf.is_fully_addressable:
        return jnp.asarray(x) if isinstance(x, np.ndarray) else x
    sharding = _for_shape(leaf.sharding, x.shape)
    if sharding.is_fully_addressable or is_spread(x):
        return jax.device_put(x, sharding)
    host = np.asarray(x)  # each process has all of it
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _for_shape(sharding: Sharding, shape: Shape) -> Sharding:
    """Returns a sharding without the mesh axes that do not divide a shape."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    sizes = sharding.mesh.shape
    spec = []
    for n, names in zip(shape, sharding.spec, strict=False):
        several = names if isinstance(names, tuple) else (names,)
        parts = math.prod(sizes[name] for name in several if name in sizes)
        spec.append(names if n % parts == 0 else None)
    if spec == list(sharding.spec):
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*spec), memory_kind=sharding.memory_kind)
