"""Packed adapters: their factors also as coordinates in orthonormal bases of all of them.

With orthonormal U and V whose columns span those of all B and all Aᵀ of a module, an adapter's
update is ``U (Uᵀ B_t)(A_t V) Vᵀ``. The small factors ``Uᵀ B_t`` and ``A_t V`` serve every merge of
packed adapters, or of some of them: they have the same inner products as the factors themselves,
and so the same singular values and core space. All but the last step of a merge is done with them,
at a cost that does not depend on the size of the module.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from coremerge_jax.lora import AdapterFile, AdapterSource, LoRA
from coremerge_jax.merging.groups import GramKind, Group


@dataclasses.dataclass(frozen=True)
class Coordinates:
    """The factors of all packed adapters of one module, in orthonormal bases.

    Attributes:
        tasks: the adapters that have the module, by their numbers.
        ranks: of their factors; R in all.
        left: ``(p, R)``, of the B side by side.
        right: ``(q, R)``, of the Aᵀ side by side.
    """

    tasks: tuple[int, ...]
    ranks: tuple[int, ...]
    left: np.ndarray
    right: np.ndarray

    def columns(self, tasks: Iterable[int]) -> np.ndarray:
        """Returns the places of the columns of some adapters."""
        starts = np.cumsum((0, *self.ranks))
        places = [self.tasks.index(task) for task in tasks]
        return np.concatenate([np.arange(starts[i], starts[i + 1]) for i in places])


class PackedAdapter(AdapterFile):
    """One of the adapters of a pack.

    Args:
        source: has the factors.
        name: of the adapter.
        number: of the adapter, in `Coordinates.tasks`.
        coordinates: of all adapters of the pack, by path of the module.
    """

    def __init__(
        self,
        source: AdapterSource,
        name: str,
        number: int,
        coordinates: Mapping[str, Coordinates],
    ) -> None:
        metadata = dataclasses.replace(source.metadata, name=name)
        super().__init__(source.outline, metadata=metadata, extras=source.extras)
        self.source, self.number, self.coordinates = source, number, coordinates

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders that factors are read from."""
        return self.source.folders

    def read(self, paths: Iterable[str]) -> dict[str, LoRA]:
        """Returns the modules with these paths."""
        return self.source.read(paths)


def stack_coordinates(group: Group, adapters: Sequence[AdapterSource]) -> LoRA | None:
    """Stacks the coordinates of a group's modules.

    Args:
        group: the modules.
        adapters: T of them.

    Returns:
        Factors ``(L, R, q)`` and ``(L, p, R)``; None unless all adapters are of one pack, with no
        more ranks than rows and columns, and inputs are known in no other coordinates than theirs.
    """
    packed = [adapter for adapter in adapters if isinstance(adapter, PackedAdapter)]
    total = sum(group.ranks)
    if len(packed) < len(adapters) or len({id(x.coordinates) for x in packed}) > 1:
        return None
    if total > min(group.shape) or group.inputs not in (None, GramKind(total, whole=False)):
        return None
    rows = []
    for path, tasks in zip(group.paths, group.tasks, strict=True):
        found = packed[0].coordinates[path]
        if total > min(len(found.left), len(found.right)):  # some adapters are given twice
            return None
        columns = found.columns(packed[t].number for t in tasks)
        rows.append((found.left[:, columns], found.right[:, columns]))
    rows = group.padded(rows)
    left, right = (_stack([row[side] for row in rows]) for side in (0, 1))
    return LoRA(a=np.ascontiguousarray(np.swapaxes(right, 1, 2)), b=left)


def _stack(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Stacks matrices of equal width, with zeros below those of fewer rows."""
    rows = max(map(len, parts))
    return np.stack([np.pad(x, ((0, rows - len(x)), (0, 0))) for x in parts])
