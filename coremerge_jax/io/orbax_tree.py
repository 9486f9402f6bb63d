"""Trees of arrays in orbax checkpoints. All calls to orbax are in this file.

It is imported late, as that takes time which those who merge PEFT folders need not wait.
"""

import contextlib
import contextvars
import errno
import os
import re
import stat
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from coremerge_jax.errors import CoreMergeWarning, FormatError, UnsupportedError
from coremerge_jax.io.untrusted import read_json, refuse_url
from coremerge_jax.merging.mesh import is_spread
from coremerge_jax.trees.paths import flatten, key_of

MARKER = "_CHECKPOINT_METADATA"

SCAN = ("scan_layers", "param_scan_axis", "scan_axis")  # of custom metadata, as MaxText has it

_TREE = "_METADATA"  # in the folder of each tree of arrays

_STEP = re.compile(r"(?:.*_)?(\d{1,18})", re.ASCII)  # folder of a step

_UNFINISHED = ".orbax-checkpoint-tmp"  # in the names of folders that orbax is still writing

_LONG = 200  # characters of others' messages

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
        _refuse_special_files(folder)
        try:
            if (folder / MARKER).exists():  # orbax would go on without what it says
                read_json(folder / MARKER, "an orbax checkpoint")
            with _alone():
                found = ocp.metadata(folder, item)
            self.tree = jax.tree.map(_outline, found.metadata)
        except FormatError:
            raise
        except Exception as error:
            raise FormatError(
                f"{self}: not a readable orbax checkpoint ({_line(error)})"
            ) from error
        self.custom = found.custom_metadata or {}
        if not isinstance(self.custom, Mapping):
            raise FormatError(
                f"{self}: custom_metadata is of type {type(self.custom).__name__}; expected an "
                "object, or none"
            )
        if not jax.tree.leaves(self.tree):
            raise FormatError(f"{self}: not a readable orbax checkpoint (no arrays found in it)")

    def __str__(self) -> str:
        return str(self.folder / (self.item or ""))

    @property
    def scan_axes(self) -> tuple[int | None, ...]:
        """The axes that layers may be stacked along, None for no stack; () if nothing tells it."""
        config = self.custom.get("config")
        told = {**(config if isinstance(config, Mapping) else {}), **self.custom}
        scanned, *axes = (told.get(name) for name in SCAN)
        if scanned is False:
            return (None,)
        known = tuple(axis for axis in axes if type(axis) is int and axis in (0, 1))
        return known or ((0, 1) if scanned is True else ())

    def read(self, keys: Sequence[str]) -> list[np.ndarray]:
        """Arrays of the tree, on the host."""
        read = flatten(self.load(keys))
        return [np.asarray(read[key]) for key in keys]

    def load(self, keys: Collection[str] | None = None) -> Any:
        """Loads the tree with NumPy arrays, which may be written to; those with these keys, or all.

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
        """Returns the other items of the checkpoint."""
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

    A last step that is not finished, as while it is being written, is passed over with a warning.

    Raises:
        FormatError: there is no such checkpoint, or it is broken.
    """
    folder, item = _find(Path(source), step, item)
    if step is None and _STEP.fullmatch(folder.name):
        _warn_of_unfinished(folder, Path(os.path.realpath(source)))
    return OrbaxTree(folder, item)


def _warn_of_unfinished(folder: Path, source: Path) -> None:
    """Says which step was opened, if it is not the last one in the folder that was given."""
    if folder.parent == source:
        last = _steps(source)[-1]
        if last != folder:
            warnings.warn(
                f"{last}: not finished, or cut off: trees are missing; read the last whole step, "
                f"{folder.name}",
                CoreMergeWarning,
                stacklevel=3,
            )


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
    with _system_errors(folder):
        _to_its_end(
            partial(ocp.save, folder / "new", arrays, custom_metadata=dict(custom), **named)
        )
    if jax.process_index() == 0:
        for path in (folder / "new").iterdir():
            path.rename(folder / path.name)
        (folder / "new").rmdir()


