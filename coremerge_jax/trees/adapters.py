"""Trees of parameters (of a model, of a checkpoint) to adapters and back."""

import dataclasses
import fnmatch
import math
import numbers
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from coremerge_jax.errors import FormatError, MismatchError, hint
from coremerge_jax.lora import FLOATS, Adapter, Array, Kind, LoRA, Metadata
from coremerge_jax.merging.mesh import is_spread
from coremerge_jax.trees.axes import Axes, Shape, container, find_axes, pad_rank, separate_numbers
from coremerge_jax.trees.copies import other_trees
from coremerge_jax.trees.layouts import LAYOUTS, Factor, Layout, refuse_foreign

# Names of parameters that say nothing about the module.
_UNNAMED = ("kernel", "w", "embeddings")


@dataclasses.dataclass(frozen=True)
class Slot:
    """Place of the two factors of a kernel in a tree.

    Attributes:
        paths: module paths of the kernels, in the order of the batch.
        keys: of a and b.
        shapes: of a and b.
        dtypes: of a and b.
        axes: of a and b.
        kind: what sort of module it is.
        wanted: the rank to write, where that matters; None for any.
    """

    paths: tuple[str, ...]
    keys: tuple[str, str]
    shapes: tuple[Shape, Shape]
    dtypes: tuple[np.dtype, np.dtype]
    axes: Axes
    kind: Kind
    wanted: int | None = None

    @property
    def rank(self) -> int:
        """The length of the rank axes."""
        return self.axes.rank(*self.shapes)[0]

    def outline(self) -> dict[str, LoRA]:
        """Returns the modules with shapes and dtypes in place of their factors."""
        pair = map(jax.ShapeDtypeStruct, self.shapes, self.dtypes)
        return jax.eval_shape(partial(self.read, scale=1.0), *pair)

    def read(self, a: Array, b: Array, scale: float | Array) -> dict[str, LoRA]:
        """Returns the modules, given the stored factors."""
        a, b = _gathered(_single(a), self.axes.a), _gathered(_single(b), self.axes.b)
        a, b = self.axes.matrices(a, b)
        b = b * np.asarray(scale, b.dtype) if isinstance(scale, float) else b * scale
        # Indexing keeps arrays where they are on devices; iterating over them does not.
        shared = len(b) != len(a)  # one b for all
        return {
            path: LoRA(a=a[i], b=b[0 if shared else i], kind=self.kind)
            for i, path in enumerate(self.paths)
        }

    @property
    def lengths(self) -> tuple[Shape, Shape]:
        """The lengths of the axes of inputs, and of outputs."""
        a, b = self.shapes
        return (
            tuple(n for n, letter in zip(a, self.axes.a, strict=True) if letter == "i"),
            tuple(n for n, letter in zip(b, self.axes.b, strict=True) if letter == "o"),
        )

    def write(self, modules: Mapping[str, LoRA], scale: float | Array) -> tuple[Array, Array]:
        """Returns the factors to store, given the modules; their ranks are made equal with zeros.

        Raises:
            MismatchError: a module's rank is larger than that of the scale.
        """
        loras = [modules[path] for path in self.paths]
        rank = max(lora.rank for lora in loras)
        if self.wanted is not None:
            if rank > self.wanted:
                raise MismatchError(
                    f"module {self.paths[0]!r} has rank {rank}, and updates are scaled by alpha / "
                    f"{self.wanted}; truncate the adapter, or make the factors anew with this rank "
                    f"and say rank={rank}"
                )
            rank = self.wanted
        on_host = all(isinstance(x, np.ndarray) for x in jax.tree.leaves(loras))
        xp: Any = np if on_host else jnp
        a = xp.stack([pad_rank(lora.a, -2, rank) for lora in loras])
        b = xp.stack([pad_rank(lora.b, -1, rank) for lora in loras])
        b = b / np.asarray(scale, b.dtype) if isinstance(scale, float) else b / scale
        a, b = self.axes.stored(a, b, *self.shapes)
        return a.astype(self.dtypes[0]), b.astype(self.dtypes[1])


