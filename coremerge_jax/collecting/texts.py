"""Files of unlabelled examples: JSON lines, or plain text with one example a line."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from coremerge_jax.errors import FormatError, RecipeError, hint
from coremerge_jax.io.untrusted import (
    check_path,
    is_list_of,
    is_regular,
    is_text,
    parse_json,
    short,
)

FIELD, MESSAGES = "text", "messages"

_JSON = (".jsonl", ".json", ".ndjson")
_LONGEST = 2**24  # characters of a line

# A text, or the messages of a chat.
Example = str | list[dict[str, Any]]


def read_examples(file: str | Path, *, field: str | None = None) -> list[Example]:
    """Returns the examples in a file; empty lines are none.

    Args:
        file: JSON lines, if its name ends in .jsonl, .ndjson or .json; else plain text.
        field: of JSON lines, the field with a text, or with a chat's messages, each with ``role``
            and ``content``; by default ``text``, or if the first line has none, ``messages``.

    Raises:
        FormatError: the file is missing, not UTF-8 or empty, or a line is no example; it names the
            line.
        RecipeError: a field is given for plain text.
    """
    path = Path(file)
    check_path(file)
    if not is_regular(path):
        raise FormatError(f"{file}: no such file; expected unlabelled inputs of a task")
    if path.suffix.lower() in _JSON:
        examples = _read_json_lines(path, field)
    elif field is None:
        examples = [line.strip() for _, line in _lines(path)]
    else:
        raise RecipeError(f"{file}: plain text has no field {field!r}; give JSON lines (.jsonl)")
    if not examples:
        raise FormatError(f"{file}: is empty; expected unlabelled inputs of a task, one a line")
    return examples


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yields the lines that are not empty, with their numbers."""
    number = 0
    try:
        with file.open(encoding="utf-8-sig") as stream:
            while line := stream.readline(_LONGEST):
                number += 1
                if len(line) == _LONGEST:
                    raise FormatError(
                        f"{file}, line {number}: longer than {_LONGEST:,} characters; expected one "
                        "example a line"
                    )
                if line.strip():
                    yield number, line
    except UnicodeDecodeError as error:
        raise FormatError(f"{file}, after line {number}: not a text in UTF-8") from error


def _read_json_lines(file: Path, field: str | None) -> list[Example]:
    examples: list[Example] = []
    for number, line in _lines(file):
        where = f"{file}, line {number}"
        value = parse_json(line, where)
        if not isinstance(value, dict):
            raise FormatError(f"{where}: is {short(value)}; expected an object on each line")
        if field is None:
            field = MESSAGES if MESSAGES in value and FIELD not in value else FIELD
        if field not in value:
            raise FormatError(
                f"{where}: no field {field!r}{hint(field, value)}; name the one with the text "
                "(--field)"
            )
        if not _is_example(value[field]):
            raise FormatError(
                f"{where}: {field} is {short(value[field])}; expected a text, or messages with "
                "role and content"
            )
        if value[field]:
            examples.append(value[field])
    return examples


def _is_example(value: Any) -> bool:
    return is_text(value) or is_list_of(_is_message)(value)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and is_text(value.get("role")) and "content" in value


def check_order(files: Sequence[str | Path], names: Sequence[str | None]) -> None:
    """Checks that files which are called as the adapters are in their order.

    Args:
        files: one for each adapter.
        names: of the adapters.

    Raises:
        RecipeError: there are more or fewer files than adapters, or they are in another order.
    """
    if len(files) != len(names):
        raise RecipeError(
            f"inputs: got {len(files)} files for {len(names)} adapters; expected one for each, in "
            "the same order"
        )
    stems = [Path(file).stem for file in files]
    if set(stems) == set(names) and len(set(names)) == len(names) and stems != list(names):
        raise RecipeError(
            f"inputs: the files are in the order {', '.join(stems)}, and the adapters "
            f"{', '.join(map(str, names))}; give both in one order"
        )
