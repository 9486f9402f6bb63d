"""Folders that appear whole or not at all."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import jax

from coremerge_jax.errors import FormatError
from coremerge_jax.processes import agreed, exchange, failing_together


def check_output(out: str | Path, *, markers: tuple[str, ...], force: bool = False) -> Path:
    """The absolute path of an output folder that may be written.

    Args:
        out: the folder to write.
        markers: files that together tell a folder of ours from any other folder.
        force: whether an existing folder with the markers may be replaced.

    Raises:
        FormatError: the output exists and may not be replaced.
    """
    path = Path(os.path.realpath(out))
    if not path.exists():
        return path
    if not path.is_dir():
        raise FormatError(f"{out}: exists and is not a folder; choose another output")
    if not force:
        raise FormatError(f"{out}: already exists; choose another output, or --force it")
    missing = [marker for marker in markers if not (path / marker).is_file()]
    if missing and any(path.iterdir()):
        raise FormatError(
            f"{out}: has no {missing[0]}, so it is not replaced; choose another output"
        )
    return path


@contextlib.contextmanager
def atomic_folder(
    out: str | Path, *, markers: tuple[str, ...], force: bool = False, label: str | None = None
) -> Iterator[Path]:
    """Yields a temporary sibling folder to fill, which then becomes `out` in one rename.

    An existing `out` is moved aside, and deleted only when the new one is in place. After any
    exception, `out` is what it was and nothing else is left.

    Args:
        out: the folder to write.
        markers: files that together tell a folder of ours from any other folder.
        force: whether an existing folder with the markers may be replaced.
        label: for the name of the temporary folder, which is unique by default. What a killed run
            has left by this name is deleted.

    Raises:
        FormatError: the output exists and may not be replaced.
    """
    path = Path(os.path.realpath(out))
    name = f".{path.name}.{label or uuid.uuid4().hex[:12]}"
    new, old = path.with_name(name + ".new"), path.with_name(name + ".old")
    _tidy(new, old, path)
    check_output(out, markers=markers, force=force)
    missing = [folder for folder in path.parents if not folder.exists()]
    try:
        new.mkdir(parents=True)
        yield new
        _sync(*new.rglob("*"), new)
        if path.exists():
            check_output(path, markers=markers, force=force)
            path.rename(old)
        new.rename(path)
        _sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        if old.exists() and not path.exists():
            old.rename(path)
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)
        if not path.exists():
            for folder in missing:
                with contextlib.suppress(OSError):
                    folder.rmdir()
        if isinstance(error, OSError) and error.errno and _is_below(new, error.filename):
            error.filename = str(out)  # the user knows nothing of the temporary folder
        raise


def _tidy(new: Path, old: Path, path: Path) -> None:
    """Deletes what a killed run has left, but for what it had moved aside and not replaced."""
    shutil.rmtree(new, ignore_errors=True)
    if old.exists() and not path.exists():
        old.rename(path)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def shared_folder(
    out: str | Path, *, markers: tuple[str, ...], force: bool = False
) -> Iterator[Path]:
    """`atomic_folder` for all processes of a job: it appears when all of them have filled it.

    Args:
        out: see `atomic_folder`.
        markers: see `atomic_folder`.
        force: see `atomic_folder`.

    Raises:
        FormatError: the output exists and may not be replaced, or processes do not share its
            file system.
        ProcessError: another process has failed.
    """
    with contextlib.ExitStack() as stack:
        with failing_together():
            made = None
            if jax.process_index() == 0:
                folder = atomic_folder(out, markers=markers, force=force, label="shared")
                made = str(stack.enter_context(folder))
        new = Path(exchange(made)[0])
        with agreed():
            if not new.is_dir():
                raise FormatError(
                    f"{out}: process {jax.process_index()} does not see the folder that process 0 "
                    "has made there; choose an output on a file system that all processes share"
                )
            yield new
        with agreed():
            stack.close()


def _is_below(folder: Path, name: str | None) -> bool:
    return name is None or folder in (Path(name), *Path(name).parents)


def _sync(*paths: Path) -> None:
    """Waits until files and folders are on disk, where the system can do that."""
    for path in paths:
        if path.is_dir() and os.name == "nt":
            continue
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
