"""The user's function that judges candidates of a sweep, as ``FILE.py:FUNCTION``."""

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from traceback import extract_tb
from types import ModuleType
from typing import TYPE_CHECKING, Any

from coremerge_jax.cli.signals import Ended
from coremerge_jax.errors import CoreMergeError, RecipeError, unknown
from coremerge_jax.io.outputs import fingerprint

if TYPE_CHECKING:
    from coremerge_jax.lora import Adapter


def load_judge(text: str) -> "Callable[[Adapter], Any]":
    """Returns the function that ``FILE.py:FUNCTION`` or ``module:function`` names.

    An error in it becomes one line with its place in the file.

    Raises:
        CoreMergeError: the file or module fails when it runs.
        RecipeError: there is no such file, module or function.
    """
    source, _, name = text.rpartition(":")
    if not source:
        raise RecipeError(f"evaluate {text!r}: expected FILE.py:FUNCTION or module:function")
    with _located_errors(text):
        found = _load_module(text, source)
    judge = getattr(found, name, None)
    if not callable(judge):
        names = [x for x, value in vars(found).items() if callable(value) and x[0] != "_"]
        raise unknown(f"function in {source}:", name, names)

    @wraps(judge)
    def run(merged: "Adapter") -> Any:
        with _located_errors(text):
            return judge(merged)

    return run


def describe_judge(text: str) -> dict[str, str]:
    """Returns what identifies a function that `load_judge` has loaded: its name, and its file."""
    source, _, _ = text.rpartition(":")
    digest = {"sha256": fingerprint(Path(source).resolve())} if source.endswith(".py") else {}
    return {"function": text, **digest}


def _load_module(text: str, source: str) -> ModuleType:
    if not source.endswith(".py"):
        sys.path.insert(0, str(Path.cwd()))
        if find_spec(source.partition(".")[0]) is None:
            raise RecipeError(f"evaluate {text!r}: no module {source!r} here or installed")
        return importlib.import_module(source)
    path = Path(source)
    if not path.is_file():
        raise RecipeError(f"evaluate {text!r}: there is no file {source}")
    sys.path.insert(0, str(path.resolve().parent))  # as Python does for scripts
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def _located_errors(text: str) -> Iterator[None]:
    """Turns an error in the user's code into one line with its place and message."""
    try:
        yield
    except (CoreMergeError, Ended):
        raise
    except (Exception, SystemExit) as error:
        if os.environ.get("COREMERGE_DEBUG"):
            raise
        place = _place(error, text.rpartition(":")[0])
        message = f"{type(error).__name__}: {error}".rstrip(": ")
        raise CoreMergeError(
            f"evaluate {text!r}{place} failed: {message}; correct it (COREMERGE_DEBUG=1 shows the "
            "traceback)"
        ) from error


def _place(error: BaseException, source: str) -> str:
    """Returns `` (line 3, in accuracy)`` for the last line of the user's file that ran, if any."""
    if isinstance(error, SyntaxError) and error.lineno:
        return f" (line {error.lineno})"
    stem = source.removesuffix(".py").replace(".", os.sep).rpartition(os.sep)[2]
    frames = [x for x in extract_tb(error.__traceback__) if Path(x.filename).stem == stem]
    return f" (line {frames[-1].lineno}, in {frames[-1].name})" if frames else ""
