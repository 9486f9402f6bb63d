"""Steps whose results are kept in files, and which are not done twice."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def kept(folder: Path, name: str, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the result kept in a folder under a name, or makes and keeps it."""
    file = folder / f"{name}.json"
    if not file.exists():
        text = json.dumps(make())
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_suffix(".part")
        beside.write_text(text)
        beside.rename(file)
    return json.loads(file.read_text())


def digest(adapters: Sequence[Path], values: Any = None) -> str:
    """Returns a name that changes with the files of adapters, and with values.

    Args:
        adapters: PEFT folders.
        values: anything that JSON can hold.
    """
    hashes = [
        hashlib.sha256((x / "adapter_model.safetensors").read_bytes()).hexdigest() for x in adapters
    ]
    return hashlib.sha256(json.dumps([hashes, values]).encode()).hexdigest()[:12]


def bits(answers: np.ndarray) -> str:
    """Returns booleans as a text of 0 and 1."""
    return "".join("01"[int(x)] for x in answers)


def from_bits(text: str) -> np.ndarray:
    """Returns what `bits` has made a text of."""
    return np.frombuffer(text.encode(), np.uint8) == ord("1")
