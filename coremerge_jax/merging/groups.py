"""Groups of modules of one signature."""

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from coremerge_jax.errors import MismatchError
from coremerge_jax.lora import AdapterSource, Kind, LoRA


class GramKind(NamedTuple):
    """The kind of the Gram matrices ``(T, k, k)`` of a module's inputs.

    Attributes:
        size: k.
        whole: True if they are of the inputs themselves, False if of their coordinates in the
            adapters' A. Sizes do not tell, where there are as many coordinates as inputs.
    """

    size: int
    whole: bool


@dataclasses.dataclass(frozen=True)
class Group:
    """Modules with equal shape and equal ranks of the adapters that have them.

    Attributes:
        paths: the modules' paths, L of them.
        tasks: int32 ``(L, T)``, which adapters have the module.
        shape: ``(m, n)`` of each module.
        ranks: the rank of each of the T adapters, ``sum(ranks) == R``.
        length: the number of modules in a stack. It may be more than L: then the last module is
            repeated, so that all parts of a group have one length and share a program.
        inputs: the kind of the Gram matrices of inputs that a merge uses; None if it uses none.
    """

    paths: tuple[str, ...]
    tasks: np.ndarray
    shape: tuple[int, int]
    ranks: tuple[int, ...]
    length: int
    inputs: GramKind | None = None

    @property
    def names(self) -> np.ndarray:
        """uint32 ``(length,)``, hashes of the paths, which random numbers depend on."""
        hashes = [zlib.crc32(path.encode()) for path in self.padded(self.paths)]
        return np.asarray(hashes, np.uint32)

    def kinds(self, outlines: Sequence[AdapterSource]) -> list[Kind]:
        """Returns the kind of each module, from the first adapter that has it."""
        pairs = zip(self.paths, self.tasks, strict=True)
        return [outlines[tasks[0]][path].kind for path, tasks in pairs]

    def padded(self, rows: Any) -> list:
        """Returns one row per module, the last repeated."""
        return [*rows, *[rows[-1]] * (self.length - len(rows))]

    def split(self, size: int, multiple: int = 1) -> "list[Group]":
        """Splits into as few equal parts as possible, each of at most ``size`` modules.

        Args:
            size: of the largest part; a multiple of ``multiple``.
            multiple: the size of each part is a multiple of it.
        """
        parts = -(-len(self.paths) // size)
        size = -(-len(self.paths) // (parts * multiple)) * multiple
        starts = range(0, len(self.paths), size)
        return [
            dataclasses.replace(
                self, paths=self.paths[i : i + size], tasks=self.tasks[i : i + size], length=size
            )
            for i in starts
        ]

    def only(self, wanted: Callable[[str], bool]) -> "Group":
        """Returns the modules whose path is wanted."""
        kept = [i for i, path in enumerate(self.paths) if wanted(path)]
        paths = tuple(self.paths[i] for i in kept)
        return dataclasses.replace(self, paths=paths, tasks=self.tasks[kept], length=len(kept))

    def by_inputs(self, kind: Callable[[str, np.ndarray], GramKind | None]) -> "list[Group]":
        """Splits into modules whose Gram matrices are of one kind each.

        Args:
            kind: of the matrices of a module, by its path and its adapters; None if it has none.
        """
        kinds = [kind(path, row) for path, row in zip(self.paths, self.tasks, strict=True)]
        found = []
        for own in dict.fromkeys(kinds):
            wanted = {path for path, x in zip(self.paths, kinds, strict=True) if x == own}
            found.append(dataclasses.replace(self.only(wanted.__contains__), inputs=own))
        return found


def group_modules(adapters: Sequence[AdapterSource]) -> list[Group]:
    """Groups the modules of all adapters by signature (m, n, ranks).

    A module that only some adapters have is grouped by the ranks of those alone.

    Raises:
        MismatchError: a module has not the same shape, or kind, in all adapters that have it.
    """
    outlines = [adapter.outline for adapter in adapters]
    groups: dict[tuple, list[tuple[str, tuple[int, ...]]]] = {}
    for path in dict.fromkeys(path for adapter in outlines for path in adapter):
        tasks = tuple(t for t, adapter in enumerate(outlines) if path in adapter)
        loras = [outlines[t][path] for t in tasks]
        for t, lora in zip(tasks, loras, strict=True):
            _check_same(outlines, path, tasks[0], t, lora)
        signature = (loras[0].shape, tuple(lora.rank for lora in loras))
        groups.setdefault(signature, []).append((path, tasks))
    return [
        Group(
            paths=tuple(path for path, _ in members),
            tasks=np.asarray([tasks for _, tasks in members], np.int32),
            shape=shape,
            ranks=ranks,
            length=len(members),
        )
        for (shape, ranks), members in groups.items()
    ]


def _check_same(
    adapters: Sequence[AdapterSource], path: str, first: int, other: int, lora: LoRA
) -> None:
    expected = adapters[first][path]
    for what, x, y in (
        ("shape (m, n)", expected.shape, lora.shape),
        ("kind", _layout(expected), _layout(lora)),
    ):
        if x != y:
            raise MismatchError(
                f"module {path!r} has {what} {x} in {label(adapters, first)} but {y} in "
                f"{label(adapters, other)}; adapters of one base model agree in it"
            )


def _layout(lora: LoRA) -> tuple:
    # Not `transposed`: it says how the base stores its weight, which merging does not touch.
    return (lora.kind.name, *lora.kind.kernel)


def label(adapters: Sequence[AdapterSource], t: int) -> str:
    """Returns an adapter's name for messages."""
    name = adapters[t].metadata.name
    return f"adapter {name!r}" if name else f"adapter {t}"
