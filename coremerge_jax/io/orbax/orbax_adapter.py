"""Orbax checkpoints to adapters and back."""

import functools
import re
import shutil
import threading
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from coremerge_jax import __version__
from coremerge_jax.errors import CoreMergeWarning, FormatError, MismatchError, UnsupportedError
from coremerge_jax.io.adapter_config import CONFIG, read_adapter_config
from coremerge_jax.io.adapter_writer import tell_beside
from coremerge_jax.io.atomic import atomic_folder, shared_folder
from coremerge_jax.io.one_file.keyed_layout import refuse_kinds
from coremerge_jax.io.orbax.orbax_folder import MARKER, TREE_OPTIONS, is_orbax
from coremerge_jax.io.orbax.orbax_tree import SCAN, OrbaxTree, open_tree, write_tree
from coremerge_jax.io.outputs import CHECKPOINT, check_output, write_record
from coremerge_jax.lora import Adapter, AdapterFile, Array, LoRA, Metadata
from coremerge_jax.merging.mesh import is_spread
from coremerge_jax.trees.adapters import TreeFormat, to_tree
from coremerge_jax.trees.arguments import check_alpha, check_rank, refuse_extras
from coremerge_jax.trees.families import find_names, outline_tree
from coremerge_jax.trees.layouts import LAYOUTS
from coremerge_jax.trees.paths import flatten, map_leaves, matches
from coremerge_jax.trees.slots import Places, Slot

OURS = "coremerge"  # in the custom metadata of checkpoints that `save_orbax` wrote

_LAYER = re.compile(r"(.*\b(?:layers?|blocks?|h))\.(\d+)\.(.+)")


