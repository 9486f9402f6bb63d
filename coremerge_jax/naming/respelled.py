"""Adapters whose modules have other names, or are parts of modules."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from coremerge_jax.lora import (
    Adapter,
    AdapterFile,
    AdapterSource,
    Array,
    Kind,
    LoRA,
    Metadata,
    Shape,
)


@dataclasses.dataclass(frozen=True)
class Piece:
    """Rows of a module.

    Attributes:
        path: path of the module.
        kind: kind of the piece.
        rows: the first row, and the one after the last; None for all.
    """

    path: str
    kind: Kind
    rows: tuple[int, int] | None = None

    def of(self, lora: LoRA) -> LoRA:
        """Returns these rows of the module's update, or of its outline. The rank stays."""
        if self.rows is None:
            return dataclasses.replace(lora, kind=self.kind)
        start, stop = self.rows
        b: Any = Shape((stop - start, lora.rank), lora.b.dtype)
        if hasattr(lora.b, "__getitem__"):  # an array
            b = lora.b[start:stop]
        return LoRA(lora.a, b, self.kind)


def respell(
    adapter: AdapterSource, pieces: Mapping[str, Piece], extras: Mapping[str, Array]
) -> Adapter:
    """Returns an adapter with other modules and extras; one in a file stays there.

    Args:
        adapter: the adapter.
        pieces: the new modules, by their paths.
        extras: the extras, by their new names.
    """
    metadata = _metadata(adapter.metadata, pieces)
    if adapter.in_memory:
        modules = {path: piece.of(adapter[piece.path]) for path, piece in pieces.items()}
        return Adapter(modules, metadata=metadata, extras=extras)
    return _Respelled(adapter, pieces, metadata, extras)


def _metadata(metadata: Metadata, pieces: Mapping[str, Piece]) -> Metadata:
    whole = {piece.path: path for path, piece in pieces.items() if piece.rows is None}
    lengths = [(whole[path], i, o) for path, i, o in metadata.lengths if path in whole]
    return dataclasses.replace(metadata, lengths=tuple(lengths))


class _Respelled(AdapterFile):
    """A view of an adapter in a file."""

    def __init__(
        self,
        adapter: AdapterSource,
        pieces: Mapping[str, Piece],
        metadata: Metadata,
        extras: Mapping[str, Array],
    ) -> None:
        outline = adapter.outline
        modules = {path: piece.of(outline[piece.path]) for path, piece in pieces.items()}
        super().__init__(modules, metadata=metadata, extras=extras)
        self._adapter, self._pieces = adapter, pieces

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders that the adapter reads from."""
        return self._adapter.folders

    def read(self, paths: Iterable[str]) -> dict[str, LoRA]:
        """Returns the modules with these paths; pieces of one module share its A."""
        wanted = list(paths)
        loras = self._adapter.read(dict.fromkeys(self._pieces[path].path for path in wanted))
        return {path: self._pieces[path].of(loras[self._pieces[path].path]) for path in wanted}
