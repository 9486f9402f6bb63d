"""Text from files and arguments, made fit to be shown."""

import json
from numbers import Number


def printable(text: str) -> str:
    r"""Returns a text with every character that does not print as an escape, such as ``\x1b``.

    Controls, ends of lines, changes of direction, characters without width and lone surrogates do
    not print: a terminal would obey or hide them.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shortened(text: str, length: int) -> str:
    """Returns a text of at most so many characters: of a longer one, the two ends."""
    if len(text) <= length:
        return text
    tail = length // 2
    return f"{text[: length - tail - 1]}…{text[-tail:]}"


def display(text: str, length: int) -> str:
    """Returns a text for a label: `printable`, and `shortened` to so many characters."""
    return shortened(printable(text), length)


def json_escaped(text: str) -> str:
    """Returns a JSON document with the same characters as escapes of JSON; ends of lines stay."""
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def short(value: object) -> str:
    """Returns a short text for a value in a message."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if not isinstance(value, str | Number | tuple | None):
        return type(value).__name__
    try:
        shown = repr(value) if isinstance(value, str) else " ".join(str(value).split())
    except ValueError:  # Python refuses to write out more than 4,300 digits
        bits = f" of {value.bit_length()} bits" if isinstance(value, int) else ""
        return f"{type(value).__name__}{bits}"
    return shown if len(shown) <= 60 else f"{shown[:60]} …"
