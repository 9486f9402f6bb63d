"""Fused modules: those whose rows are the rows of others, one below the other."""

from collections.abc import Iterator

from coremerge_jax.naming.table import FUSED, MIXED


def parts(key: str) -> tuple[str, ...]:
    """Returns the modules that a fused one consists of, in order; none of a module that is not.

    Args:
        key: a path, or its canonical form or template.
    """
    owner, name, index = _cut(key)
    return tuple(f"{owner}{part}{index}" for part in FUSED.get(name, ()))


def fused(key: str) -> tuple[str, int, int] | None:
    """Returns the fused module that a module may be a part of, its place there, and their number.

    Args:
        key: a path, or its canonical form or template.
    """
    owner, name, index = _cut(key)
    for whole, names in FUSED.items():
        if name in names:
            return f"{owner}{whole}{index}", names.index(name), len(names)
    return None


def mixed(key: str) -> Iterator[str]:
    """Yields modules that hold this projection of queries, keys or values, in no certain order."""
    owner, name, index = _cut(key)
    if name in (*FUSED["qkv_proj"], "qkv_proj"):
        yield from (f"{owner}{whole}{index}" for whole in MIXED)


def _cut(key: str) -> tuple[str, str, str]:
    """Returns the owner of a module with its dot, the module's name, and its index as ``[3]``."""
    path, bracket, index = key.partition("[")
    owner, dot, name = path.rpartition(".")
    return owner + dot, name, bracket + index


def part_sizes(rows: int, known: list[int | None]) -> list[int] | None:
    """Returns the rows of each part of a fused module; None if they are not certain.

    Two parts are halves. Of queries, keys and values, the last two have equally many rows, and
    the sizes of two that differ in this have to add up.

    Args:
        rows: of the fused module.
        known: rows of the parts, None for those of which nothing is known.
    """
    if len(known) == 2:
        sizes = [rows // 2] * 2
        certain = rows % 2 == 0
    else:
        queries, *others = known
        values = next((size for size in others if size is not None), None)
        if queries is None or values is None:
            return None
        sizes = [queries, values, values]
        certain = sum(sizes) == rows
    fits = all(size in (None, x) for size, x in zip(known, sizes, strict=True))
    return sizes if certain and fits else None
