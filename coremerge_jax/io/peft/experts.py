"""Fused mixture-of-experts parameters: the parameter of each tensor, and its packing.

peft wraps an adapted parameter of a module without writing its name into the file. One parameter
is certain. Of two, only the nesting is known: the first parameter that the module defines is
inside (its path has `.base_layer`). That is certain for gate_up_proj and down_proj, where the
shapes can prove it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from coremerge_jax.errors import FormatError, UnsupportedError
from coremerge_jax.io.module_paths import WRAPPED

Shape = tuple[int, ...]
PAIR = ("gate_up_proj", "down_proj")

# Before this release of peft, the two factors of most parameters were stored transposed.
LAYOUT_VERSION = "0.19.0"


def target_names(module: str, targets: Sequence[str]) -> list[str]:
    """Returns the names of the parameters of a module that ``target_parameters`` selects."""
    names = set()
    for target in targets:
        owner, _, name = target.rpartition(".")
        if not owner or module == owner or module.endswith(f".{owner}"):
            names.add(name)
    return sorted(names)


def name_levels(
    file: str,
    module: str,
    levels: Mapping[str, tuple[Shape, Shape]],
    names: Sequence[str],
    version: str,
) -> dict[str, str]:
    """Returns the parameter that each nesting level of one module belongs to.

    Args:
        file: the file, for messages.
        module: the module's path in the base model.
        levels: path in the file to the shapes of the packed factors a and b.
        names: the parameters that the configuration selects in this module.
        version: the release of peft that wrote the file.

    Returns:
        Path in the file to path of the parameter.

    Raises:
        UnsupportedError: the file leaves it open.
    """
    paths = sorted(levels, key=len)
    culprit = f"{file}: module {module!r}, target_parameters {', '.join(names)}"
    if len(paths) == len(names) == 1:
        if _release(version) < _release(LAYOUT_VERSION):
            raise UnsupportedError(
                f"{culprit}: written by peft {version or 'before 0.18'}, whose layout of expert "
                f"factors is ambiguous; train or convert with peft {LAYOUT_VERSION} or newer"
            )
        return {paths[0]: f"{module}.{names[0]}"}
    if len(paths) == len(names) == 2 and set(names) == set(PAIR):
        (down_a, down_b), (up_a, up_b) = (levels[path] for path in paths)
        if up_a[1] == down_b[0] and up_b[0] == 2 * down_a[1]:
            return {path: f"{module}.{name}" for path, name in zip(paths, PAIR[::-1], strict=True)}
    shapes = ", ".join(f"{path}: a {a}, b {b}" for path, (a, b) in levels.items())
    raise UnsupportedError(
        f"{culprit}: the file does not tell which tensors belong to which parameter ({shapes}); "
        f"only one parameter a module, or {' with '.join(PAIR)}, is certain"
    )


def _release(version: str) -> tuple[int, ...]:
    found = re.match(r"(\d{1,9})\.(\d{1,9})(\.|$)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def count(rows: int, rank: int) -> int:
    """Returns the number of experts in a packed A of so many rows.

    Raises:
        FormatError: the rows of A are not a multiple of the rank.
    """
    number, remainder = divmod(rows, rank)
    if remainder or not number:
        raise FormatError(f"A has {rows} rows, which is not a multiple of the rank {rank}")
    return number


def unpack(a: np.ndarray, b: np.ndarray, *, rank: int, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns copies of one expert's rows ``e * r + i`` of A, and columns ``i * E + e`` of B."""
    rows = slice(index * rank, (index + 1) * rank)
    return a[rows].copy(), b[:, index :: len(a) // rank].copy()


def pack(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the inverse of `unpack` for all experts of a parameter, which have one rank."""
    a = np.concatenate([a for a, _ in parts])
    b = np.stack([b for _, b in parts], axis=2)
    return a, b.reshape(len(b), -1)


def nest(parameters: Iterable[str]) -> dict[str, str]:
    """Maps each parameter of the modules that own them to the path where peft puts it.

    Raises:
        UnsupportedError: the nesting is not known.
    """
    owners: dict[str, list[str]] = {}
    for parameter in parameters:
        owner, _, name = parameter.rpartition(".")
        owners.setdefault(owner, []).append(name)
    paths = {}
    for owner, names in owners.items():
        if len(names) > 1 and set(names) != set(PAIR):
            raise UnsupportedError(
                f"module {owner!r}: the order in which peft nests {', '.join(names)} is not known"
            )
        inner = len(names) > 1
        for name in names:
            paths[f"{owner}.{name}"] = owner + (WRAPPED if inner and name == PAIR[0] else "")
    return paths
