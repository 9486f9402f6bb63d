"""The files of a format of adapters, as the writer of safetensors files asks for them."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

import numpy as np

from coremerge_jax.lora import Array, LoRA


class FileLayout(Protocol):
    """Places of an adapter's modules in the files of a format.

    It is made of the adapter's outline; `adapter_writer.write_adapter` then asks it for tensors as
    the modules come. Modules that the format has to write together form a group, and have one rank.

    Attributes:
        groups: the modules of each group; every module is in one.
        extras: tensors that are not factors, by key.
    """

    groups: dict[str, list[str]]
    extras: Mapping[str, Array]

    @property
    def weights(self) -> str | None:
        """Name of the safetensors file; None for that of the folder."""

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
            dtype: dtype of the written factors. The writer casts all floats to it, also an alpha:
                a rank that it cannot hold exactly has to be a larger one.
        """

    def metadata(self, ranks: Mapping[str, int]) -> dict[str, str]:
        """Returns the metadata for the header of the file, given the rank of each group.

        The header gets room for the metadata of ranks that all differ and have ten digits.
        """

    def files(self, ranks: Mapping[str, int]) -> dict[str, str]:
        """Returns the text of the other files, by name, such as a configuration."""


def pad(lora: LoRA, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the factors, padded with zeros to a rank, which does not change the update."""
    more = rank - lora.rank
    a, b = np.asarray(lora.a), np.asarray(lora.b)
    return (np.pad(a, ((0, more), (0, 0))), np.pad(b, ((0, 0), (0, more)))) if more else (a, b)