_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.ENAMETOOLONG)


@contextlib.contextmanager
def _system_errors(folder: Path) -> Iterator[None]:
    """Raises what the system refuses as one OSError: orbax's has hundreds of lines, and no number.

    Raises:
        OSError: the disk is full, or something like it.
    """
    try:
        yield
    except Exception as error:
        known = {os.strerror(number): number for number in _TROUBLE}
        known["RESOURCE_EXHAUSTED"] = errno.ENOSPC
        for text, number in known.items():
            if text in f"{error!r} {error}":
                raise OSError(number, os.strerror(number), str(folder)) from error
        raise


def _spread(x: Any) -> Any:
    """Splits what every process holds among them where it can; arrays of all stay as they are.

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


def _to_its_end(save: Callable[[], None]) -> None:
    """Saves; the exception of a signal that comes meanwhile is raised once orbax has ended.

    An exception inside of a save leaves threads of orbax that go on to write, or wait for ever.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="coremerge-save") as pool:
        pool.submit(contextvars.copy_context().run, save).result()


def _alone() -> Any:
    """Returns a scope in which orbax waits for no other process: each reads what it needs."""
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
    """Returns True if a leaf of a tree is an array, or stands for one."""
    return getattr(leaf, "shape", None) is not None


def _outline(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_array(leaf) else leaf


# --- Where the tree is ---------------------------------------------------------------------------
def is_orbax(source: str | Path) -> bool:
    """Tells whether a folder looks like an orbax checkpoint, or like one of several steps.

    One that is broken, or unfinished, does too.
    """
    folder = Path(source)
    try:
        if not folder.is_dir():
            return False
        if _is_marked(folder) or any(_items(step) or _is_marked(step) for step in _steps(folder)):
            return True
        return not any(folder.iterdir()) and _is_step_of_others(folder)
    except OSError:
        return False


def _is_marked(folder: Path) -> bool:
    """Tells whether orbax has written, or begun to write, a checkpoint or steps into a folder."""
    return (
        os.path.lexists(folder / MARKER)
        or bool(_items(folder))
        or any(_UNFINISHED in path.name for path in folder.iterdir())
    )


def _is_step_of_others(folder: Path) -> bool:
    """Tells whether there are other steps beside a folder, and trees in these."""
    folder = Path(os.path.realpath(folder))
    if not _STEP.fullmatch(folder.name):
        return False
    return any(_items(step) for step in _steps(folder.parent))


def _steps(folder: Path) -> list[Path]:
    """Returns the folders of steps, the first one first."""
    return [path for _, path in sorted(_numbered(folder).items())]


def _numbered(folder: Path) -> dict[int, Path]:
    names = ((_STEP.fullmatch(path.name), path) for path in sorted(folder.iterdir()))
    return {int(match[1]): path for match, path in names if match and path.is_dir()}


def _find(source: Path, step: int | None, item: str | None) -> tuple[Path, str | None]:
    """Returns the folder of a checkpoint, and the name of the tree in it that holds parameters."""
    refuse_url(source)
    if not source.is_dir():
        what = "a link that leads nowhere" if source.is_symlink() else "no such folder"
        raise FormatError(f"{source}: {what}")
    source = Path(os.path.realpath(source))
    items = _items(source)
    if not items:
        source = _find_step(source, step)
        items = _items(source)
    elif step is not None and not _is_step(source, step):
        raise FormatError(f"{source}: one checkpoint, without steps; leave step ({step}) out")
    if items == [None] and not (source / MARKER).exists() and (source.parent / MARKER).exists():
        source, items = source.parent, [source.name]  # an item's own folder was given
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


def _is_step(folder: Path, step: int) -> bool:
    names = (folder.name, folder.parent.name)
    return any((found := _STEP.fullmatch(name)) and int(found[1]) == step for name in names)


def _find_step(source: Path, step: int | None) -> Path:
    """Returns the folder of a step: of the last one that is whole, unless one is asked for.

    Raises:
        FormatError: there is no such step, or it is not whole.
    """
    steps = _numbered(source)
    whole = [number for number, path in steps.items() if _is_whole(path, steps.values())]
    last = f"; the last whole step is {max(whole)}" if whole else ""
    if step is not None:
        if step not in steps:
            raise FormatError(f"{source}: no step {step}; there are {sorted(steps)}")
        if step not in whole:
            raise FormatError(f"{steps[step]}: not finished, or cut off: trees are missing{last}")
        return steps[step]
    if not whole:
        if steps or _is_marked(source):
            what = "whole step" if steps else f"tree of arrays ({_TREE})"
            raise FormatError(f"{source}: not finished, or cut off: no {what} in it")
        if _is_step_of_others(source):
            found = _find_step(source.parent, None)
            raise FormatError(
                f"{source}: not finished, or cut off: no tree of arrays in it; the last whole "
                f"step is {found}"
            )
        raise FormatError(f"{source}: not an orbax checkpoint: no tree of arrays in it")
    return steps[max(whole)]


def _is_whole(step: Path, steps: Collection[Path]) -> bool:
    """Tells whether a step has all trees that it has begun, as far as other steps show that."""
    items = _items(step)
    names = {name for other in steps for name in _items(other) if name is not None}
    begun = {name for name in names if (step / name).is_dir()}
    unfinished = any(_UNFINISHED in path.name for path in step.iterdir())
    return bool(items) and begun <= set(items) and not unfinished


def _items(folder: Path) -> list[str | None]:
    """Returns the trees of arrays in a checkpoint: None stands for the checkpoint itself."""
    if os.path.lexists(folder / _TREE):
        return [None]
    found = sorted(path.name for path in folder.iterdir() if os.path.lexists(path / _TREE))
    return [name for name in found if _UNFINISHED not in name]


def _listed(items: Sequence[str | None]) -> str:
    return ", ".join(repr(name or "the checkpoint itself") for name in items)


# --- What is in its files ------------------------------------------------------------------------
def walk(folder: Path) -> Iterator[tuple[Path, int | None]]:
    """Yields all that is in a folder but folders; those that links lead to are entered once.

    Gives:
        Each path, and its mode as `stat` has it, None where a link leads nowhere.
    """
    waiting, seen = [folder], {_identity(folder.stat())}
    while waiting:
        for path in sorted(waiting.pop().iterdir()):
            try:
                status = path.stat()
            except OSError:
                yield path, None
                continue
            if not stat.S_ISDIR(status.st_mode):
                yield path, status.st_mode
            elif _identity(status) not in seen:
                seen.add(_identity(status))
                waiting.append(path)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _refuse_special_files(folder: Path) -> None:
    """Refuses what would block, or never end, when orbax reads it."""
    for path, mode in walk(folder):
        if mode is None:
            raise FormatError(f"{path}: a link that leads nowhere; copy the checkpoint again")
        if not stat.S_ISREG(mode):
            raise FormatError(
                f"{path}: no regular file but {_special(mode)}; a checkpoint has files and folders "
                "only"
            )


def _special(mode: int) -> str:
    kinds = {"FIFO": stat.S_ISFIFO, "SOCK": stat.S_ISSOCK, "CHR": stat.S_ISCHR, "BLK": stat.S_ISBLK}
    names = {"FIFO": "a FIFO", "SOCK": "a socket", "CHR": "a device", "BLK": "a device"}
    return next((names[kind] for kind, test in kinds.items() if test(mode)), "something else")


def _line(error: Exception) -> str:
    """Returns the first line of others' message, without the settings that tensorstore adds."""
    lines = (line.strip() for line in str(error).splitlines())
    line = next((line for line in lines if line), type(error).__name__)
    line = line.partition(" [tensorstore_spec")[0].partition(" [source locations")[0]
    return line if len(line) <= _LONG else f"{line[:_LONG]} …"
