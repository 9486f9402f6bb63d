"""Packs: adapters that are prepared once for many merges, of any of them by any rule."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from coremerge_jax.errors import MismatchError, RecipeError, UnsupportedError, unknown
from coremerge_jax.linalg import basis, inverse, roundoff
from coremerge_jax.lora import Adapter, AdapterSource, is_traced
from coremerge_jax.merging.batches import map_batches, split_groups
from coremerge_jax.merging.belonging import present_adapters
from coremerge_jax.merging.checks import as_adapters, refuse_values
from coremerge_jax.merging.groups import Group, group_modules, label
from coremerge_jax.merging.packed import Coordinates, PackedAdapter
from coremerge_jax.merging.precision import computing
from coremerge_jax.merging.stacks import over_modules, stack_factors
from coremerge_jax.rules import chain, tsv
from coremerge_jax.spaces.core import core


class Pack(Sequence[PackedAdapter]):
    """Adapters in one order, each with a name, prepared for merges.

    All that takes adapters takes a pack, or some of its adapters, and merges them with the work
    that the pack has done once. `pack` makes one, and `open_pack` reads one from a folder.

    Args:
        adapters: of one pack.

    Attributes:
        names: of the adapters.

    Raises:
        MismatchError: there are no adapters.
    """

    def __init__(self, adapters: Sequence[PackedAdapter]) -> None:
        if not adapters:
            raise MismatchError("a pack of no adapters; expected at least one")
        self._adapters = tuple(adapters)
        self.names = tuple(str(adapter.metadata.name) for adapter in adapters)

    @overload
    def __getitem__(self, which: int | str) -> PackedAdapter: ...

    @overload
    def __getitem__(self, which: slice) -> "Pack": ...

    def __getitem__(self, which: int | str | slice) -> "PackedAdapter | Pack":
        """Returns an adapter by its place or name, or some of them."""
        if isinstance(which, slice):
            return Pack(self._adapters[which])
        if isinstance(which, str):
            if which not in self.names:
                raise unknown("adapter", which, self.names)
            which = self.names.index(which)
        return self._adapters[which]

    def __len__(self) -> int:
        """Returns the number of adapters."""
        return len(self._adapters)

    def __repr__(self) -> str:
        return f"Pack({', '.join(self.names)})"

    @property
    def coordinates(self) -> dict[str, Coordinates]:
        """The coordinates of the adapters' factors, by path; `Coordinates.tasks` are places here.

        Those of a part of a pack are in bases of that part.
        """
        known = self._adapters[0].coordinates
        places = {packed.number: place for place, packed in enumerate(self)}
        if all(places.get(task) == task for x in known.values() for task in x.tasks):
            return dict(known)
        return dict(_parts(known, places))

    def add(
        self, adapter: Adapter, *, name: str | None = None, allow_other_base: bool = False
    ) -> "Pack":
        """Returns a pack with one more adapter, behind the others.

        Bases are extended by the directions of its factors that are not in them.

        Args:
            adapter: the adapter.
            name: of the adapter, see `pack`.
            allow_other_base: see `pack`.

        Raises:
            CoreMergeError: as `pack`.
        """
        given = as_adapters([*(packed.source for packed in self), adapter])
        names = _names(given, [*self.names, name])
        every = _aligned(given, allow_other_base)
        if any(set(x) != set(y) for x, y in zip(self, every, strict=False)):
            return _packed(every, names, _coordinates(every))  # modules have other names now
        new = len(self)
        found = dict(self.coordinates)
        for group in group_modules(every):
            for path, tasks in zip(group.paths, group.tasks.tolist(), strict=True):
                if new in tasks:
                    found[path] = _extended(found.get(path), every, path, tasks)
        return _packed(every, names, found)

    def remove(self, name: str) -> "Pack":
        """Returns a pack without one of the adapters.

        Raises:
            MismatchError: it is the only one.
            RecipeError: there is no such adapter.
        """
        rest = [packed for packed in self if packed is not self[name]]
        if not rest:
            raise MismatchError(f"adapter {name!r} is the only one of the pack")
        fewer = Pack(rest)
        return _packed([x.source for x in rest], fewer.names, fewer.coordinates)


def pack(
    adapters: Sequence[Adapter],
    *,
    names: Sequence[str] | None = None,
    allow_other_base: bool = False,
) -> Pack:
    """Prepares adapters for many merges.

    Args:
        adapters: at least one.
        names: of the adapters; by default those that they have, else ``"1"``, ``"2"`` and so on.
        allow_other_base: pack also adapters that name different base models.

    Returns:
        The adapters, on which all agree how modules are named. Factors are not copied; those of
        files are read when they are needed.

    Raises:
        FormatError: a factor has NaN or infinite values.
        MismatchError: the adapters do not belong together.
        RecipeError: an argument is of another kind, or two names are equal.
        UnsupportedError: a transformation of JAX traces factors.
    """
    given = as_adapters(adapters)
    if names is not None and len(names) != len(given):
        raise RecipeError(f"names: got {len(names)} for {len(given)} adapters; expected one each")
    found = _names(given, names or [None] * len(given))
    every = _aligned(given, allow_other_base)
    return _packed(every, found, _coordinates(every))


def _parts(
    known: Mapping[str, Coordinates], places: Mapping[int, int]
) -> Iterator[tuple[str, Coordinates]]:
    """Yields the coordinates of some adapters, given their new numbers, by path of the module."""
    for path, old in known.items():
        tasks = sorted((task for task in old.tasks if task in places), key=places.__getitem__)
        if tasks:
            columns = old.columns(tasks)
            yield (
                path,
                Coordinates(
                    tasks=tuple(places[task] for task in tasks),
                    ranks=tuple(old.ranks[old.tasks.index(task)] for task in tasks),
                    left=_triangular(old.left[:, columns]),
                    right=_triangular(old.right[:, columns]),
                ),
            )


def _names(adapters: Sequence[Adapter], given: Sequence[str | None]) -> list[str]:
    """Returns a name for each adapter.

    Raises:
        RecipeError: two are equal.
    """
    known = [name or x.metadata.name for name, x in zip(given, adapters, strict=True)]
    free = (str(t) for t in itertools.count(1) if str(t) not in known)
    names = [name or next(free) for name in known]
    for name in names:
        if names.count(name) > 1:
            raise RecipeError(f"two adapters are named {name!r}; give them names of their own")
    return names


def _aligned(adapters: Sequence[Adapter], allow_other_base: bool) -> list[AdapterSource]:
    """Returns adapters whose modules have common names.

    Raises:
        MismatchError: they do not belong together.
        UnsupportedError: factors are traced.
    """
    sources = [x.source if isinstance(x, PackedAdapter) else x for x in adapters]
    found = list(present_adapters(sources, None, allow_other_base, True).values())
    leaves = jax.tree.leaves([[x[path] for path in x] for x in found if x.in_memory])
    if any(map(is_traced, leaves)):
        raise UnsupportedError("adapters whose factors JAX traces cannot be packed; merge them")
    return found


def _packed(
    sources: Sequence[AdapterSource], names: Sequence[str], found: Mapping[str, Coordinates]
) -> Pack:
    """Returns a pack, whose adapters share what was found of their modules."""
    shared = dict(found)
    rows = enumerate(zip(sources, names, strict=True))
    return Pack([PackedAdapter(source, name, t, shared) for t, (source, name) in rows])


# --- Coordinates -------------------------------------------------------------------------------
def _coordinates(adapters: Sequence[AdapterSource]) -> dict[str, Coordinates]:
    """Returns the coordinates of all modules, by path.

    Raises:
        FormatError: a factor has NaN or infinite values.
    """
    workers, batches = split_groups(group_modules(adapters), chain(tsv()), core(), None, None)
    found = {}
    for batch, (left, right) in map_batches(partial(_of_batch, adapters), batches, workers):
        for path, tasks, *parts in zip(batch.paths, batch.tasks, left, right, strict=False):
            if not all(np.isfinite(part).all() for part in parts):
                refuse_values(adapters, [path], label)
                raise MismatchError(f"module {path!r}: finite factors overflow in products")
            found[path] = Coordinates(tuple(map(int, tasks)), batch.ranks, *parts)
    return found


def _of_batch(adapters: Sequence[AdapterSource], batch: Group) -> tuple[np.ndarray, np.ndarray]:
    """Returns the coordinates of the modules of a batch, ``(L, p, R)`` and ``(L, q, R)``."""
    a, b = stack_factors(batch, adapters)
    with computing(None) as dtype:
        left, right = jax.device_get(_basis_stack(a, b, dtype=dtype))
    return left, right


@partial(jax.jit, static_argnames="dtype")
def _basis_stack(
    a: Float[Array, "L R n"], b: Float[Array, "L m R"], *, dtype: np.dtype
) -> tuple[Float[Array, "L p R"], Float[Array, "L q R"]]:
    def coordinates(x: jax.Array) -> jax.Array:
        # With columns of norm 1, those of a small adapter are as exact as those of a large one.
        # What a merge leaves out as rounding errors, it decides itself.
        x = x.astype(dtype)
        norms = jnp.linalg.norm(x, axis=0, keepdims=True)
        unit = x * inverse(norms)
        return basis(unit, roundoff(unit), singular=False, dtype=dtype)[1] * norms

    return over_modules(lambda ab: (coordinates(ab[1]), coordinates(ab[0].T)), (a, b))


def _extended(
    known: Coordinates | None, adapters: Sequence[AdapterSource], path: str, tasks: Sequence[int]
) -> Coordinates:
    """Returns the coordinates of a module with one more adapter, the last of those that have it.

    Args:
        known: those of the others; None if no other has the module.
        adapters: all.
        path: of the module.
        tasks: the adapters that have it.
    """
    loras = [adapters[t][path] for t in tasks]
    sides = {"left": [x.b for x in loras], "right": [x.a.T for x in loras]}
    found = {}
    for side, factors in sides.items():
        *old, new = (np.asarray(jax.device_get(x), np.float64) for x in factors)
        if not np.isfinite(new).all():
            refuse_values(adapters[tasks[-1] :], [path], label)
        if known is None:
            found[side] = _triangular(new)
        else:
            found[side] = _with_directions(getattr(known, side), np.concatenate(old, axis=1), new)
    return Coordinates(tuple(tasks), tuple(x.rank for x in loras), **found)


_DIRECTIONS = 1e-10
"""Relative size of directions of columns of norm 1 from which on a basis has them exactly."""


def _with_directions(
    known: Float[np.ndarray, "p R"], old: Float[np.ndarray, "m R"], new: Float[np.ndarray, "m r"]
) -> Float[np.ndarray, "k R+r"]:
    """Returns coordinates of more columns: inside of the known basis, and outside of it.

    Args:
        known: coordinates of the old columns.
        old: the columns themselves: ``U known``, with an orthonormal U.
        new: more columns.
    """
    norms = np.linalg.norm(known, axis=0)
    scales = np.divide(1, norms, out=np.zeros_like(norms), where=norms > 0)
    # U = old @ frame. Directions that the columns hardly have would be rounding errors of others;
    # they are found anew.
    frame = scales[:, None] * np.linalg.pinv(known * scales, rcond=_DIRECTIONS)
    inside, rest = np.zeros((len(known), new.shape[1])), new
    for _ in range(2):  # once more, as the first pass leaves rounding errors of the old columns
        more = frame.T @ (old.T @ rest)
        inside, rest = inside + more, rest - old @ (frame @ more)
    outside = _triangular(rest)
    below = np.zeros((len(outside), known.shape[1]))
    return _triangular(np.block([[known, inside], [below, outside]]))


def _triangular(x: Float[np.ndarray, "m k"]) -> Float[np.ndarray, "p k"]:
    """Returns the coordinates of columns in an orthonormal basis of them."""
    return np.asarray(np.linalg.qr(x, mode="r"))
