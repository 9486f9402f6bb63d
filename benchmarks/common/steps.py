"""Steps whose results are kept in files, and which are not done twice."""

import contextlib
import contextvars
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


class MissingError(LookupError):
    """A result that is not kept, while `reading`."""


_is_reading = contextvars.ContextVar("is_reading", default=False)


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Makes nothing meanwhile: `once` and `kept` raise `MissingError` for what is not there."""
    token = _is_reading.set(True)
    try:
        yield
    finally:
        _is_reading.reset(token)


def once(path: Path, make: Callable[[], object]) -> Path:
    """Makes a file or folder, unless it is there; returns its path."""
    if not path.exists():
        if _is_reading.get():
            raise MissingError(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        make()
    return path


def kept(folder: Path, name: str, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the result kept in a folder under a name, or makes and keeps it."""
    file = folder / f"{name}.json"

    def write() -> None:
        beside = file.with_suffix(".part")
        beside.write_text(json.dumps(make()))
        beside.rename(file)

    return json.loads(once(file, write).read_text())


def digest(adapters: Sequence[Path], values: Any = None) -> str:
    """Returns a name that changes with the files of adapters, and with values.

    Args:
        adapters: PEFT folders.
        values: anything that JSON can hold.
    """
    files = [x / "adapter_model.safetensors" for x in adapters]
    hashes = [_hash(x, x.stat().st_mtime_ns) for x in files]
    return hashlib.sha256(json.dumps([hashes, values]).encode()).hexdigest()[:12]


@functools.lru_cache
def _hash(file: Path, _: int) -> str:
    """Returns the hash of a file's content, which is read once for each time of its change."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def bits(answers: np.ndarray) -> str:
    """Returns booleans as a text of 0 and 1."""
    return "".join("01"[int(x)] for x in answers)


def from_bits(text: str) -> np.ndarray:
    """Returns what `bits` has made a text of."""
    return np.frombuffer(text.encode(), np.uint8) == ord("1")
