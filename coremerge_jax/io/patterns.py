"""The patterns of a configuration by which modules have another rank or alpha.

peft matches them with `re.match`, whose time can be exponential in their length. Most are names,
and are compared as such. The `regex` package matches the others, under a time limit.
"""

import functools
import itertools
import math
import re
import time
import warnings
from collections.abc import Iterable, Iterator

import regex

_NAME = re.compile(r"\^?(?:[\w\-.]|\\[^\w\s])+")
_LENGTH = 1000
_COUNT = 10_000
_SECONDS = 2.0  # for all patterns and modules of a file; ordinary ones take microseconds

# Compiling takes memory that grows with counts and, exponentially, with nested groups.
_DEPTH = 6

_COUNTS = re.compile(r"\{(\d*),?(\d*)\}")
_BRACE = re.compile(r"\{(?!\d*,?\d*\})")
_UNROLLED = 100


class Patterns:
    """Patterns of module paths, of which the first that matches counts.

    Args:
        patterns: each as peft has it: for the whole path, or for what follows a point in it.

    Raises:
        ValueError: one is broken or too long, or there are too many.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        # Names by length, and all others; each with its place in the order.
        self._names: dict[int, list[tuple[int, bool, re.Pattern[str]]]] = {}
        self._others: list[tuple[int, regex.Pattern[str]]] = []
        self._patterns = list(patterns)
        self._seconds = _SECONDS
        if len(self._patterns) > _COUNT:
            raise ValueError(f"number of patterns of {len(self._patterns)}; at most {_COUNT}")
        for place, pattern in enumerate(self._patterns):
            if len(pattern) > _LENGTH:
                raise ValueError(f"pattern of {len(pattern)} characters; at most {_LENGTH}")
            self._add(place, pattern)
        self.first = functools.cache(self._first)

    def _add(self, place: int, pattern: str) -> None:
        if _NAME.fullmatch(pattern):
            name = pattern.removeprefix("^")
            length = len(re.sub(r"\\(.)", r"\1", name))
            entry = place, name != pattern, re.compile(name)
            self._names.setdefault(length, []).append(entry)
            return
        whole = rf"(.*\.)?({pattern})$"
        try:
            with warnings.catch_warnings(action="error"):  # where `re` will change
                re.compile(whole)
            _check_size(pattern)
            self._others.append((place, regex.compile(whole)))
        except (re.error, regex.error, Warning, OverflowError, RecursionError, ValueError) as error:
            raise ValueError(f"broken pattern {pattern!r:.200} ({error})") from error

    def _first(self, path: str) -> str | None:
        """Returns the first pattern that matches a path, None if there is none.

        Raises:
            ValueError: matching takes too long.
        """
        firsts = (min(self._named(path), default=None), next(self._matched(path), None))
        found = [place for place in firsts if place is not None]
        return self._patterns[min(found)] if found else None

    def all(self, path: str) -> list[str]:
        """Returns all patterns that match a path, in their order.

        Raises:
            ValueError: matching takes too long.
        """
        return [self._patterns[i] for i in sorted({*self._named(path), *self._matched(path)})]

    def _named(self, path: str) -> Iterator[int]:
        path = path.removesuffix("\n")  # `$` matches before it
        starts = [0, *(i + 1 for i, letter in enumerate(path) if letter == ".")]
        return (
            place
            for start in starts
            if "\n" not in path[:start]  # `.` does not match it
            for place, whole, name in self._names.get(len(path) - start, ())
            if not (whole and start) and name.fullmatch(path, start)
        )

    def _matched(self, path: str) -> Iterator[int]:
        for place, pattern in self._others:
            started = time.monotonic()
            try:
                found = pattern.match(path, timeout=max(self._seconds, 1e-3))
            except TimeoutError:
                raise ValueError(
                    f"pattern {self._patterns[place]!r:.200} takes too long; name the modules"
                ) from None
            self._seconds -= time.monotonic() - started
            if found:
                yield place


def _check_size(pattern: str) -> None:
    """Refuses a pattern that would take much memory, or mean something else to `regex`.

    Raises:
        ValueError: saying why.
    """
    counts = [int(most or least or 1) for least, most in _COUNTS.findall(pattern)]
    if _BRACE.search(pattern) or math.prod(counts) > _UNROLLED:
        raise ValueError(f"a brace that is no count, or counts above {_UNROLLED}")
    levels = ({"(": 1, ")": -1}.get(letter, 0) for letter in pattern)
    if max(itertools.accumulate(levels), default=0) > _DEPTH:
        raise ValueError(f"groups nested more than {_DEPTH} deep")
