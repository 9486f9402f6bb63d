"""Trees of arrays in orbax checkpoints. All calls to orbax are in this file.

It is imported late, as that takes time which those who merge PEFT folders need not wait.
"""

import contextlib
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from coremerge_jax.errors import FormatError, UnsupportedError
from coremerge_jax.grid import is_spread
from coremerge_jax.trees import flatten, key_of

MARKER = "_CHECKPOINT_METADATA"
_TREE = "_METADATA"  # in the folder of each tree of arrays

_STEP = re.compile(r"(?:.*_)?(\d+)")  # folder of a step
# Where training stacks put trained parameters, in a checkpoint of several items.
_ITEMS = ("model_params", "lora", "state", "params", "items", "default", "pytree", "model")


class OrbaxTree:
    """One tree of a checkpoint, see `open_tree`.

    Attributes:
        folder: of the checkpoint.
        item: the name of the tree in it, None where it is the checkpoint itself.
        tree: with shapes and dtypes in place of arrays.
        custom: what was saved with it beside arrays.
    """

    def __init__(self, folder: Path, item: str | None) -> None:
        from orbax.checkpoint import v1 as ocp

        self.folder, self.item = folder, item
        try:
            with _alone():
                found = ocp.metadata(folder, item)
        except Exception as error:
            raise FormatError(
                f"{self}: not a readable orbax checkpoint ({_line(error)})"
            ) from error
        self.tree = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_array(leaf) else leaf,
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
            return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape) if is_array(leaf) else leaf

        wanted = jax.tree_util.tree_map_with_path(want, self.tree)
        try:
            with _alone():
                return ocp.load(self.folder, wanted, checkpointable_name=self.item)
        except Exception as error:
            raise FormatError(f"{self}: cannot be read ({_line(error)})") from error

    def others(self) -> list[str]:
        """The other items of the checkpoint."""
        if self.item is None:
            return []
        found = (path.name for path in self.folder.iterdir() if path.is_dir())
        return sorted(name for name in found if name != self.item and not name.startswith("."))


def open_tree(source: str | Path, *, item: str | None = None, step: int | None = None) -> OrbaxTree:
    """Opens any tree of arrays: structure, shapes and dtypes are read.

    Args:
        source: a checkpoint, or a folder of steps of a CheckpointManager.
        item: which of several trees; by default the one that training stacks keep parameters in.
        step: which of several steps; by default the last.

    Raises:
        FormatError: there is no such checkpoint, or it is broken.
    """
    return OrbaxTree(*_find(Path(source), step, item))


def write_tree(
    folder: Path, tree: Any, *, custom: Mapping[str, Any], item: str | None = None
) -> None:
    """Writes a checkpoint into an empty folder; of several processes, each what it has.

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
        return jax.device_put(x, host) if is_array(x) else x

    arrays = jax.tree.map(_spread if jax.process_count() > 1 else put, tree)
    named = {} if item is None else {"checkpointable_name": item}
    ocp.save(folder / "new", arrays, custom_metadata=dict(custom), **named)
    if jax.process_index() == 0:
        for path in (folder / "new").iterdir():
            path.rename(folder / path.name)
        (folder / "new").rmdir()


def _spread(x: Any) -> Any:
    """What all processes have, cut among them as far as it can be; arrays of all stay as they are.

    Raises:
        UnsupportedError: JAX cannot have the array's dtype.
    """
    if not is_array(x) or is_spread(x):
        return x
    host = np.asarray(x)
    if jax.dtypes.canonicalize_dtype(host.dtype) != host.dtype:
        raise UnsupportedError(
            f"several processes can write {host.dtype} arrays in JAX's x64 mode only; enable it"
        )
    devices = np.asarray(jax.devices())
    fitting = [axis for axis, size in enumerate(host.shape) if size % len(devices) == 0]
    names = ["all" if axis in fitting[:1] else None for axis in range(host.ndim)]
    spec = jax.sharding.PartitionSpec(*names)
    sharding = jax.sharding.NamedSharding(jax.sharding.Mesh(devices, "all"), spec)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _alone() -> Any:
    """A scope in which orbax waits for no other process: each reads what it needs."""
    from orbax.checkpoint import v1 as ocp

    if not jax.distributed.is_initialized():
        return contextlib.nullcontext()
    here = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=here, active_processes={here}, barrier_sync_key_prefix=f"coremerge-{here}"
    )
    return ocp.Context(multiprocessing_options=options)


def _host() -> jax.sharding.Sharding:
    try:
        devices = jax.local_devices(backend="cpu")
    except RuntimeError:  # where JAX_PLATFORMS does not name it
        devices = jax.local_devices()
    return jax.sharding.SingleDeviceSharding(devices[0])


def is_array(leaf: Any) -> bool:
    """Whether a leaf of a tree is an array, or stands for one."""
    return getattr(leaf, "shape", None) is not None


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