class OrbaxFile(AdapterFile):
    """An adapter whose factors are still in its checkpoint, opened by `open_orbax`."""

    def __init__(self, source: OrbaxTree, places: Places, metadata: Metadata) -> None:
        super().__init__(places.outline(), metadata=metadata)
        self._folder = source.folder
        self._made_of = source, places, metadata
        self._slots = {path: slot for slot in places.slots for path in slot.paths}
        self._lock = threading.Lock()  # orbax runs an event loop of its own in each call

        # A stack is read as a whole, and its layers may be asked for in several batches.
        @functools.lru_cache(maxsize=1)
        def read(slot: Slot) -> dict[str, LoRA]:
            a, b = source.read(slot.keys)
            return slot.read(a, b, places.slots[slot])

        self._read = read

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folder of the checkpoint."""
        return (self._folder,)

    def __reduce__(self) -> tuple[Callable[..., "OrbaxFile"], tuple[Any, ...]]:
        """Pickles the places of the factors; these stay in the checkpoint."""
        return OrbaxFile, self._made_of

    def read(self, paths: Iterable[str]) -> dict[str, LoRA]:
        """Returns the modules with these paths.

        Raises:
            FormatError: a module has values that are not finite.
        """
        wanted = list(paths)
        found: dict[str, LoRA] = {}
        with self._lock:
            for slot in dict.fromkeys(self._slots[path] for path in wanted):
                found |= self._read(slot)
        found = {path: found[path] for path in wanted}
        for path, lora in found.items():
            if not (np.isfinite(lora.a).all() and np.isfinite(lora.b).all()):
                raise FormatError(
                    f"{self.metadata.name}: module {path!r} has NaN or infinite values"
                )
        return found


def open_orbax(
    source: str | Path,
    *,
    item: str | None = None,
    step: int | None = None,
    name: str | None = None,
    **options: Any,
) -> Adapter:
    """Opens the LoRA factors of an orbax checkpoint, written by version 0 or 1 of its interface.

    Structure, shapes and dtypes are read and checked; factors, float32 NumPy arrays, are read when
    a module is asked for.

    Rank and alpha are taken from ``custom_metadata["lora"]`` of the checkpoint (``lora_rank`` and
    ``lora_alpha``, as MaxText and `save_orbax` write them), or from an ``adapter_config.json`` in
    its folder or the one above. Its metadata on scanned layers (``scan_layers``,
    ``param_scan_axis``) decides if shapes can be read in several ways.

    An unfinished last step is passed over with a warning. The state of an optimizer, or an average
    of the parameters, is left out, unless `save_orbax` wrote the checkpoint, or with ``whole``.

    Args:
        source: a checkpoint, the folder of an item in it, or a folder of steps of a
            CheckpointManager.
        item: the tree to read if there are several; by default the one that training stacks keep
            parameters in.
        step: the step to read if there are several; by default the last.
        name: a name for messages and tables; the name of the folder by default.
        **options: fields of `TreeFormat` that the checkpoint does not record.

    Raises:
        FormatError: there is no such checkpoint, it is broken, or it does not record enough.
    """
    tree = open_tree(source, item=item, step=step)
    for option, value in _recorded_scaling(tree).items():
        if options.setdefault(option, value) not in (None, value):
            raise FormatError(
                f"{tree}: {option}={options[option]} was given, but the checkpoint says {value}"
            )
    options.setdefault("scan_axes", tree.scan_axes)
    options.setdefault("whole", OURS in tree.custom)
    form = TreeFormat(**options)
    leaves = flatten(tree.tree)
    try:
        places = form.places(leaves)
    except (FormatError, UnsupportedError) as error:
        raise type(error)(f"{tree}: {error}") from error
    metadata = form.metadata(places, name or tree.folder.name)
    return OrbaxFile(tree, places, metadata)


def save_orbax(
    adapter: Adapter,
    out: str | Path,
    *,
    to: str | None = None,
    head_dim: int | None = None,
    like: str | Path | Any = None,
    force: bool = False,
    **options: Any,
) -> None:
    """Writes an adapter as an orbax checkpoint: all of it, or nothing.

    If there are several processes, all of them have to call this, as with orbax itself; each
    writes its part of arrays that are spread over them.

    Rank and alpha are saved as ``custom_metadata["lora"]``: both are the largest rank of the
    adapter. Configure the model that restores ``to`` or ``like`` with these.

    Args:
        adapter: the adapter to write.
        out: the folder to make; for Tunix, that of a step, such as ``checkpoints/1``.
        to: the implementation of a model family that will restore it, one of `names.NAME_MAPS`;
            module names are translated from Hugging Face's. By default, factors ``lora_a (n, r)``
            and ``lora_b (r, m)`` below the parts of each module's path, with layers of one shape
            stacked along a first axis, not scaled, and in float32.
        head_dim: the size of an attention head, for ``to``.
        like: instead of ``to``, a checkpoint, or a tree of shapes and dtypes, whose keys, axes and
            dtypes to use. Keys that are no LoRA factors are left out, with a warning.
        force: replace a checkpoint that is already there, if coremerge wrote all that is in it.
        **options: fields of `TreeFormat` that ``like`` does not show.

    Raises:
        FormatError: ``out`` may not be written, or ``like`` cannot be understood.
        MismatchError: the adapter lacks modules of ``like``, or has names that ``to`` lacks.
        RecipeError: ``to`` is not known.
        UnsupportedError: ``head_dim`` is needed, or does not fit; the adapter is more than low-rank
            updates; or without ``to`` and ``like``, a module is no linear layer.
    """
    inputs = [*adapter.folders, *([like] if isinstance(like, str | Path) else [])]
    check_output(out, kind=CHECKPOINT, inputs=inputs, force=force)
    refuse_extras(adapter.outline, f"{CHECKPOINT}s")
    rank = max(lora.rank for lora in adapter.outline.values())
    item: str | None = None
    if to is not None:
        names = find_names(to)
        item = names.item
        adapter = names.from_hugging_face(adapter, head_dim=head_dim)
        like = outline_tree(adapter, names, head_dim)
        options |= {"layout": names.layout, "scan_axis": names.scan_axis}
        rank = max(lora.rank for lora in adapter.outline.values())
    scan = _scan(options.get("scan_axis", 0 if like is None else None))
    if like is None:
        # A tree of parameters does not say of which kind a layer is, and is read as linear ones.
        refuse_kinds(adapter.outline, CHECKPOINT, ("linear",))
        tree = stacked(adapter)
    else:
        named = str(like) if isinstance(like, str | Path) else "the tree to be like"
        if isinstance(like, str | Path):
            source = open_tree(like)
            like, item = source.tree, source.item
            options.setdefault("scan_axes", source.scan_axes)
            options.setdefault("whole", OURS in source.custom)
            scan = {key: source.custom[key] for key in SCAN if key in source.custom} | scan
        # With alpha = rank the scale is 1, whatever the layout.
        options = {**options, "alpha": float(rank), "rank": rank}
        try:
            _, factors, others = TreeFormat(**options).sort(flatten(like))
            options.pop("ignore", None)
            tree = _arrays(to_tree(adapter, _only(factors, like), **options))
        except (FormatError, UnsupportedError, MismatchError) as error:
            raise type(error)(f"{named}: {error}") from error
        if others:
            warnings.warn(
                f"{named}: {len(others)} keys are no LoRA factors, and are left out of the copy "
                f"(first: {others[0]!r})",
                CoreMergeWarning,
                stacklevel=2,
            )
    origin = {"version": __version__, "base_model": adapter.metadata.base_model}
    custom = {"lora": {"lora_rank": rank, "lora_alpha": rank}, OURS: origin, **scan}
    item = item or "state"
    open_folder = shared_folder if jax.process_count() > 1 else atomic_folder
    with open_folder(out, kind=CHECKPOINT, inputs=inputs, force=force) as folder:
        write_tree(folder, tree, item=item, custom=custom)
        if jax.process_index() == 0:  # MaxText restores, and looks, in this folder
            shutil.copy(folder / MARKER, folder / item)
            tell_beside(adapter.outline, CHECKPOINT)
            write_record(folder, CHECKPOINT, {**origin, "rank": rank, "to": to or "orbax"})


def share_options(
    source: str | Path, like: str | Path, options: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divides options between a source and the checkpoint that its copy is to be like.

    Where both are orbax checkpoints, a pattern is for the one, or both, in which it matches.

    Args:
        source: what `open_adapter` takes.
        like: a checkpoint, as `save_orbax` takes it.
        options: options of `open_orbax`.

    Returns:
        The options to open the source with, and those for `save_orbax`.
    """
    target = {key: x for key, x in options.items() if key in TREE_OPTIONS}
    if not is_orbax(source):
        return {key: x for key, x in options.items() if key not in target}, target
    there = open_tree(source, item=options.get("item"), step=options.get("step"))
    keys = [list(flatten(tree.tree)) for tree in (there, open_tree(like))]
    layouts = LAYOUTS.values()
    modules = [
        [factor.module for key in tree for x in layouts if (factor := x.match(key))]
        for tree in keys
    ]
    given = dict(options)
    known = LAYOUTS.get(options.get("layout", ""))
    if known and not any(map(known.match, keys[1])):
        target.pop("layout")
    for option, found in (("ignore", keys), ("axes", modules)):
        for pattern in options.get(option, ()):
            hits = [any(matches(key, [pattern]) for key in tree) for tree in found]
            for kept, hit in ((given, hits[0] or not hits[1]), (target, hits[1])):
                if not hit:
                    kept[option] = _without(kept[option], pattern)
    return given, target


