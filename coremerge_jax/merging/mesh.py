"""Meshes of devices: their rows share modules, their columns the rows and columns of one module."""

import collections
import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from coremerge_jax.errors import RecipeError, UnsupportedError
from coremerge_jax.lora import Adapter, Array, LoRA


@dataclasses.dataclass(frozen=True)
class Devices:
    """A mesh of one or two axes, as a merge uses it.

    Modules are distributed over the first axis, without communication, as they are independent.
    Along the second axis, if there is one, every module is sharded: its A by columns, its B by
    rows.

    Raises:
        UnsupportedError: the mesh has more axes, or devices of some processes only.
    """

    mesh: Mesh

    def __post_init__(self) -> None:
        if len(self.mesh.axis_names) > 2:
            raise UnsupportedError(
                f"mesh with axes {self.mesh.axis_names}: expected one, for modules, or a second, "
                "for their rows and columns; make one of its devices: "
                "jax.sharding.Mesh(mesh.devices.reshape(...), ('modules', 'features'))"
            )
        there = self.processes
        if len(there) not in (1, jax.process_count()) or jax.process_index() not in there:
            raise UnsupportedError(
                f"mesh with devices of processes {sorted(there)}, in process "
                f"{jax.process_index()} of {jax.process_count()}: expected devices of this "
                "process, or of all"
            )

    @property
    def table(self) -> np.ndarray:
        """The devices, ``(rows, columns)``."""
        return self.mesh.devices.reshape(len(self.mesh.devices), -1)

    @property
    def rows(self) -> int:
        """The number of modules that are merged at once."""
        return self.table.shape[0]

    @property
    def columns(self) -> int:
        """The number of parts into which a module is split."""
        return self.table.shape[1]

    @property
    def axis(self) -> str | None:
        """The axis that single modules are sharded over; None if they are whole."""
        return self.mesh.axis_names[1] if self.columns > 1 else None

    @property
    def processes(self) -> dict[int, int]:
        """The number of devices by process, for the processes that have any."""
        return dict(collections.Counter(d.process_index for d in self.mesh.devices.flat))

    @property
    def is_default(self) -> bool:
        """True if the mesh is JAX's default device alone."""
        return self.mesh.devices.flat[0] == jax.local_devices()[0] and self.table.size == 1

    def local(self) -> "Devices":
        """Returns the mesh of the rows that this process has.

        Raises:
            UnsupportedError: a row has devices of several processes.
        """
        here = np.vectorize(lambda device: device.process_index == jax.process_index())
        mine = here(self.table)
        if (mine.any(axis=1) != mine.all(axis=1)).any():
            raise UnsupportedError(
                "mesh whose second axis leads from one process to another: adapters on the host "
                "or in files are read by the process that merges them; order the devices so that "
                "each row has those of one process"
            )
        return Devices(Mesh(self.mesh.devices[mine.all(axis=1)], self.mesh.axis_names))

    # --- Where factors are ---------------------------------------------------------------------

    @property
    def specs(self) -> tuple[P, P, P]:
        """Specs for stacks of A ``(L, R, n)``, of B ``(L, m, R)``, and of one value per module."""
        modules = self.mesh.axis_names[0]
        return P(modules, None, self.axis), P(modules, self.axis, None), P(modules)

    def place(self, a: Any, b: Any) -> tuple[Any, Any]:
        """Shards stacks over the devices, with n and m padded with zeros.

        Arrays that are on these devices already are moved directly between them.
        """
        a, b = self._pad(a, 2), self._pad(b, 1)
        if isinstance(a, jax.ShapeDtypeStruct):
            return a, b
        if isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer):
            return self._reshard(a, self.specs[0]), self._reshard(b, self.specs[1])
        shardings = [NamedSharding(self.mesh, spec) for spec in self.specs[:2]]
        return tuple(jax.device_put([a, b], shardings))

    def _pad(self, x: Any, axis: int) -> Any:
        missing = -x.shape[axis] % self.columns
        if not missing:
            return x
        if isinstance(x, jax.ShapeDtypeStruct):
            shape = [n + missing * (i == axis) for i, n in enumerate(x.shape)]
            return jax.ShapeDtypeStruct(shape, x.dtype)
        xp: Any = np if isinstance(x, np.ndarray) else jnp
        return xp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])

    def _reshard(self, x: Any, spec: P) -> Any:
        """Reshards an array in a traced function, where JAX does not do so itself."""
        if not _is_explicit(self.mesh):
            return x
        return jax.sharding.reshard(x, NamedSharding(self.mesh, spec))

    def take_apart(
        self, a: jax.Array, b: jax.Array, shape: tuple[int, int]
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """Returns the modules of stacks in a traced function, without padding."""
        m, n = shape
        return (
            [x[:, :n] for x in self._whole(a, 2, n)],
            [x[:m] for x in self._whole(b, 1, m)],
        )

    def _whole(self, x: jax.Array, axis: int, size: int) -> jax.Array:
        """Gathers an array over modules, and over features if padding has to be removed."""
        cut = x.shape[axis] != size
        if cut and not _is_explicit(self.mesh):
            return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, P()))
        spec = P(*[None if cut or i != axis else self.axis for i in range(3)])
        return self._reshard(x, spec)

    def map(self, fn: Callable, shared: Any, stacks: Any, specs: Any, out_specs: Any) -> Any:
        """Runs ``fn(shared, stacks)`` on each device, with its part of the stacks."""
        stacks = jax.tree.map(
            lambda spec, part: jax.tree.map(lambda x: self._reshard(x, spec), part),
            specs,
            stacks,
            is_leaf=lambda x: isinstance(x, P),
        )
        mapped = jax.shard_map(fn, mesh=self.mesh, in_specs=(P(), specs), out_specs=out_specs)
        return mapped(shared, stacks)


