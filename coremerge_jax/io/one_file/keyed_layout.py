"""Layout of safetensors files whose keys name a module and a factor."""

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from coremerge_jax.errors import UnsupportedError
from coremerge_jax.io.file_layout import pad
from coremerge_jax.lora import Adapter, Array, LoRA
from coremerge_jax.trees.arguments import refuse_extras

# Kinds of modules, as messages name them.
KINDS = {
    "embedding": "an embedding",
    "expert": "an expert of a fused parameter",
    "conv2d": "a convolution",
}


class KeyedLayout:
    """Places of an adapter's modules in a file with two or three tensors a module.

    Args:
        outline: the adapter.
        name: name of the format, for messages.
        weights: name of the file; None for that of the folder.
        stems: the part of the keys that names a module, by its path.
        endings: endings of the keys of A and B.
        alpha: whether each module gets an ``.alpha`` of its rank; without one, readers of the
            format take a scaling of 1.
        notes: gives further metadata for the header, by the rank of each module.

    Attributes:
        weights: name of the file; None for that of the folder.
        groups: each module, by itself.
        extras: nothing.

    Raises:
        UnsupportedError: the format cannot hold the adapter.
    """

    def __init__(
        self,
        outline: Adapter,
        *,
        name: str,
        weights: str | None,
        stems: Mapping[str, str],
        endings: tuple[str, str] = (".lora_A.weight", ".lora_B.weight"),
        alpha: bool = False,
        notes: Callable[[Mapping[str, int]], dict[str, str]] = lambda _: {},
    ) -> None:
        refuse_extras(outline, f"{name}s")
        refuse_kinds(outline, name, ("linear", "conv2d"))
        refuse_twins(stems, name)
        self.weights = weights
        self.groups = {path: [path] for path in outline}
        self.extras: Mapping[str, Array] = {}
        self._stems, self._endings, self._alpha, self._notes = stems, endings, alpha, notes
        self._about_model = {name: x for name, x in outline.metadata.header.items() if x}

    def keys(self, groups: Iterable[str]) -> list[str]:
        """Returns the names of the tensors of modules."""
        endings = (*self._endings, *([".alpha"] if self._alpha else []))
        return [self._stems[path] + ending for path in groups for ending in endings]

    def tensors(
        self, group: str, loras: Mapping[str, LoRA], rank: int, dtype: np.dtype
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Yields the factors of a module, and its alpha."""
        stem, kind = self._stems[group], loras[group].kind
        if self._alpha:
            rank = next_exact(rank, dtype)
        a, b = pad(loras[group], rank)
        if kind.name == "conv2d":
            a, b = a.reshape(rank, *kind.kernel), b[:, :, None, None]
        yield from zip((stem + ending for ending in self._endings), (a, b), strict=True)
        if self._alpha:
            yield f"{stem}.alpha", np.asarray(rank, np.float32)

    def metadata(self, ranks: Mapping[str, int]) -> dict[str, str]:
        """Returns the metadata in the header."""
        return {"format": "pt", **self._about_model, **self._notes(ranks)}

    def files(self, ranks: Mapping[str, int]) -> dict[str, str]:
        """Returns no files: all is in the tensors."""
        del ranks
        return {}


def next_exact(rank: int, dtype: np.dtype) -> int:
    """Returns the least number from a rank on that a dtype holds exactly.

    bfloat16 has all whole numbers up to 256, and then only some: 258, but not 257.
    """
    while int(np.asarray(rank).astype(dtype)) != rank:
        rank += 1
    return rank


def refuse_kinds(outline: Adapter, name: str, known: tuple[str, ...]) -> None:
    """Refuses modules of other kinds than the known ones.

    Raises:
        UnsupportedError: there is one.
    """
    for path, lora in outline.items():
        if lora.kind.name not in known:
            raise UnsupportedError(
                f"module {path!r} is {KINDS.get(lora.kind.name, lora.kind.name)}, which "
                f"{name}s cannot hold; write it with --to peft"
            )


def refuse_twins(stems: Mapping[str, str], name: str) -> None:
    """Refuses two modules with one name in the file.

    Raises:
        UnsupportedError: there are two.
    """
    paths: dict[str, str] = {}
    for path, stem in stems.items():
        if stem in paths:
            raise UnsupportedError(
                f"modules {paths[stem]!r} and {path!r} have one name in {name}s, {stem!r}, so "
                "they may be the same layer under the names of two tools; merge adapters that "
                "name their layers alike, or write it with --to peft"
            )
        paths[stem] = path
