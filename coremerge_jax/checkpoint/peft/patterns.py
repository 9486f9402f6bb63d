"""The patterns of a configuration that say which modules have another rank or alpha.

peft runs them with `re.match`, whose time can be exponential in their length. Here, the plain
names that most of them are go to `re`, which takes linear time for these. Other regular
expressions are followed in all ways at once: a set of positions in the name, as the bits of an
integer, goes through the parsed pattern. Results are those of `re`; the work is counted, and has
a limit.
"""

import functools
import itertools
import re
import re._constants as op  # type: ignore[import-not-found,unused-ignore]
import re._parser as parser  # type: ignore[import-not-found,unused-ignore]
import warnings
from collections.abc import Callable, Iterable
from typing import Any

# Letters, digits and points, also escaped: of a fixed length, with nothing to try twice.
_PLAIN = re.compile(r"\^?(?:[\w\-.]|\\[.\-_])+")
_LENGTH = 1000
_WORK = 10_000_000
_COUNT = 10_000

_CATEGORIES = {
    op.CATEGORY_DIGIT: r"\d",
    op.CATEGORY_NOT_DIGIT: r"\D",
    op.CATEGORY_SPACE: r"\s",
    op.CATEGORY_NOT_SPACE: r"\S",
    op.CATEGORY_WORD: r"\w",
    op.CATEGORY_NOT_WORD: r"\W",
}