def is_host(x: Any) -> bool:
    """Returns True if a factor is on the host (or in a file), and not on a device or traced."""
    return not isinstance(x, jax.Array)


def refuse_explicit(factors: Sequence[Any]) -> None:
    """Refuses factors with explicit mesh axes in their types if no mesh was given.

    Raises:
        UnsupportedError: a factor has such a type.
    """
    for x in factors:
        spec = () if is_host(x) else jax.typeof(x).sharding.spec
        if any(spec):
            raise UnsupportedError(
                f"factors are sharded as {spec} over a mesh with explicit axes: say with mesh= "
                "which devices shall merge them"
            )


def implicit(adapter: Adapter) -> Adapter:
    """Returns an adapter whose types have no explicit mesh axes.

    Factors stay on their devices; the axes of their mesh become automatic.

    Raises:
        UnsupportedError: factors with explicit mesh axes are traced.
    """
    if not adapter.in_memory:
        return adapter
    typed = [x for x in jax.tree.leaves(dict(adapter)) if _is_typed(x)]
    if any(isinstance(x, jax.core.Tracer) for x in typed):
        refuse_explicit(typed)
    return jax.tree.map(_untyped, adapter) if typed else adapter


def placed_like(lora: LoRA, like: LoRA) -> LoRA:
    """Returns factors with the sharding of another LoRA of the same module, whatever its rank."""
    where = _without(like.a, 0), _without(like.b, 1)
    a, b = jax.device_put((lora.a, lora.b), where)
    return dataclasses.replace(lora, a=a, b=b)


def _is_typed(x: Any) -> bool:
    if is_host(x):
        return False
    return any(jax.typeof(x).sharding.spec)


def _untyped(x: Any) -> Any:
    if not _is_typed(x):
        return x
    mesh = Mesh(x.sharding.mesh.devices, x.sharding.mesh.axis_names)
    return jax.device_put(x, NamedSharding(mesh, x.sharding.spec))


def is_spread(x: Any) -> bool:
    """Returns True if an array is on devices of several processes."""
    is_traced = isinstance(x, jax.core.Tracer)
    return isinstance(x, jax.Array) and not is_traced and not x.is_fully_addressable


