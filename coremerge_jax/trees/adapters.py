"""Trees of parameters (of a model, of a checkpoint) to adapters and back."""

import dataclasses
import numbers
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import jax

from coremerge_jax.errors import FormatError, hint
from coremerge_jax.lora import FLOATS, Adapter, Array, Metadata
from coremerge_jax.trees.arguments import check_alpha, check_patterns, check_rank, refuse_extras
from coremerge_jax.trees.arrays import place_like
from coremerge_jax.trees.axes import Axes, find_axes
from coremerge_jax.trees.copies import other_trees
from coremerge_jax.trees.layouts import LAYOUTS, Factor, Layout, refuse_foreign
from coremerge_jax.trees.paths import (
    Leaf,
    Tree,
    first_match,
    flatten,
    map_leaves,
    matches,
    module_paths,
)
from coremerge_jax.trees.slots import Places, Slot


@dataclasses.dataclass(frozen=True)
class TreeFormat:
    """Details of how a tree stores factors that it does not show itself.

    Attributes:
        layout: a name of `layouts.LAYOUTS`; by default the one whose keys the tree has.
        alpha: of layouts that scale by alpha / rank.
        rank: the rank that alpha is divided by, and to write factors with; by default that of the
            factors.
        scan_axis: 0 or 1, where stacked layers are in both factors; None for none; ``"auto"`` to
            find it from shapes and names.
        scan_axes: with ``"auto"``, the values to prefer where shapes fit several, such as those
            that a checkpoint records.
        axes: by pattern of a module's path in the tree (as in `fnmatch`), the axes of its factors
            as ``"lir,lro"``; see `Axes`.
        ignore: patterns of keys to leave out, such as those of the base model's own parameters.
        whole: True if every factor is the model's own. If not, what an optimizer, or an average of
            the parameters, has by their keys beside them is left out.

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
    whole: bool = False

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

    def places(self, leaves: Mapping[str, Leaf]) -> Places:
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
        check_patterns(self.axes, {module for module, _ in found}, "axes")
        slots: dict[Slot, float | Array] = {}
        for (module, param), keys in found.items():
            if set(keys) != {"a", "b"}:
                raise FormatError(f"{next(iter(keys.values()))!r} has no partner factor")
            slot = self._slot(layout, module, param, (keys["a"], keys["b"]), leaves)
            slots[slot] = self.scale(layout, slot.rank)
        return Places(slots)

    def sort(self, leaves: Mapping[str, Leaf]) -> tuple[Layout, dict[str, Factor], list[str]]:
        """Returns the layout of a tree, the meaning of its factors' keys, and its other keys.

        Keys to ignore, and those of other trees than the model's, are in neither.

        Raises:
            FormatError: keys are of no layout, or of several; or a pattern matches none.
        """
        check_patterns(self.ignore, leaves, "ignore")
        kept = [key for key in leaves if not matches(key, self.ignore)]
        layout, factors = self._layout(kept)
        for key in factors:
            if getattr(leaves[key], "shape", None) is None:
                raise FormatError(f"{key!r} is not an array")
        refuse_foreign({key: leaves[key].shape for key in factors})
        left = set() if self.whole else other_trees(factors, kept)
        return (
            layout,
            {key: factor for key, factor in factors.items() if key not in left},
            [key for key in kept if key not in factors and key not in left],
        )

    def metadata(self, places: Places, name: str | None) -> Metadata:
        """Returns the adapter's metadata."""
        first = next(iter(places.slots))
        return Metadata(
            name=name,
            rank=first.rank,
            alpha=float(self.alpha) if isinstance(self.alpha, numbers.Real) else None,
            dtype=str(first.dtypes[0]),
            lengths=tuple(
                (path, *slot.lengths)
                for slot in places.slots
                if max(map(len, slot.lengths)) > 1
                for path in slot.paths
            ),
        )

    def _layout(self, keys: Sequence[str]) -> tuple[Layout, dict[str, Factor]]:
        """Returns the layout of a tree, and the meaning of the keys that are of it."""
        if self.layout is not None:
            if self.layout not in LAYOUTS:
                raise FormatError(
                    f"layout={self.layout!r}: expected one of {', '.join(map(repr, LAYOUTS))}"
                )
            layout = LAYOUTS[self.layout]
            return layout, _factors(layout, keys)
        found = [(layout, _factors(layout, keys)) for layout in LAYOUTS.values()]
        fitting = [(layout, factors) for layout, factors in found if factors]
        if len(fitting) == 1:
            return fitting[0]
        refuse_foreign(dict.fromkeys(keys))
        if not fitting:
            examples = ", ".join(repr(key) for key in keys[:3])
            raise FormatError(
                f"no LoRA factors among {len(keys)} keys ({examples}); expected keys like "
                + " or ".join(repr(layout.key) for layout in LAYOUTS.values())
            )
        names = " and ".join(repr(layout.name) for layout, _ in fitting)
        raise FormatError(
            f"the tree has keys of {names}; say which with layout (coremerge convert --layout)"
        )

    def _slot(
        self,
        layout: Layout,
        module: str,
        param: str,
        keys: tuple[str, str],
        leaves: Mapping[str, Leaf],
    ) -> Slot:
        a, b = (leaves[key] for key in keys)
        for key, leaf in zip(keys, (a, b), strict=True):
            if leaf.dtype.name not in FLOATS:
                raise FormatError(
                    f"{key!r} is of dtype {leaf.dtype}; expected floating point of 16 bits or more"
                )
        shapes = tuple(a.shape), tuple(b.shape)
        letters = first_match(module, self.axes)
        if letters is None:
            axes = find_axes(module, *shapes, self.scan_axis, self.scan_axes)
        else:
            first, _, second = letters.partition(",")
            axes = Axes(first, second).checked(module, *shapes)
        rank, other = axes.rank(*shapes)
        if rank != other:
            raise FormatError(
                f"{module}: a {shapes[0]} with axes {axes.a} has rank {rank}, b {shapes[1]} with "
                f"axes {axes.b} has rank {other}"
            )
        return Slot(
            paths=module_paths(module, param, axes.batch(shapes[0])),
            keys=keys,
            shapes=shapes,
            dtypes=(a.dtype, b.dtype),
            axes=axes,
            kind=layout.kind(param),
            wanted=self.rank or (rank if layout.scaled else None),
        )


