"""The log of a sweep: one line a record, so that a sweep that was killed can go on."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self, TextIO

import numpy as np

from coremerge_jax.errors import CoreMergeError, FormatError, MismatchError
from coremerge_jax.search.parameters import Parameters
from coremerge_jax.text import shortened

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # on Windows

# Relative; more than rounding errors of other machines, less than any change of an adapter makes.
_EXACT = {"float64": 1e-6, "float32": 1e-4}

_ELSEWHERE = "choose another file"

_NO_LOG = f"not the log of a sweep; {_ELSEWHERE}"


class Log:
    """Records in a file of JSON lines; the first line has the subject of the sweep.

    Args:
        path: the file; None for no log.
        subject: what the records depend on, as JSON-like data.
        traits: ``(3, T)``, numbers that identify the adapters, from `Projected.traits`.
        dtype: in which they were computed.

    Raises:
        FormatError: the file is not a log of a sweep.
        MismatchError: it is that of another sweep, or another process is writing it.
    """

    def __init__(
        self,
        path: str | Path | None,
        subject: Mapping[str, Any],
        traits: np.ndarray,
        dtype: np.dtype,
    ) -> None:
        self._path = None if path is None else Path(path)
        self._traits, self._exact = traits, _EXACT[dtype.name]
        # As they come back from the file.
        self._header = json.loads(json.dumps({"sweep": dict(subject), "traits": traits.tolist()}))
        self._known: dict[str, dict[str, Any]] = {}
        self._file: TextIO | None = None

    def __enter__(self) -> Self:
        if self._path is not None:
            self._file = self._path.open("a", encoding="utf-8")
            try:
                self._lock(self._file)
                if not self._read(self._path):
                    self._write(self._header)
            except BaseException:
                self._file.close()
                raise
        return self

    def _lock(self, file: TextIO) -> None:
        """Locks the file, which the system releases however the process ends."""
        if fcntl is None:
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise MismatchError(
                f"{self._path}: another sweep is writing its log here; wait for it, or {_ELSEWHERE}"
            ) from error
        except OSError:  # a file system without locks
            return

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file:
            self._file.close()

    def find(self, name: str, parameters: Parameters) -> dict[str, Any] | None:
        """Returns the metrics and seconds of a candidate, if the log has them."""
        return self._known.get(identity(name, parameters))

    def add(
        self, name: str, parameters: Parameters, metrics: Mapping[str, float], seconds: float
    ) -> None:
        """Appends a record."""
        row = {"rule": name, "parameters": parameters, "metrics": metrics}
        self._write({**row, "seconds": round(seconds, 4)})

    def _write(self, row: Mapping[str, Any]) -> None:
        if not self._file:
            return
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        except OSError as error:
            error.filename = str(self._path)  # a failed write does not name its file
            raise

    def _read(self, path: Path) -> bool:
        """Reads the records, and drops an incomplete last line; returns False if there is none."""
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            return False
        complete = text[: text.rfind(b"\n") + 1]
        # Without a whole line, only the start of this header shows that a sweep wrote it.
        if not complete and not json.dumps(self._header).encode().startswith(text):
            raise FormatError(f"{path}: {_NO_LOG}")
        try:
            rows = [json.loads(line) for line in complete.splitlines()]
            header, *records = rows or [self._header]
            self._check(header)
            self._known = {identity(x["rule"], x["parameters"]): x for x in records}
            for number, record in enumerate(records, 2):
                _check_record(path, number, record)
        except CoreMergeError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise FormatError(f"{path}: {_NO_LOG}") from error
        if complete != text:
            os.truncate(path, len(complete))
        return bool(rows)

    def _check(self, header: Mapping[str, Any]) -> None:
        """Refuses the log of another sweep."""
        theirs, ours = header["sweep"], self._header["sweep"]
        for what in dict.fromkeys([*ours, *theirs]):
            if theirs.get(what) != ours.get(what):
                before, now = (shortened(str(x.get(what)), 100) for x in (theirs, ours))
                self._refuse(f"{what} ({before}, now {now})")
        found, expected = np.asarray(header["traits"], np.float64), self._traits
        if found.shape != expected.shape:
            self._refuse("adapters (another number of them)")
        norms = np.sqrt(expected[0])
        sizes = norms**2, norms * np.sum(norms), expected[2]
        far = ~(np.abs(found - expected) <= self._exact * np.stack(sizes))
        for what, is_other in zip(
            ("adapters", "adapters or weights", "statistics"), far, strict=True
        ):
            if is_other.any():
                place = int(np.argmax(is_other))
                self._refuse(f"{what} (adapter {place + 1} is not the same)")

    def _refuse(self, other: str) -> NoReturn:
        raise MismatchError(f"{self._path}: the log of a sweep with other {other}; {_ELSEWHERE}")


def _check_record(path: Path, number: int, record: Mapping[str, Any]) -> None:
    """Refuses metrics that are no numbers; NaN is allowed, for a candidate that failed."""
    values = {**record["metrics"], "seconds": record["seconds"]}
    for name, value in values.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise FormatError(
                f"{path}: line {number} has {value!r:.60} as {name!r}; expected a number; delete "
                f"this line, or {_ELSEWHERE}"
            )


def identity(name: str, parameters: Parameters) -> str:
    """Returns a text that identifies a candidate."""
    return json.dumps([name, dict(parameters)], sort_keys=True)