@dataclasses.dataclass(frozen=True)
class TreeFormat:
    """Details of how a tree stores factors that it does not show itself.

    Attributes:
        layout: a name of `layouts.LAYOUTS`; found out by the keys by default.
        alpha: of layouts that scale by alpha / rank.
        rank: that the scale is of, and to write factors with; by default that of the factors.
        scan_axis: 0 or 1, where stacked layers are in both factors; None for none; ``"auto"`` where
            shapes and names show it.
        scan_axes: with ``"auto"``, what it can be where shapes fit several; as a checkpoint tells.
        axes: by pattern of a module's path in the tree (as in `fnmatch`), the axes of its factors
            as ``"lir,lro"``; see `layouts.Axes`.
        ignore: patterns of keys to leave out, such as those of the base model's own parameters.
            What an optimizer has by the keys of the parameters beside it is left out anyway.

    Raises:
        FormatError: alpha is no positive number, or rank no positive integer.
    """

    layout: str | None = None
    alpha: float | Array | None = None
    rank: int | None = None
    scan_axis: int | str | None = "auto"
    scan_axes: Collection[int | None] = ()
    axes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignore: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.rank is not None:
            check_rank(self.rank, "rank")
        if self.alpha is not None and not isinstance(self.alpha, jax.Array):
            check_alpha(self.alpha, "alpha")

    def scale(self, layout: Layout, rank: int) -> float | Array:
        """Returns the number by which the tree's library multiplies an update.

        Raises:
            FormatError: it is not known.
        """
        if not layout.scaled:
            if self.alpha is not None and self.alpha != (self.rank or rank):
                raise FormatError(
                    f"layout {layout.name!r} does not scale updates, but alpha is {self.alpha} and "
                    f"the rank {self.rank or rank}; leave alpha out"
                )
            return 1.0
        if self.alpha is None:
            raise FormatError(
                f"layout {layout.name!r} scales updates by alpha / rank, and the tree does not "
                "hold alpha: give alpha (coremerge convert --alpha)"
            )
        return self.alpha / (self.rank or rank)

    def places(self, leaves: Mapping[str, Any]) -> "Places":
        """Finds the factors of a tree.

        Args:
            leaves: by key, anything with a shape and a dtype.

        Raises:
            FormatError: keys are of no layout, or of several; a factor has no partner; shapes can
                be read in several ways; or the scale is not known.
        """
        layout, factors, unmatched = self.sort(leaves)
        if unmatched:
            raise FormatError(
                f"{len(unmatched)} keys are not LoRA factors of layout {layout.name!r} (first: "
                f"{unmatched[0]!r}{hint(unmatched[0], factors)}); leave "
                "them out with ignore (coremerge convert --ignore)"
            )
        found: dict[tuple[str, str], dict[str, str]] = {}
        for key, factor in factors.items():
            found.setdefault((factor.module, factor.param), {})[factor.factor] = key
        modules = {module for module, _ in found}
        for pattern in self.axes:
            check_pattern(pattern, modules, "axes")
        slots: dict[Slot, float | Array] = {}
        for (module, param), keys in found.items():
            if set(keys) != {"a", "b"}:
                raise FormatError(f"{next(iter(keys.values()))!r} has no partner factor")
            slot = self._slot(layout, module, param, keys, leaves)
            slots[slot] = self.scale(layout, slot.rank)
        return Places(slots)

    def sort(self, leaves: Mapping[str, Any]) -> tuple[Layout, dict[str, Factor], list[str]]:
        """Returns the layout of a tree, what the keys of its factors say, and its other keys.

        Keys to ignore, and an optimizer's, are in neither.

        Raises:
            FormatError: keys are of no layout, or of several; or a pattern matches none.
        """
        for pattern in self.ignore:
            check_pattern(pattern, leaves, "ignore")
        kept = [key for key in leaves if not matches(key, self.ignore)]
        layout = self._layout(kept)
        matched = {key: layout.match(key) for key in kept}
        factors = {key: factor for key, factor in matched.items() if factor is not None}
        for key in factors:
            if getattr(leaves[key], "shape", None) is None:
                raise FormatError(f"{key!r} is not an array")
        refuse_foreign({key: leaves[key].shape for key in factors})
        left = other_trees(factors, kept)
        return (
            layout,
            {key: factor for key, factor in factors.items() if key not in left},
            [key for key in kept if key not in factors and key not in left],
        )

    def metadata(self, places: "Places", name: str | None) -> Metadata:
        """Returns the adapter's metadata."""
        first = next(iter(places.slots))
        alpha = float(self.alpha) if isinstance(self.alpha, numbers.Real) else None
        return Metadata(
            name=name,
            rank=first.rank,
            alpha=alpha,
            dtype=str(first.dtypes[0]),
            lengths=tuple(
                (path, *slot.lengths)
                for slot in places.slots
                if max(map(len, slot.lengths)) > 1
                for path in slot.paths
            ),
        )

    def _layout(self, keys: Sequence[str]) -> Layout:
        if self.layout is not None:
            if self.layout not in LAYOUTS:
                raise FormatError(
                    f"layout={self.layout!r}: expected one of {', '.join(map(repr, LAYOUTS))}"
                )
            return LAYOUTS[self.layout]
        fitting = [layout for layout in LAYOUTS.values() if any(map(layout.match, keys))]
        if len(fitting) == 1:
            return fitting[0]
        refuse_foreign(dict.fromkeys(keys))
        if not fitting:
            examples = ", ".join(repr(key) for key in keys[:3])
            raise FormatError(
                f"no LoRA factors among {len(keys)} keys ({examples}); expected keys like "
                + " or ".join(repr(layout.key) for layout in LAYOUTS.values())
            )
        names = " and ".join(repr(layout.name) for layout in fitting)
        raise FormatError(
            f"the tree has keys of {names}; say which with layout (coremerge convert --layout)"
        )

    def _slot(
        self,
        layout: Layout,
        module: str,
        param: str,
        keys: Mapping[str, str],
        leaves: Mapping[str, Any],
    ) -> Slot:
        a, b = (leaves[keys[factor]] for factor in "ab")
        for key, leaf in zip((keys["a"], keys["b"]), (a, b), strict=True):
            if leaf.dtype.name not in FLOATS:
                raise FormatError(
                    f"{key!r} is of dtype {leaf.dtype}; expected floating point of 16 bits or more"
                )
        shapes = tuple(a.shape), tuple(b.shape)
        axes = self._axes(module, *shapes)
        rank, other = axes.rank(*shapes)
        if rank != other:
            raise FormatError(
                f"{module}: a {shapes[0]} with axes {axes.a} has rank {rank}, b {shapes[1]} with "
                f"axes {axes.b} has rank {other}"
            )
        return Slot(
            paths=module_paths(module, param, axes.batch(shapes[0])),
            keys=(keys["a"], keys["b"]),
            shapes=shapes,
            dtypes=(a.dtype, b.dtype),
            axes=axes,
            kind=layout.kind(param),
            wanted=self.rank or (rank if layout.scaled else None),
        )

    def _axes(self, module: str, a: Shape, b: Shape) -> Axes:
        for pattern, letters in self.axes.items():
            if fnmatch.fnmatchcase(module, pattern):
                first, _, second = letters.partition(",")
                return Axes(first, second).checked(module, a, b)
        return find_axes(module, a, b, self.scan_axis, self.scan_axes)