def _without(patterns: Any, pattern: str) -> Any:
    if isinstance(patterns, dict):
        return {key: x for key, x in patterns.items() if key != pattern}
    return [x for x in patterns if x != pattern]


def _scan(axis: Any) -> dict[str, Any]:
    """Returns the metadata that says how layers are stacked, for later readers."""
    return dict(zip(SCAN, (True, axis), strict=False)) if axis in (0, 1) else {}


def _only(keys: Collection[str], tree: Any) -> Any:
    """Returns a tree with None in place of leaves with other keys."""
    return map_leaves(lambda key, leaf: leaf if key in keys else None, tree)


def _arrays(tree: Any) -> Any:
    """Returns nested dicts without branches that have no arrays."""
    if not isinstance(tree, Mapping):
        return tree
    kept = {key: _arrays(x) for key, x in tree.items() if jax.tree.leaves(x)}
    return {key: x for key, x in kept.items() if not isinstance(x, Mapping) or x}


def _recorded_scaling(source: OrbaxTree) -> dict[str, float | int]:
    """Returns rank and alpha as far as the custom metadata or an adapter_config.json has them.

    Raises:
        FormatError: one of them is not valid.
    """
    where, lora = f"{source}: custom_metadata", source.custom.get("lora")
    names = {"rank": "lora_rank", "alpha": "lora_alpha"}
    if lora is None:
        files = (folder / CONFIG for folder in (source.folder, source.folder.parent))
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            return {}
        where, lora = f"{file}:", read_adapter_config(file)
        names = {"rank": "r", "alpha": "lora_alpha"}
    if not isinstance(lora, Mapping):
        raise FormatError(
            f"{where} has lora of type {type(lora).__name__}; expected an object with lora_rank "
            "and lora_alpha"
        )
    checks = {"rank": check_rank, "alpha": check_alpha}
    return {
        option: checks[option](lora[name], f"{where} {name}")
        for option, name in names.items()
        if lora.get(name) is not None
    }


def stacked(adapter: Adapter) -> dict[str, Any]:
    """Returns an adapter as nested dicts of flax nnx, with layers of one shape stacked."""
    stacks: dict[str, dict[int, LoRA]] = {}
    leaves: dict[tuple[str, ...], Array] = {}

    def put(path: str, a: Array, b: Array) -> None:
        parts = tuple(path.split("."))
        leaves[*parts, "lora_a"], leaves[*parts, "lora_b"] = a, b

    for path, lora in adapter.read(adapter).items():
        layer = _LAYER.fullmatch(path)
        if layer:
            stacks.setdefault(f"{layer[1]}.{{}}.{layer[3]}", {})[int(layer[2])] = lora
        else:
            put(path, *_transposed(lora))
    for path, layers in stacks.items():
        whole = set(layers) == set(range(len(layers)))
        if whole and len({(lora.shape, lora.rank) for lora in layers.values()}) == 1:
            pairs = [_transposed(layers[i]) for i in range(len(layers))]
            put(path.replace(".{}", ""), *map(_stack, zip(*pairs, strict=True)))
        else:
            for i, lora in layers.items():
                put(path.format(i), *_transposed(lora))
    return flax.traverse_util.unflatten_dict(leaves)


def _transposed(lora: LoRA) -> tuple[Array, Array]:
    a, b = (x if is_spread(x) else np.asarray(x) for x in (lora.a, lora.b))
    return a.T, b.T


def _stack(layers: Sequence[Array]) -> Array:
    return jnp.stack(layers) if any(map(is_spread, layers)) else np.stack(layers)
