"""Configuration files."""

import json
from pathlib import Path
from typing import Any

from coremerge_jax.errors import FormatError


def read_json(file: Path, folder: str) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        file: the file.
        folder: what the folder should be that it is in, for messages.

    Raises:
        FormatError: it is missing, or holds something else.
    """
    if not file.is_file():
        raise FormatError(f"{file.parent}: no {file.name}; expected {folder}")
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise FormatError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise FormatError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content
