"""The errors that a user can meet. Each message names the culprit and says what to do."""

import difflib
import itertools
import re
from collections.abc import Iterable

_COMPARED = 10_000  # names, for a message


class CoreMergeError(ValueError):
    """Base of every error that this library raises on purpose."""


class FormatError(CoreMergeError):
    """A file or array is malformed: truncated, of the wrong shape, not finite, or incomplete."""


class UnsupportedError(CoreMergeError):
    """A well-formed input that cannot be merged correctly, refused by name."""


class MismatchError(CoreMergeError):
    """Inputs that are fine one by one but do not fit together."""


class RecipeError(CoreMergeError):
    """A rule, space, parameter or option that does not exist, or a value that it cannot have."""


class CoreMergeWarning(UserWarning):
    """Something that is allowed, and may not be what was meant. Commands print it as a note."""


class ProcessError(CoreMergeError):
    """Another process of the same job has failed."""


def nearest(name: str, names: Iterable[str], count: int = 1) -> list[str]:
    """Returns the names most like this one; of those that differ in numbers alone, the first."""
    unlike: dict[str, str] = {}
    for other in itertools.islice(names, _COMPARED):
        unlike.setdefault(_general(other), other)
    close = difflib.get_close_matches(_general(name), unlike, n=count, cutoff=0)
    return [unlike[key] for key in close]


def hint(name: str, names: Iterable[str]) -> str:
    """Returns the part of a message that suggests the nearest name; empty if there is none."""
    return "".join(f"; nearest is {found!r}" for found in nearest(name, names))


def _general(name: str) -> str:
    return re.sub(r"\d+", "0", name)


def unknown(what: str, name: object, known: Iterable[str]) -> RecipeError:
    """Returns the error for a name not among ``known``: it suggests the nearest, or lists all."""
    known, shown = list(known), f"{name!s:.100}"
    near = difflib.get_close_matches(shown, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"expected one of: {', '.join(known)}"
    return RecipeError(f"unknown {what} {shown!r}; {hint}")