def _factors(layout: Layout, keys: Iterable[str]) -> dict[str, Factor]:
    return {key: factor for key in keys if (factor := layout.match(key))}


def from_tree(tree: Tree, *, name: str | None = None, **options: Any) -> Adapter:
    """Returns the LoRA factors of a tree of arrays as an adapter; may be called with traced arrays.

    Module paths are those of the tree, joined by dots, without the names ``kernel`` and ``w`` of
    the usual parameters. A stack of layers becomes one module a layer, its index behind the part
    ``layers`` (or ``blocks``) of the path; a stack of something else ends in ``[index]``.

    Args:
        tree: any pytree, such as an `nnx.State`, of LoRA factors.
        name: a name for messages and tables.
        **options: the fields of `TreeFormat`.

    Raises:
        FormatError: the tree and the options do not show where factors are and how they are stored.
    """
    leaves, form = flatten(tree), TreeFormat(**options)
    places = form.places(leaves)
    return Adapter(places.read(leaves), metadata=form.metadata(places, name))


def to_tree(adapter: Adapter, like: Tree, **options: Any) -> Tree:
    """Returns an adapter in the form of a tree: the inverse of `from_tree`.

    The rank of a stored pair is the largest of its modules' ranks, which may differ from that of
    ``like``: `truncate` first where shapes must not change. Where the layout scales by alpha /
    rank, it is that rank. What replaces JAX arrays of ``like`` is put where these are on devices.

    Args:
        adapter: has the modules of ``like``, and no others.
        like: a tree of arrays, or of shapes and dtypes, with the keys, axes and dtypes to write.
        **options: the fields of `TreeFormat`; the tree's library will scale by ``alpha`` / rank.

    Raises:
        FormatError: the tree and the options do not show where factors belong.
        MismatchError: the adapter and the tree have not the same modules, or not of one shape; or
            its rank is larger than that of the scale; or a factor overflows its dtype.
        UnsupportedError: the adapter is more than low-rank updates.
    """
    refuse_extras(adapter, "trees of LoRA factors")
    stored = TreeFormat(**options).places(flatten(like)).write(adapter)

    def put(key: str, leaf: Leaf) -> Leaf:
        return place_like(stored[key], leaf) if key in stored else leaf

    return map_leaves(put, like)