class Patterns:
    """Patterns of module paths, of which the first that matches counts.

    Args:
        patterns: each as peft has it: for the whole path, or for what follows a point in it.

    Raises:
        ValueError: one is broken, too long, or of a kind whose time has no limit.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        self._tests: dict[str, Callable[[str], Any]] = {}
        for pattern in patterns:
            if len(pattern) > _LENGTH or len(self._tests) == _COUNT:
                raise ValueError(
                    f"pattern too long or too many, {pattern[:60]!r}; "
                    f"at most {_COUNT} of {_LENGTH} characters are read"
                )
            try:
                self._tests[pattern] = self._compile(pattern)
            except (re.error, FutureWarning, OverflowError, RecursionError) as error:
                raise ValueError(f"broken pattern {pattern!r:.200} ({error})") from error
            except NotImplementedError as error:
                raise ValueError(
                    f"pattern {pattern!r:.200} that is not supported: {error}"
                ) from error
        self._work = _WORK
        self._text = functools.lru_cache(maxsize=1)(_Text)
        self.first = functools.cache(self._first)

    def _first(self, path: str) -> str | None:
        """The first pattern that matches a path, None if there is none.

        Raises:
            ValueError: matching takes too long.
        """
        return next((pattern for pattern, test in self._tests.items() if test(path)), None)

    def _compile(self, pattern: str) -> Callable[[str], Any]:
        whole = rf"(.*\.)?({pattern})$"
        if _PLAIN.fullmatch(pattern):
            return re.compile(whole).match
        with warnings.catch_warnings(action="error"):  # where `re` will change
            parsed = parser.parse(whole)
        _refuse_unlimited(parsed)
        return functools.partial(self._follow, parsed, _tail(parsed))

    def _follow(self, parsed: Any, tail: str, path: str) -> int:
        if not path.removesuffix("\n").endswith(tail):
            return 0
        text = self._text(path)
        text.work = self._work
        try:
            return text.follow(parsed, 1)
        finally:
            self._work = text.work


def _tail(parsed: Any) -> str:
    """The letters that all that a pattern matches end in, as far as that is easily told."""
    if len(parsed) != 3:  # alternatives that are not peft's
        return ""
    ends = itertools.takewhile(lambda part: part[0] is op.LITERAL, reversed(parsed[1][1][-1]))
    return "".join(chr(letter) for _, letter in ends)[::-1].removesuffix("\n")


def _refuse_unlimited(parsed: Any) -> None:
    for kind, value in parsed:
        if kind not in _STEPS:
            raise NotImplementedError(f"{str(kind).lower()}; name the modules")
        for inner in _inner(kind, value):
            _refuse_unlimited(inner)


def _inner(kind: Any, value: Any) -> list[Any]:
    """The patterns within a part of a pattern."""
    if kind is op.BRANCH:
        return list(value[1])
    if kind is op.SUBPATTERN and (value[1] or value[2]):
        raise NotImplementedError("flags; name the modules")
    if kind in (op.ASSERT, op.ASSERT_NOT) and value[0] < 0:
        raise NotImplementedError("looking behind; name the modules")
    held = kind in (op.SUBPATTERN, op.MAX_REPEAT, op.MIN_REPEAT, op.ASSERT, op.ASSERT_NOT)
    return [value[-1]] if held else []


class _Text:
    """A text, through which patterns are followed.

    Args:
        text: the text.

    Attributes:
        work: how many steps may still be taken.
    """

    def __init__(self, text: str) -> None:
        self.work = 0
        self._text, self._all = text, (1 << len(text) + 1) - 1
        self._places: dict[str, int] = {}
        for i, letter in enumerate(text):
            self._places[letter] = self._places.get(letter, 0) | 1 << i

    def follow(self, parsed: Iterable[tuple[Any, Any]], places: int) -> int:
        """The places that the pattern can lead to, from any of these.

        Raises:
            ValueError: there is more work than is left.
        """
        for kind, value in parsed:
            self.work -= 1 + len(self._text) // 1000
            if self.work < 0:
                raise ValueError("its patterns take too long; name the modules instead")
            if not places:
                return 0
            places = _STEPS[kind](self, value, places)
        return places

    def where(self, test: Callable[[str], Any]) -> int:
        """The places of letters that pass a test."""
        return sum(bits for letter, bits in self._places.items() if test(letter))

    def letter(self, kind: Any, value: Any) -> int | None:
        """The places of the letters that a pattern of one letter stands for; else None."""
        match kind:
            case op.LITERAL:
                return self._places.get(chr(value), 0)
            case op.NOT_LITERAL:
                return self.where(lambda letter: letter != chr(value))
            case op.ANY:
                return self.where(lambda letter: letter != "\n")
            case op.IN:
                negated = value[0][0] is op.NEGATE
                return self.where(
                    lambda x: any(_holds(kind, held, x) for kind, held in value) != negated
                )
        return None

    def step(self, kind: Any, value: Any, places: int) -> int:
        """Follows one letter."""
        letters = self.letter(kind, value)
        assert letters is not None
        return (places & letters) << 1

    def branch(self, value: Any, places: int) -> int:
        """Follows all alternatives."""
        return functools.reduce(lambda x, y: x | self.follow(y, places), value[1], 0)

    def repeat(self, value: Any, places: int) -> int:
        """Follows a pattern as often as it may repeat; more than once a letter changes nothing."""
        least, most, parsed = value
        for _ in range(least):
            before, places = places, self.follow(parsed, places)
            if places in (0, before):
                break
        if most is op.MAXREPEAT and len(parsed) == 1:
            letters = self.letter(*parsed[0])
            if letters is not None:  # the carry of a sum runs through each run of such letters
                return places | (((places & letters) + letters) ^ letters)
        found = new = places
        for _ in range(min(most - least, len(self._text) + 1)):
            new = self.follow(parsed, new) & ~found
            if not new:
                break
            found |= new
        return found

    def at(self, value: Any, places: int) -> int:
        """Keeps the places that are an edge of the text, or of a word."""
        size, words = len(self._text), self.where(re.compile(r"\w").match)
        edges = (words ^ words << 1) & self._all
        line = 1 << size - 1 if self._text.endswith("\n") else 0
        kept = {
            op.AT_BEGINNING: 1,
            op.AT_BEGINNING_STRING: 1,
            op.AT_END: 1 << size | line,
            op.AT_END_STRING: 1 << size,
            op.AT_BOUNDARY: edges,
            op.AT_NON_BOUNDARY: self._all & ~edges if size else 0,
        }
        return places & kept[value]

    def ahead(self, value: Any, places: int) -> int:
        """Keeps the places from which a pattern leads on."""
        single = (1 << i for i in range(places.bit_length()) if places >> i & 1)
        return sum(place for place in single if self.follow(value[1], place))


def _is_in(items: Any, letter: str) -> bool:
    """Tells whether a letter is in a set."""
    negated = items[0][0] is op.NEGATE
    return any(_holds(kind, value, letter) for kind, value in items) != negated


def _holds(kind: Any, value: Any, letter: str) -> bool:
    """Tells whether a letter is one of an item of a set."""
    if kind is op.RANGE:
        return value[0] <= ord(letter) <= value[1]
    if kind is op.CATEGORY:
        return re.match(_CATEGORIES[value], letter) is not None
    return kind is op.LITERAL and ord(letter) == value


_STEPS: dict[Any, Callable[[_Text, Any, int], int]] = {
    op.LITERAL: lambda text, value, places: text.step(op.LITERAL, value, places),
    op.NOT_LITERAL: lambda text, value, places: text.step(op.NOT_LITERAL, value, places),
    op.ANY: lambda text, value, places: text.step(op.ANY, value, places),
    op.IN: lambda text, value, places: text.step(op.IN, value, places),
    op.BRANCH: _Text.branch,
    op.SUBPATTERN: lambda text, value, places: text.follow(value[-1], places),
    op.MAX_REPEAT: _Text.repeat,
    op.MIN_REPEAT: _Text.repeat,
    op.AT: _Text.at,
    op.ASSERT: _Text.ahead,
    op.ASSERT_NOT: lambda text, value, places: places & ~text.ahead(value, places),
}
