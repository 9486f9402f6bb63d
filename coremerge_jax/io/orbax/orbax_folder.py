"""Folders of orbax checkpoints: their steps and trees, found by the names of files.

Neither JAX nor orbax is imported here, so that other formats need not wait for them.
"""

import os
import re
import stat
import warnings
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from coremerge_jax.errors import CoreMergeWarning, FormatError
from coremerge_jax.io.untrusted import kind_of, refuse_url

MARKER = "_CHECKPOINT_METADATA"
TREE = "_METADATA"  # in the folder of each tree of arrays
_STEP = re.compile(r"(?:.*_)?(\d{1,18})", re.ASCII)  # folder of a step
_UNFINISHED = ".orbax-checkpoint-tmp"  # in the names of folders that orbax is still writing

# Where training stacks put trained parameters, in a checkpoint of several items.
_ITEMS = ("model_params", "lora", "state", "params", "items", "default", "pytree", "model")

# Implementations of model families, of `trees.families.NAME_MAPS`, which needs JAX.
FAMILIES = ("tunix", "tunix-gemma", "gemma", "maxtext-llama3.1", "maxtext-qwen")

# Options that describe a tree: of a checkpoint that is read, or of one that is written like it.
TREE_OPTIONS = ("layout", "scan_axis", "axes", "ignore", "whole")


def is_orbax(source: str | Path) -> bool:
    """Returns True if a folder looks like an orbax checkpoint, or like one of several steps.

    A broken or unfinished one does, too.
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
    """Returns True if orbax has written, or begun to write, a checkpoint or steps into a folder."""
    return (
        os.path.lexists(folder / MARKER)
        or bool(_items(folder))
        or any(_UNFINISHED in path.name for path in folder.iterdir())
    )


def _is_step_of_others(folder: Path) -> bool:
    """Returns True if there are other steps beside a folder, and trees in these."""
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


def find_tree(source: Path, step: int | None, item: str | None) -> tuple[Path, str | None]:
    """Returns the folder of a checkpoint, and the name of the tree in it that holds parameters.

    A last step that is not finished, as while it is being written, is passed over with a warning.

    Raises:
        FormatError: there is no such checkpoint, step or item, or it is not whole.
    """
    refuse_url(source)
    if not source.is_dir():
        what = "a link that leads nowhere" if source.is_symlink() else "no such folder"
        raise FormatError(f"{source}: {what}")
    source = Path(os.path.realpath(source))
    items = _items(source)
    if not items:
        newest, source = _steps(source)[-1:], _find_step(source, step)
        items = _items(source)
        if step is None and newest != [source]:
            warnings.warn(
                f"{newest[0]}: not finished, or cut off: trees are missing; read the last whole "
                f"step, {source.name}",
                CoreMergeWarning,
                stacklevel=4,
            )
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
            what = "whole step" if steps else f"tree of arrays ({TREE})"
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
    """Returns True if a step has all trees that it has begun, as far as other steps show that."""
    items = _items(step)
    names = {name for other in steps for name in _items(other) if name is not None}
    begun = {name for name in names if (step / name).is_dir()}
    unfinished = any(_UNFINISHED in path.name for path in step.iterdir())
    return bool(items) and begun <= set(items) and not unfinished


def _items(folder: Path) -> list[str | None]:
    """Returns the trees of arrays in a checkpoint: None stands for the checkpoint itself."""
    if os.path.lexists(folder / TREE):
        return [None]
    found = sorted(path.name for path in folder.iterdir() if os.path.lexists(path / TREE))
    return [name for name in found if _UNFINISHED not in name]


def _listed(items: Sequence[str | None]) -> str:
    return ", ".join(repr(name or "the checkpoint itself") for name in items)


def walk(folder: Path) -> Iterator[tuple[Path, int | None]]:
    """Yields what is in a folder, but for folders, with its mode; None for a broken link.

    A folder that links lead to is entered once.
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


def refuse_special_files(folder: Path) -> None:
    """Refuses what would block, or never end, when orbax reads it."""
    for path, mode in walk(folder):
        if mode is None:
            raise FormatError(f"{path}: a link that leads nowhere; copy the checkpoint again")
        if not stat.S_ISREG(mode):
            raise FormatError(
                f"{path}: {kind_of(mode)}, not a regular file; a checkpoint has files and folders "
                "only"
            )
