"""Fused mixture-of-experts parameters: the parameter of each tensor, and its packing.

peft wraps an adapted parameter of a module without writing its name into the file. One parameter
is certain. Of two, only the nesting is known: the first parameter that the module defines is
inside (its path has `.base_layer`). That is certain for the pairs of `PAIRS`, where the shapes can
prove it.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from coremerge_jax.errors import FormatError, UnsupportedError
from coremerge_jax.io.module_paths import WRAPPED

Shape = tuple[int, ...]

# The parameters of experts in the order in which modules define them, and how many times more rows
# the first has than the second has columns: two for a gated unit, one for NemotronH's.
PAIRS = {("gate_up_proj", "down_proj"): 2, ("up_proj", "down_proj"): 1}

# Before this release of peft, the two factors of most parameters were stored transposed.
LAYOUT_VERSION = "0.19.0"


def target_names(module: str, targets: Sequence[str]) -> list[str]:
    """Returns the names of the parameters of a module that ``target_parameters`` selects.

    A name alone is one that peft has written for layers of experts that transformers fuses
    (``target_modules=["gate_proj", ...]``, ``"all-linear"``): it is of modules of experts only.
    """
    names = set()
    for target in targets:
        owner, _, name = target.rpartition(".")
        selected = module == owner or module.endswith(f".{owner}")
        if selected if owner else module.endswith("experts"):
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
    old = UnsupportedError(
        f"{culprit}: written by peft {version or 'before 0.18'}, whose layout of expert "
        f"factors is ambiguous; train or convert with peft {LAYOUT_VERSION} or newer"
    )
    is_old = _release(version) < _release(LAYOUT_VERSION)
    if len(paths) == len(names) == 1:
        if is_old:
            raise old
        return {paths[0]: f"{module}.{names[0]}"}
    pair = find_pair(names)
    if len(paths) == 2 and pair:
        fits = _fits(levels[paths[1]], levels[paths[0]], PAIRS[pair])
        if is_old and fits and fits != "as stored":
            raise old
        if fits:
            return {path: f"{module}.{name}" for path, name in zip(paths, pair[::-1], strict=True)}
    shapes = ", ".join(f"{path}: a {a}, b {b}" for path, (a, b) in levels.items())
    raise UnsupportedError(
        f"{culprit}: the file does not tell which tensors belong to which parameter ({shapes}); "
        f"only one parameter a module, or {' or '.join(map(' with '.join, PAIRS))}, is certain"
    )


def find_pair(names: Iterable[str]) -> tuple[str, str] | None:
    """Returns the pair of `PAIRS` that has these names, in its order; None if there is none."""
    return next((pair for pair in PAIRS if set(pair) == set(names)), None)


def _fits(inner: tuple[Shape, Shape], outer: tuple[Shape, Shape], ratio: int) -> str:
    """Returns how the shapes show that two levels are a pair of parameters; "" if they do not.

    Experts that are stored as (inputs, outputs), as Llama 4's, have inputs and outputs swapped,
    and so have the factors of most others in releases of peft before `LAYOUT_VERSION`.
    """
    (inner_a, inner_b), (outer_a, outer_b) = inner, outer
    if inner_a[1] == outer_b[0] and inner_b[0] == ratio * outer_a[1]:
        return "as stored" if ratio > 1 else "either way"
    swapped = inner_b[0] == outer_a[1] and inner_a[1] == ratio * outer_b[0]
    return "swapped" if swapped else ""


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


# Names of an expert's layers as Tinker and Mixtral have them, and as most models do.
_LAYERS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def is_stack(path: str, a: Shape, b: Shape) -> bool:
    """Returns True if factors are those of all experts, along a first axis: Tinker's, SkyRL's."""
    owner, _, name = path.rpartition(".")
    empty = name in _LAYERS and 0 in a and 0 in b
    return owner.endswith("experts") and (empty or len(a) == len(b) == 3)


def stacked_names(path: str, count: int, paths: Collection[str]) -> list[str]:
    """Returns the paths of experts whose factors are stacked in the file.

    Args:
        path: the path in the file: ``experts.w1``, ``experts.gate_proj``, ``experts.gate_up_proj``.
        count: the number of experts.
        paths: all paths in the file.
    """
    owner, _, name = path.rpartition(".")
    if name == "gate_up_proj" or (name == "down_proj" and f"{owner}.gate_up_proj" in paths):
        return [f"{path}[{e}]" for e in range(count)]
    return [f"{owner}.{e}.{_LAYERS.get(name, name)}" for e in range(count)]


def unstack(a: np.ndarray, b: np.ndarray, *, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns one expert's factors from stacked ones, of which one may be shared by all."""
    return a[index if len(a) > 1 else 0], b[index if len(b) > 1 else 0]


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
        pair = find_pair(names)
        if len(names) > 1 and not pair:
            raise UnsupportedError(
                f"module {owner!r}: the order in which peft nests {', '.join(names)} is not known"
            )
        for name in names:
            paths[f"{owner}.{name}"] = owner + (WRAPPED if pair and name == pair[0] else "")
    return paths