@dataclasses.dataclass(frozen=True)
class Places:
    """Places of a tree's factors, and the number by which its library scales each update.

    Raises:
        FormatError: two of them are of one module.
    """

    slots: Mapping[Slot, float | Array]

    def __post_init__(self) -> None:
        seen: dict[str, Slot] = {}
        for slot in self.slots:
            for path in slot.paths:
                if path in seen:
                    raise FormatError(
                        f"{seen[path].keys[0]!r} and {slot.keys[0]!r} are both of module {path!r}"
                    )
                seen[path] = slot

    def outline(self) -> dict[str, LoRA]:
        """Returns the modules with shapes and dtypes in place of their factors."""
        return {path: lora for slot in self.slots for path, lora in slot.outline().items()}

    def read(self, leaves: Mapping[str, Array]) -> dict[str, LoRA]:
        """Returns the modules, given the arrays of the tree by key."""
        modules: dict[str, LoRA] = {}
        for slot, scale in self.slots.items():
            a, b = (leaves[key] for key in slot.keys)
            modules |= slot.read(a, b, scale)
        return modules

    def write(self, adapter: Adapter) -> dict[str, Array]:
        """Arrays by key, given an adapter.

        Raises:
            MismatchError: it has not the same modules, or not of one shape.
        """
        check_same_modules(adapter.outline, self.outline())
        stored: dict[str, Array] = {}
        for slot, scale in self.slots.items():
            stored |= zip(slot.keys, slot.write(adapter.read(slot.paths), scale), strict=True)
        return stored


def from_tree(tree: Any, *, name: str | None = None, **options: Any) -> Adapter:
    """Returns the LoRA factors of a tree of arrays as an adapter; may be called with traced arrays.

    Module paths are those of the tree, joined by dots, without the names ``kernel`` and ``w`` of
    the usual parameters. A stack of layers becomes one module a layer, its index behind the part
    ``layers`` (or ``blocks``) of the path; a stack of something else ends in ``[index]``.

    Args:
        tree: any pytree, such as an `nnx.State`, of LoRA factors.
        name: a name for messages and tables.
        **options: see `TreeFormat`.

    Raises:
        FormatError: what the tree holds cannot be told, see `TreeFormat`.
    """
    leaves, form = flatten(tree), TreeFormat(**options)
    places = form.places(leaves)
    return Adapter(places.read(leaves), metadata=form.metadata(places, name))


