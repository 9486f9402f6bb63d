"""Trees of arrays in orbax checkpoints. All calls to orbax are in this file.

It is imported late, as that takes time which those who merge PEFT folders need not wait.
"""

import contextlib
import contextvars
import errno
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from coremerge_jax.errors import FormatError, UnsupportedError
from coremerge_jax.io.orbax.orbax_folder import MARKER, find_tree, refuse_special_files
from coremerge_jax.io.untrusted import read_json
from coremerge_jax.merging.mesh import is_spread
from coremerge_jax.trees.paths import flatten, map_leaves

SCAN = ("scan_layers", "param_scan_axis", "scan_axis")  # of custom metadata, as MaxText has it
_LONG = 200  # characters of others' messages


class OrbaxTree:
    """One tree of a checkpoint, opened by `open_tree`.

    Attributes:
        folder: folder of the checkpoint.
        item: name of the tree in it, None if it is the checkpoint itself.
        tree: the tree with shapes and dtypes in place of arrays.
        custom: its custom metadata.
    """

    def __init__(self, folder: Path, item: str | None) -> None:
        from orbax.checkpoint import v1 as ocp

        self.folder, self.item = folder, item
        refuse_special_files(folder)
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
        """The axes that layers may be stacked along (None: not stacked); () if it is unknown."""
        config = self.custom.get("config")
        told = {**(config if isinstance(config, Mapping) else {}), **self.custom}
        scanned, *axes = (told.get(name) for name in SCAN)
        if scanned is False:
            return (None,)
        known = tuple(axis for axis in axes if type(axis) is int and axis in (0, 1))
        return known or ((0, 1) if scanned is True else ())

    def read(self, keys: Sequence[str]) -> list[np.ndarray]:
        """Returns arrays of the tree, on the host."""
        read = flatten(self.load(keys))
        return [np.asarray(read[key]) for key in keys]

    def load(self, keys: Collection[str] | None = None) -> Any:
        """Loads the tree, or the arrays with these keys, as writable NumPy arrays.

        With all keys, arrays of uint32 are JAX arrays, so that orbax restores PRNG keys as keys.
        """
        from orbax.checkpoint import v1 as ocp

        def want(key: str, leaf: Any) -> Any:
            if keys is not None and key not in keys:
                return ocp.PLACEHOLDER
            if keys is None and getattr(leaf, "dtype", None) == np.uint32:
                return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_host())
            return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape) if is_array(leaf) else leaf

        wanted = map_leaves(want, self.tree)
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
        item: the tree to read if there are several; by default the one that training stacks keep
            parameters in.
        step: the step to read; by default the last that is finished.

    Raises:
        FormatError: there is no such checkpoint, or it is broken.
    """
    return OrbaxTree(*find_tree(Path(source), step, item))


def write_tree(
    folder: Path, tree: Any, *, custom: Mapping[str, Any], item: str | None = None
) -> None:
    """Writes a checkpoint into an empty folder; each of several processes writes what it has.

    Args:
        folder: an existing, empty folder.
        tree: a tree of arrays.
        custom: custom metadata, as JSON has it.
        item: name of the tree in the checkpoint.
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


_TROUBLE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EIO,
    errno.ENAMETOOLONG,
)


@contextlib.contextmanager
def _system_errors(folder: Path) -> Iterator[None]:
    """Turns orbax's errors about a refusing system (hundreds of lines) into one OSError.

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
    """Splits an array that every process holds among all devices, if its shape allows it.

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
    """Saves in a thread, so that a signal's exception is raised only when orbax has ended.

    An exception within a save leaves threads of orbax that go on writing, or wait for ever.
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


def _line(error: Exception) -> str:
    """Returns the first line of a library's message, without the settings that tensorstore adds."""
    lines = (line.strip() for line in str(error).splitlines())
    line = next((line for line in lines if line), type(error).__name__)
    line = line.partition(" [tensorstore_spec")[0].partition(" [source locations")[0]
    return line if len(line) <= _LONG else f"{line[:_LONG]} …"
