"""Orbax checkpoints to adapters and back. All calls to orbax are in this file.

It is imported late, as that takes time which those who merge PEFT folders need not wait.
"""

import dataclasses
import functools
import re
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from coremerge_jax import __version__
from coremerge_jax.checkpoint.atomic import atomic_folder
from coremerge_jax.checkpoint.peft.config import PeftConfig
from coremerge_jax.errors import FormatError
from coremerge_jax.layouts.axes import pad_rank
from coremerge_jax.lora import Adapter, LoRA, Metadata
from coremerge_jax.names import find_names, outline_tree
from coremerge_jax.trees import Places, Slot, TreeFormat, flatten, key_of, to_tree

MARKER = "_CHECKPOINT_METADATA"
_TREE = "_METADATA"  # in the folder of each tree of arrays
CONFIG = "adapter_config.json"

_STEP = re.compile(r"(?:.*_)?(\d+)")  # folder of a step
_LAYER = re.compile(r"(.*\b(?:layers?|blocks?|h))\.(\d+)\.(.+)")

# Where training stacks put trained parameters, in a checkpoint of several items.
_ITEMS = ("model_params", "lora", "state", "params", "items", "default", "pytree", "model")


class OrbaxFile(Adapter):
    """An adapter whose factors are still in its checkpoint, see `open_orbax`. Not a pytree."""

    def __init__(self, source: "_Source", places: Places, metadata: Metadata) -> None:
        super().__init__(places.outline(), metadata=metadata)
        self._slots = {path: slot for slot in places.slots for path in slot.paths}
        self._lock = threading.Lock()  # orbax runs an event loop of its own in each call

        # A stack is read as a whole, and its layers may be asked for in several batches.
        @functools.lru_cache(maxsize=1)
        def read(slot: Slot) -> dict[str, LoRA]:
            a, b = source.read(slot.keys)
            return slot.read(a, b, places.slots[slot])

        self._read = read

    def __getitem__(self, path: str) -> LoRA:
        return self.read([path])[path]

    def __contains__(self, path: object) -> bool:
        return path in self._slots

    def __repr__(self) -> str:
        return repr(self.outline)

    @property
    def outline(self) -> Adapter:
        """The adapter with shapes and dtypes in place of its factors."""
        return Adapter(self._modules, metadata=self.metadata)

    def read(self, paths: Iterable[str]) -> dict[str, LoRA]:
        """The modules with these paths.

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


class _Source:
    """One tree of a checkpoint.

    Attributes:
        folder: of the checkpoint.
        item: the name of the tree in it, None where it is the checkpoint itself.
        tree: with shapes and dtypes in place of arrays.
        custom: what was saved with it beside arrays.

    Raises:
        FormatError: it cannot be read, or leaves are not arrays though all have to be.
    """

    def __init__(self, folder: Path, item: str | None, *, only_arrays: bool = True) -> None:
        from orbax.checkpoint import v1 as ocp

        self.folder, self.item = folder, item
        try:
            found = ocp.metadata(folder, item)
        except Exception as error:
            raise FormatError(
                f"{self}: not a readable orbax checkpoint ({_line(error)})"
            ) from error
        for key, leaf in flatten(found.metadata).items():
            if only_arrays and not _is_array(leaf):
                raise FormatError(f"{self}: {key!r} is not an array")
        self.tree = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if _is_array(leaf) else leaf,
            found.metadata,
        )
        self.custom = found.custom_metadata or {}
        if not jax.tree.leaves(self.tree):
            raise FormatError(f"{self}: not a readable orbax checkpoint (no arrays found in it)")

    def __str__(self) -> str:
        return str(self.folder / (self.item or ""))

    def read(self, keys: Sequence[str]) -> list[np.ndarray]:
        """Arrays of the tree, on the host."""
        read = flatten(self.load(keys))
        return [np.asarray(read[key]) for key in keys]

    def load(self, keys: Collection[str] | None = None) -> Any:
        """The tree with NumPy arrays, which may be written to; those with these keys, or all.

        In the tree of all, arrays of uint32 are JAX's: so orbax gives random keys as what they are.
        """
        from orbax.checkpoint import v1 as ocp

        def want(path: tuple, leaf: Any) -> Any:
            if keys is not None and key_of(path) not in keys:
                return ocp.PLACEHOLDER
            if keys is None and getattr(leaf, "dtype", None) == np.uint32:
                return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_host())
            return (
                np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape) if _is_array(leaf) else leaf
            )

        wanted = jax.tree_util.tree_map_with_path(want, self.tree)
        try:
            return ocp.load(self.folder, wanted, checkpointable_name=self.item)
        except Exception as error:
            raise FormatError(f"{self}: cannot be read ({_line(error)})") from error

    def others(self) -> list[str]:
        """The other items of the checkpoint."""
        if self.item is None:
            return []
        found = (path.name for path in self.folder.iterdir() if path.is_dir())
        return sorted(name for name in found if name != self.item and not name.startswith("."))


def _host() -> jax.sharding.Sharding:
    try:
        devices = jax.local_devices(backend="cpu")
    except RuntimeError:  # where JAX_PLATFORMS does not name it
        devices = jax.local_devices()
    return jax.sharding.SingleDeviceSharding(devices[0])


def _is_array(leaf: Any) -> bool:
    return getattr(leaf, "shape", None) is not None


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
    its folder or the one above.

    Args:
        source: a checkpoint, or a folder of steps of a CheckpointManager.
        item: which of several trees; by default the one that training stacks keep parameters in.
        step: which of several steps; by default the last.
        name: a name for messages and tables; the name of the folder by default.
        **options: see `TreeFormat`, for what the checkpoint does not tell.

    Raises:
        FormatError: there is no such checkpoint, it is broken, or does not tell enough.
    """
    folder, item = _find(Path(source), step, item)
    tree = _Source(folder, item)
    for option, value in _told(tree).items():
        if options.setdefault(option, value) not in (None, value):
            raise FormatError(
                f"{tree}: {option}={options[option]} was given, but the checkpoint says {value}"
            )
    form = TreeFormat(**options)
    try:
        places = form.places(flatten(tree.tree))
    except FormatError as error:
        raise FormatError(f"{tree}: {error}") from error
    metadata = form.metadata(places, name or folder.name)
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

    Rank and alpha are saved as ``custom_metadata["lora"]``. What restores ``to`` or ``like`` has to
    be told this rank, the largest of the adapter's, and an alpha as large.

    Args:
        adapter: what to write.
        out: the folder to make.
        to: the implementation of a model family that shall restore it, of `names.NAME_MAPS`; names
            are translated from Hugging Face's. By default, factors ``lora_a (n, r)`` and
            ``lora_b (r, m)`` below the parts of each module's path, where layers of one shape are
            stacked along a first axis, not scaled, and in float32.
        head_dim: the size of an attention head, for ``to``.
        like: instead of ``to``, a checkpoint, or a tree of shapes and dtypes, whose keys, axes and
            dtypes to use.
        force: replace an existing checkpoint.
        **options: see `TreeFormat`, for what ``like`` does not tell.

    Raises:
        FormatError: ``out`` exists, or ``like`` cannot be understood.
        MismatchError: the adapter has not the modules of ``like``, or other names than ``to``.
        RecipeError: ``to`` is not known.
        UnsupportedError: ``head_dim`` is needed, or does not fit.
    """
    rank = max(lora.rank for lora in adapter.outline.values())
    if to is not None:
        names = find_names(to)
        adapter = names.from_hugging_face(adapter, head_dim=head_dim)
        like = outline_tree(adapter, names, head_dim)
        options |= {"layout": names.layout, "scan_axis": names.scan_axis}
        rank = max(lora.rank for lora in adapter.outline.values())
    if like is None:
        tree = stacked(adapter)
    else:
        if isinstance(like, str | Path):
            like = _Source(*_find(Path(like), None, None)).tree
        # With alpha = rank the scale is 1, whatever the layout.
        options = {**options, "alpha": float(rank), "rank": rank}
        tree = to_tree(_of_rank(adapter, rank), like, **options)
    custom = {
        "lora": {"lora_rank": rank, "lora_alpha": rank},
        "coremerge": {"version": __version__, "base_model": adapter.metadata.base_model},
    }
    with atomic_folder(out, markers=(MARKER,), force=force) as folder:
        write_tree(folder, tree, custom=custom)


def open_tree(source: str | Path, *, item: str | None = None, step: int | None = None) -> "_Source":
    """Opens any tree of parameters.

    Args:
        source: see `open_orbax`.
        item: see `open_orbax`.
        step: see `open_orbax`.

    Raises:
        FormatError: there is no such checkpoint, or it is broken.
    """
    return _Source(*_find(Path(source), step, item), only_arrays=False)


def write_tree(
    folder: Path, tree: Any, *, custom: Mapping[str, Any], item: str | None = None
) -> None:
    """Writes a checkpoint into an empty folder.

    Args:
        folder: which is there.
        tree: with arrays.
        custom: what to save with it beside arrays.
        item: the name of the tree in the checkpoint.
    """
    from orbax.checkpoint import v1 as ocp

    # Orbax makes a folder of its own.
    # As JAX arrays: what restores NumPy arrays as such has to say how they are sharded.
    host = _host()

    def put(x: Any) -> Any:
        if isinstance(x, np.ndarray) and jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype:
            return x  # as a JAX array, it would lose bits
        return jax.device_put(x, host) if _is_array(x) else x

    arrays = jax.tree.map(put, tree)
    named = {} if item is None else {"checkpointable_name": item}
    ocp.save(folder / "new", arrays, custom_metadata=dict(custom), **named)
    for path in (folder / "new").iterdir():
        path.rename(folder / path.name)
    (folder / "new").rmdir()


def _of_rank(adapter: Adapter, rank: int) -> Adapter:
    """All factors padded to a rank with zeros."""
    modules = {
        path: dataclasses.replace(lora, a=pad_rank(lora.a, -2, rank), b=pad_rank(lora.b, -1, rank))
        for path, lora in adapter.read(adapter).items()
    }
    return adapter.replace(modules=modules)


def _told(source: _Source) -> dict[str, float | int]:
    """Rank and alpha, where something beside the arrays says them."""
    lora = source.custom.get("lora")
    names = {"rank": "lora_rank", "alpha": "lora_alpha"}
    if not isinstance(lora, Mapping):
        files = (folder / CONFIG for folder in (source.folder, source.folder.parent))
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            return {}
        lora = PeftConfig.read(file).fields
        names = {"rank": "r", "alpha": "lora_alpha"}
    return {option: lora[name] for option, name in names.items() if name in lora}


def stacked(adapter: Adapter) -> dict[str, Any]:
    """An adapter as nested dicts, in the layout of flax nnx; layers of one shape are stacked."""
    stacks: dict[str, dict[int, LoRA]] = {}
    leaves: dict[tuple[str, ...], np.ndarray] = {}

    def put(path: str, a: np.ndarray, b: np.ndarray) -> None:
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
            put(path.replace(".{}", ""), *map(np.stack, zip(*pairs, strict=True)))
        else:
            for i, lora in layers.items():
                put(path.format(i), *_transposed(lora))
    return flax.traverse_util.unflatten_dict(leaves)


def _transposed(lora: LoRA) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(lora.a).T, np.asarray(lora.b).T


def is_orbax(source: str | Path) -> bool:
    """Whether a folder looks like an orbax checkpoint, or like one of several steps."""
    try:
        _find(Path(source), None, None)
    except (FormatError, OSError):
        return False
    return True


def _find(source: Path, step: int | None, item: str | None) -> tuple[Path, str | None]:
    """The folder of a checkpoint, and the name of the tree in it that holds parameters."""
    source = source.resolve()
    if not source.is_dir():
        raise FormatError(f"{source}: no such folder")
    items = _items(source)
    if not items:
        steps = {int(m[1]): path for path in source.iterdir() if (m := _STEP.fullmatch(path.name))}
        if step is not None and step not in steps:
            raise FormatError(f"{source}: no step {step}; there are {sorted(steps)}")
        if steps:
            source = steps[max(steps) if step is None else step]
            items = _items(source)
    if not items:
        raise FormatError(f"{source}: not an orbax checkpoint: no tree of arrays in it")
    if item is not None and item not in items:
        raise FormatError(f"{source}: no item {item!r}; there are {_listed(items)}")
    if item is None and len(items) > 1:
        known = [name for name in _ITEMS if name in items]
        if not known:
            raise FormatError(
                f"{source}: several items, {_listed(items)}; say which with item (coremerge "
                "convert --item)"
            )
        item = known[0]
    return source, item or items[0]


def _items(folder: Path) -> Sequence[str | None]:
    """The trees of arrays in a checkpoint: None stands for the checkpoint itself."""
    if (folder / _TREE).is_file():
        return [None]
    return sorted(path.name for path in folder.iterdir() if (path / _TREE).is_file())


def _listed(items: Sequence[str | None]) -> str:
    return ", ".join(map(repr, items))


def _line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