def fetched(x: Array) -> np.ndarray:
    """Returns an array on the host; what is spread over processes, in all of them."""
    if is_spread(x) and not x.is_fully_replicated:  # type: ignore[union-attr]
        return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def rows_like(a: jax.Array, b: jax.Array, like: Sequence[LoRA]) -> tuple[list, list]:
    """Returns the modules of stacks, each with the sharding of another LoRA of that module.

    Args:
        a: ``(L, r, n)``; n may be padded.
        b: ``(L, m, r)``; m may be padded.
        like: LoRAs of the modules, which may be fewer than L.
    """
    shapes = tuple(lora.shape for lora in like)
    places = [(_without(lora.a, 0), _without(lora.b, 1)) for lora in like]
    there = tuple(zip(*places, strict=True))
    every = NamedSharding(a.sharding.mesh, P())  # type: ignore[attr-defined]  # results of a mesh program
    near = all(_is_near(place, every) for pair in places for place in pair)
    out = there if near else ((every,) * len(like),) * 2
    return jax.device_put(_split(shapes, out)(a, b), there)


def _is_near(place: jax.sharding.Sharding, every: NamedSharding) -> bool:
    """Returns True if a program on all devices of a mesh can return results with this sharding."""
    if _is_explicit(every.mesh):
        return isinstance(place, NamedSharding) and place.mesh == every.mesh
    return place.device_set == every.device_set


def with_automatic_axes(function: Callable, *args: Any, spec: P | None = None) -> Any:
    """Calls a function for which XLA chooses shardings, whatever the types of its arguments say.

    Args:
        function: of all arrays that it needs: what has explicit mesh axes cannot be enclosed.
        *args: pytrees.
        spec: of its results on a mesh with explicit axes; replicated by default.
    """
    meshes = (jax.typeof(x).sharding.mesh for x in jax.tree.leaves(args))
    mesh = next(filter(_is_explicit, meshes), None)
    if mesh is None:
        return function(*args)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.sharding.auto_axes(function, out_sharding=spec or P())(*args)


def _is_explicit(mesh: Any) -> bool:
    return AxisType.Explicit in mesh.axis_types


@functools.lru_cache
def _split(shapes: tuple[tuple[int, int], ...], out: tuple) -> Callable:
    """Returns a program that splits stacks into modules and removes padding."""

    def split(a: jax.Array, b: jax.Array) -> tuple[tuple, tuple]:
        return (
            tuple(a[i, :, :n] for i, (_, n) in enumerate(shapes)),
            tuple(b[i, :m] for i, (m, _) in enumerate(shapes)),
        )

    if _is_explicit(out[0][0].mesh):
        return jax.jit(jax.sharding.auto_axes(split, out_sharding=out))
    return jax.jit(split, out_shardings=out)


def _without(factor: Any, axis: int) -> jax.sharding.Sharding:
    """Returns the sharding of a factor with the rank axis, whose length may differ, replicated."""
    sharding = factor.sharding
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec = [*sharding.spec, None, None][:2]
    spec[axis] = None
    return NamedSharding(sharding.mesh, P(*spec))


def make_mesh(shape: str | None) -> Mesh | None:
    """Makes a mesh of all devices, of shape ``ROWS`` or ``ROWSxCOLUMNS``; by default one column.

    Returns:
        The mesh; None where there is one device.

    Raises:
        RecipeError: the text has another form, or there is another number of devices.
    """
    devices = np.asarray(jax.devices())
    sizes = [len(devices)]
    if shape is not None:
        if not re.fullmatch(r"[1-9]\d{0,8}(x[1-9]\d{0,8})?", shape):
            raise RecipeError(f"mesh must be like 8 or 4x2, got {shape!r:.60}")
        sizes = [int(size) for size in shape.split("x")]
    if np.prod(sizes) != len(devices):
        raise RecipeError(
            f"mesh {shape} has {np.prod(sizes)} devices, but there are {len(devices)} "
            f"({devices[0].device_kind})"
        )
    names = ("modules", "features")[: len(sizes)]
    return Mesh(devices.reshape(sizes), names) if len(devices) > 1 else None
