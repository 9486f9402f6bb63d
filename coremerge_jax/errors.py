"""Errors for users. Each message names the cause and the remedy."""

import difflib
import itertools
import re
from collections.abc import Callable, Iterable

_COMPARED = 10_000  # names, for a message


class CoreMergeError(ValueError):
    """Base of all errors that this library raises on purpose."""


class FormatError(CoreMergeError):
    """A malformed file or array: truncated, of the wrong shape, not finite, or incomplete."""


class UnsupportedError(CoreMergeError):
    """A well-formed input that the library cannot handle correctly."""


class MismatchError(CoreMergeError):
    """Inputs that are valid one by one but do not fit together."""


class RecipeError(CoreMergeError):
    """A rule, space, parameter or option that does not exist, or an invalid value of one."""


class CoreMergeWarning(UserWarning):
    """Something valid that may be a mistake. The command line prints it as a note."""


class ProcessError(CoreMergeError):
    """A failure in another process of the same job."""


def nearest(
    name: str,
    names: Iterable[str],
    count: int = 1,
    *,
    cutoff: float = 0.0,
    key: Callable[[str], str] = lambda name: re.sub(r"\d+", "0", name),
) -> list[str]:
    """Returns the names that are most similar to a name, the nearest first.

    Args:
        name: the name.
        names: the names to choose from; the first 10,000 are compared.
        count: largest number of names to return.
        cutoff: least similarity, from 0 to 1 (`difflib.SequenceMatcher.ratio`).
        key: the part of a name that is compared; of names that agree in it, the first is returned.
            By default, numbers do not count.
    """
    firsts: dict[str, str] = {}
    for other in itertools.islice(names, _COMPARED):
        firsts.setdefault(key(other), other)
    close = difflib.get_close_matches(key(name), firsts, n=count, cutoff=cutoff)
    return [firsts[match] for match in close]


def hint(name: str, names: Iterable[str]) -> str:
    """Returns the part of a message that suggests the nearest name; empty if there is none."""
    return "".join(f"; nearest is {found!r}" for found in nearest(name, names))


def unknown(what: str, name: object, known: Iterable[str]) -> RecipeError:
    """Returns the error for a name not among ``known``: it suggests the nearest, or lists all."""
    known, shown = list(known), f"{name!s:.100}"
    near = nearest(shown, known, cutoff=0.6, key=str)
    advice = f"did you mean {near[0]!r}?" if near else f"expected one of: {', '.join(known)}"
    return RecipeError(f"unknown {what} {shown!r}; {advice}")
