"""The log of a sweep: one line a record, so that what is killed can go on."""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import numpy as np

from coremerge_jax.errors import CoreMergeError, FormatError, MismatchError

_NORMS = 1e-3  # relative; far more than rounding errors of other machines, far less than training


class Log:
    """Records in a file of JSON lines, of which the first tells what is swept.

    Args:
        path: the file; None keeps nothing.
        subject: what the records depend on, as JSON-like data.
        norms: ``(T,)``, those of the adapters, by which they are known.

    Raises:
        FormatError: the file is not a log of a sweep.
        MismatchError: it is that of another sweep.
    """

    def __init__(self, path: str | Path | None, subject: Mapping[str, Any], norms: np.ndarray):
        self._path = None if path is None else Path(path)
        self._header: dict[str, Any] = {
            "sweep": dict(subject),
            "norms": [float(f"{x:.6g}") for x in norms],
        }
        self._known: dict[str, dict[str, Any]] = {}
        self._file: TextIO | None = None

    def __enter__(self) -> Self:
        if self._path is not None:
            is_new = not self._read(self._path)
            self._file = self._path.open("a", encoding="utf-8")
            if is_new:
                self._write(self._header)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file:
            self._file.close()

    def find(self, name: str, parameters: Mapping[str, Any]) -> dict[str, Any] | None:
        """Returns the metrics and seconds of a candidate, if they are known."""
        return self._known.get(identity(name, parameters))

    def add(
        self, name: str, parameters: Mapping[str, Any], metrics: Mapping[str, float], seconds: float
    ) -> None:
        """Notes a record."""
        if self._file:
            row = {"rule": name, "parameters": parameters, "metrics": metrics}
            self._write({**row, "seconds": round(seconds, 4)})

    def _write(self, row: Mapping[str, Any]) -> None:
        assert self._file
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        except OSError as error:
            error.filename = str(self._path)  # a failed write does not say where
            raise

    def _read(self, path: Path) -> bool:
        """Reads what is there, and drops a line that is not complete; false if nothing is."""
        with contextlib.suppress(FileNotFoundError):
            text = path.read_bytes()
            complete = text[: text.rfind(b"\n") + 1]
            # Without a whole line, only the start of this header shows that a sweep wrote it.
            if not complete and not json.dumps(self._header).encode().startswith(text):
                raise FormatError(f"{path}: not the log of a sweep; choose another file")
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
                raise FormatError(f"{path}: not the log of a sweep; choose another file") from error
            if complete != text:
                os.truncate(path, len(complete))
            return bool(rows)
        return False

    def _check(self, header: Mapping[str, Any]) -> None:
        theirs, ours = header["sweep"], self._header["sweep"]
        for what in dict.fromkeys([*ours, *theirs]):
            if theirs.get(what) != ours.get(what):
                raise MismatchError(
                    f"{self._path}: the log of a sweep of other {what} ({theirs.get(what)}, now "
                    f"{ours.get(what)}); choose another file"
                )
        norms, expected = np.asarray(header["norms"]), np.asarray(self._header["norms"])
        if norms.shape != expected.shape or not np.allclose(norms, expected, rtol=_NORMS):
            raise MismatchError(
                f"{self._path}: the log of a sweep of other adapters (their norms were "
                f"{norms.tolist()}, now {expected.tolist()}); choose another file"
            )


def _check_record(path: Path, number: int, record: Mapping[str, Any]) -> None:
    """Refuses metrics that are no numbers. NaN is one: a candidate may have failed."""
    values = {**record["metrics"], "seconds": record["seconds"]}
    for name, value in values.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise FormatError(
                f"{path}: line {number} has {value!r:.60} as {name!r}; expected a number; delete "
                "this line, or choose another file"
            )


def identity(name: str, parameters: Mapping[str, Any]) -> str:
    """Returns a text that is different for every two candidates."""
    return json.dumps([name, dict(parameters)], sort_keys=True)
