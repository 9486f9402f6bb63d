"""The files of a format of adapters, as the writer of safetensors files asks for them."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

import numpy as np

from coremerge_jax.lora import Array, LoRA


class FileLayout(Protocol):
    """Places of an adapter's modules in the files of a format.

    Modules that the format has to write together form a group, and have one rank.

    Attributes:
        weights: name of the safetensors file.
        groups: the modules of each group.
        extras: tensors that are not factors, by key.
    """

    weights: str
    groups: dict[str, list[str]]
    extras: Mapping[str, Array]

    def keys(self, groups: Iterable[str]) -> list[str]:
        """Returns the names of the tensors of groups."""

    def tensors(
        self, group: str, loras: Mapping[str, LoRA], rank: int, dtype: np.dtype
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Yields the tensors of a group by key, with a scaling of 1.

        Args:
            group: the group.
            loras: its modules, of which none has a larger rank than `rank`.
            rank: their common rank; `pad` fills up with zeros.
            dtype: dtype of the written factors; the writer casts to it.
        """

    def metadata(self, ranks: Mapping[str, int]) -> dict[str, str]:
        """Returns the metadata for the header of the file, given the rank of each group."""

    def files(self, ranks: Mapping[str, int]) -> dict[str, str]:
        """Returns the text of the other files, by name, such as a configuration."""


def pad(lora: LoRA, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the factors, padded with zeros to a rank, which does not change the update."""
    more = rank - lora.rank
    a, b = np.asarray(lora.a), np.asarray(lora.b)
    return (np.pad(a, ((0, more), (0, 0))), np.pad(b, ((0, 0), (0, more)))) if more else (a, b)
