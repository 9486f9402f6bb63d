"""Folders and files that appear whole or not at all."""

import contextlib
import errno
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import jax

from coremerge_jax.errors import FormatError
from coremerge_jax.io.outputs import RECORD, check_file, check_output, find_foreign, find_left
from coremerge_jax.merging.processes import agreed, exchange, failing_together

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # on Windows


@contextlib.contextmanager
def atomic_folder(
    out: str | Path, *, kind: str, inputs: Iterable[str | Path] = (), force: bool = False
) -> Iterator[Path]:
    """Yields a temporary sibling folder to fill, which then becomes `out` in one rename.

    Whoever fills it ends with `outputs.write_record`. An existing `out` is moved aside, and deleted
    only when the new one is in place. After any exception, `out` is what it was and nothing else is
    left. What a killed run has left is tidied up: what it had moved aside comes back.

    Arguments and errors are those of `outputs.check_output`.
    """
    path = Path(os.path.realpath(out))
    _tidy(path)
    check_output(out, kind=kind, inputs=inputs, force=force)
    new, old = _siblings(path)
    missing = [folder for folder in path.parents if not folder.exists()]
    with contextlib.ExitStack() as locks, _naming(out, new):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            locks.enter_context(_made(new, new.mkdir))
            yield new
            if not (new / RECORD).is_file():
                raise RuntimeError(f"{new}: was filled without a {RECORD}")
            _sync(*new.rglob("*"), new)
            if os.path.lexists(path):
                check_output(path, kind=kind, force=force)
                locks.enter_context(_locked(path))
                path.rename(old)
                if reason := find_foreign(old, kind):  # it came since the last look
                    raise FormatError(f"{out}: {reason}, so it is not replaced")
            new.rename(path)
            _sync(path.parent)
            _delete(old, path)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            _put_back(old, path)
            for folder in missing:
                with contextlib.suppress(OSError):  # not empty
                    folder.rmdir()
            raise


def _put_back(old: Path, path: Path) -> None:
    """Ends a replacement that was cut short: the old folder comes back, unless there is a new one.

    Two may exist only where the new one is in place, or another process has put one there.
    """
    if not os.path.lexists(path):
        if os.path.lexists(old):  # on a read-only disk, a rename of nothing fails otherwise
            old.rename(path)
    elif old.is_dir() and not find_foreign(old):
        _delete(old, path)


def _delete(old: Path, path: Path) -> None:
    """Deletes what an output has replaced.

    It first gets the name of an unfinished output: a part of it, if this is killed, is nothing that
    may ever come back.
    """
    dead, _ = _siblings(path)
    try:
        with contextlib.suppress(FileNotFoundError):  # there was none to replace
            old.rename(dead)
    finally:
        shutil.rmtree(dead, ignore_errors=True)


@contextlib.contextmanager
def atomic_file(
    out: str | Path,
    *,
    mark: bytes | re.Pattern[bytes],
    inputs: Iterable[str | Path] = (),
    force: bool = False,
) -> Iterator[Path]:
    """Yields a temporary sibling file to write, which then becomes `out` in one rename.

    Arguments and errors are those of `outputs.check_file`.
    """
    path = check_file(out, mark=mark, inputs=inputs, force=force)
    _tidy(path)
    new, _ = _siblings(path)
    with contextlib.ExitStack() as locks, _naming(out, new):
        try:
            locks.enter_context(_made(new, partial(new.touch, exist_ok=False)))
            yield new
            _sync(new)
            check_file(path, mark=mark, force=force)
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)


@contextlib.contextmanager
def _naming(out: str | Path, new: Path) -> Iterator[None]:
    """Names the output in system errors about the temporary one, which the user does not know."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a copy names its source
        name = (full and error.filename2) or error.filename
        if error.errno and _is_below(new, name):
            error.filename, error.filename2 = str(out), None
        raise


def _siblings(path: Path) -> tuple[Path, Path]:
    """Returns two names beside an output that nobody can foresee: for the new and the old one."""
    name = f".{path.name}.{uuid.uuid4().hex[:12]}"
    return path.with_name(f"{name}.new"), path.with_name(f"{name}.old")


def _tidy(path: Path) -> None:
    """Deletes what killed runs have left beside an output; brings back what they had moved aside.

    Runs that are alive hold locks on theirs.
    """
    for kind, left in find_left(path):
        with _locked(left) as is_dead:
            if not is_dead:
                continue
            if kind == "old":
                _put_back(left, path)
            elif left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


@contextlib.contextmanager
def _made(new: Path, make: Callable[[], None]) -> Iterator[None]:
    """Makes a temporary folder or file, and holds its lock while the context lasts.

    Another run may take it for one of the dead before it is locked; then it is made again.
    """
    while True:
        make()
        with _locked(new):
            if new.exists():
                yield
                return


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Holds the lock of a folder or file, which the system releases however the process ends.

    Yields whether it is held: another process may have it, or the file system has no locks. Then
    nothing that was left here is ever deleted.
    """
    handle, held = None, False
    if fcntl is not None:
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
    try:
        yield held
    finally:
        if handle is not None:
            os.close(handle)


@contextlib.contextmanager
def change_folder(folder: str | Path) -> Iterator[None]:
    """Keeps other changes of a folder waiting, while it is read and then replaced.

    Waits for others first, and tidies up after killed ones. Where the file system has no locks, or
    there is no folder, it does nothing more.
    """
    path = Path(os.path.realpath(folder))
    _tidy(path)
    while fcntl is not None and path.is_dir():
        handle = os.open(path, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
            # While this waited, the other process has put another folder in its place.
            if path.is_dir() and os.path.samestat(os.fstat(handle), path.stat()):
                yield
                return
        finally:
            os.close(handle)
    yield


@contextlib.contextmanager
def shared_folder(
    out: str | Path, *, kind: str, inputs: Iterable[str | Path] = (), force: bool = False
) -> Iterator[Path]:
    """Yields an `atomic_folder` that all processes of a job fill, and that appears when all have.

    Raises:
        FormatError: see `outputs.check_output`; or processes do not share the file system.
        ProcessError: another process has failed.
    """
    with contextlib.ExitStack() as stack:
        with failing_together():
            made = None
            if jax.process_index() == 0:
                folder = atomic_folder(out, kind=kind, inputs=inputs, force=force)
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