def to_tree(adapter: Adapter, like: Any, **options: Any) -> Any:
    """Returns an adapter in the form of a tree: the inverse of `from_tree`.

    The rank of a stored pair is the largest of its modules' ranks, which may differ from that of
    ``like``: `truncate` first where shapes must not change. Where the layout scales by alpha /
    rank, it is that rank. What replaces JAX arrays of ``like`` is put where these are on devices.

    Args:
        adapter: has the modules of ``like``, and no others.
        like: a tree of arrays, or of shapes and dtypes, with the keys, axes and dtypes to write.
        **options: see `TreeFormat`; with ``alpha``, the tree's library will scale by alpha / rank.

    Raises:
        FormatError: where the factors of ``like`` belong cannot be told, see `TreeFormat`.
        MismatchError: the adapter and the tree have not the same modules, or not of one shape; or
            its rank is larger than that of the scale.
    """
    stored = TreeFormat(**options).places(flatten(like)).write(adapter)

    def put(path: tuple[Any, ...], leaf: Any) -> Any:
        key = key_of(path)
        return place_like(stored[key], leaf) if key in stored else leaf

    return jax.tree_util.tree_map_with_path(put, like)


def place_like(x: Array, leaf: Any) -> Array:
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


def _for_shape(sharding: jax.sharding.Sharding, shape: Shape) -> jax.sharding.Sharding:
    """Returns a sharding without the axes that do not divide a shape."""
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


def flatten(tree: Any) -> dict[str, Any]:
    """Returns leaves by key, parts joined by ``/``, without the level ``value`` of flax."""
    return {key_of(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def key_of(path: tuple[Any, ...]) -> str:
    """Returns the key of a leaf, given its path as `jax.tree_util` has it."""
    parts = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    return "/".join(parts[:-1] if parts[-1:] == ["value"] else parts)


def module_paths(module: str, param: str, batch: Shape) -> tuple[str, ...]:
    """Returns the module path of each kernel of a batch."""
    module = re.sub(r"^(params/)+", "", module)
    parts = separate_numbers(module).split("/") + [param] * (param not in _UNNAMED)
    at = container(module)
    found = []
    for index in np.ndindex(batch):
        names, rest = list(parts), list(index)
        if at is not None and rest:
            names.insert(at + 1, str(rest.pop(0)))
        found.append(".".join(names) + "".join(f"[{i}]" for i in rest))
    return tuple(found)


def matches(key: str, patterns: Iterable[str]) -> bool:
    """Tells whether a key matches one of the patterns, as in `fnmatch`."""
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)


def check_pattern(pattern: str, keys: Collection[str], option: str) -> None:
    """Refuses a pattern that matches nothing: it would change nothing without a word.

    Raises:
        FormatError: naming the pattern, and the nearest key.
    """
    if not any(fnmatch.fnmatchcase(key, pattern) for key in keys):
        what = "key" if option == "ignore" else "module"
        raise FormatError(
            f"{option} (--{option}): pattern {pattern!r} matches no {what}{hint(pattern, keys)}"
        )


def check_rank(value: Any, name: str) -> int:
    """Returns a rank that was told, if it can be one.

    Raises:
        FormatError: it is no positive integer.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise FormatError(f"{name} is {_short(value)}; expected a positive integer")
    return int(value)


def check_alpha(value: Any, name: str) -> float:
    """Returns an alpha that was told, if it can be one.

    Raises:
        FormatError: it is no positive finite number.
    """
    number = isinstance(value, numbers.Real | np.ndarray) and not isinstance(value, bool)
    try:
        fits = number and np.ndim(value) == 0 and math.isfinite(value) and value > 0
    except (OverflowError, TypeError):
        fits = False
    if not fits:
        raise FormatError(f"{name} is {_short(value)}; expected a positive number")
    return float(value)


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of too many digits
        text = "too long to be shown"
    return text if len(text) <= 40 else f"{text[:40]}…"


def check_same_modules(adapter: Mapping[str, LoRA], tree: Mapping[str, LoRA]) -> None:
    """Checks that an adapter has the modules of a tree, and no others.

    Raises:
        MismatchError: naming a module, and the nearest name.
    """
    for missing, there, what in (
        (tree.keys() - adapter.keys(), adapter, "the adapter has no module"),
        (adapter.keys() - tree.keys(), tree, "the tree has no place for module"),
    ):
        if missing:
            first = min(missing)
            raise MismatchError(
                f"{what} {first!r}{hint(first, there)} ({len(missing)} in all); expected the "
                "same modules in both"
            )
    for path, lora in tree.items():
        if adapter[path].shape != lora.shape:
            raise MismatchError(
                f"module {path!r} is {adapter[path].shape} (m, n) in the adapter, and {lora.shape} "
                "in the tree"
            )


def _gathered(x: Array, letters: str) -> Array:
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
    mesh = typed.mesh if isinstance(x, jax.core.Tracer) else x.sharding.mesh  # type: ignore[attr-defined]
    return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(*spec)))


def _single(x: Array) -> Array:
    """Casts to at least float32: scaling is not to round."""
    return x if x.dtype == np.float64 else x.astype(np.float32)
