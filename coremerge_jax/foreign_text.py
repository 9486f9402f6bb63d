"""Text from files and arguments, made fit to be shown."""

import unicodedata

# Characters that no screen shows as they are: controls (with escape sequences), formats (with
# changes of direction and zero-width characters), surrogates, private use, separators of lines.
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def printable(text: str) -> str:
    r"""Returns a text with every character that a terminal would obey or hide as an escape.

    An escape character, for instance, becomes ``\x1b``.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escape(c) if unicodedata.category(c) in _HIDDEN else c for c in text)


def shortened(text: str, length: int) -> str:
    """Returns a text of at most so many characters: of a longer one, the two ends."""
    if len(text) <= length:
        return text
    half = (length - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


def json_escaped(text: str) -> str:
    """Returns a JSON document with the same characters as escapes; line ends stay."""
    return "".join(
        _escape_json(c) if c != "\n" and unicodedata.category(c) in _HIDDEN else c for c in text
    )


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode()


def _escape_json(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4))
