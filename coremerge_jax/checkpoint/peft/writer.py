"""`Adapter`, or a stream of its modules, to PEFT adapter folder."""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from coremerge_jax.checkpoint import atomic
from coremerge_jax.checkpoint.peft.card import PROVENANCE, model_card
from coremerge_jax.checkpoint.peft.layout import Layout
from coremerge_jax.checkpoint.peft.source import CONFIG, WEIGHTS, same_folder
from coremerge_jax.checkpoint.tensor_file import TensorWriter
from coremerge_jax.errors import FormatError, MismatchError
from coremerge_jax.lora import Adapter, Array, LoRA
from coremerge_jax.recipe import DTYPES


class Stream(Protocol):
    """An adapter whose modules come in parts, each module once, in any order.

    Attributes:
        outline: the adapter with shapes in place of its factors.
    """

    @property
    def outline(self) -> Adapter: ...  # noqa: D102

    def __iter__(self) -> Iterator[Mapping[str, LoRA]]: ...


def check_output(
    out: str | Path, *, force: bool = False, sources: Iterable[str | Path] = ()
) -> None:
    """Raises the error that `save_peft` would, before any work is done.

    Args:
        out: the folder to write.
        force: whether an adapter folder there may be replaced.
        sources: folders that may not be replaced.

    Raises:
        FormatError: the output exists and may not be replaced.
    """
    for source in sources:
        if same_folder(source, out):
            raise FormatError(f"{out}: is one of the sources; choose another output")
    atomic.check_output(out, markers=(CONFIG,), force=force)


def save_peft(
    adapter: Adapter | Stream,
    out: str | Path,
    *,
    dtype: str = "float32",
    rank: int | None = None,
    energy: float | None = None,
    force: bool = False,
    card: Mapping[str, Any] | None = None,
) -> dict[str, float] | None:
    """Writes a PEFT adapter folder that peft loads, with a scaling of 1 in every module.

    The folder appears whole or not at all; one that is replaced is deleted last. Modules are
    written as they come: no more are in memory than those of one part of the stream, and those
    that wait for the others of their group (the experts of a parameter, an attention and its
    output projection).

    Args:
        adapter: what to write: an adapter, in memory or in a file, or a stream of its modules.
        out: the folder to write.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        rank: cut every module to this rank first.
        energy: cut every module to the lowest rank that keeps this fraction of ``||ΔW||_F^2``.
        force: replace an adapter folder that is already there.
        card: where the adapter comes from, for README.md and coremerge.json; under ``"sources"``
            a list of mappings with ``"name"``, ``"path"`` and ``"sha256"``.

    Returns:
        The energy kept in each module, where `rank` or `energy` is given.

    Raises:
        FormatError: the output may not be replaced, or a value does not fit into `dtype`.
        MismatchError: the modules of a stream are not those of its outline.
    """
    card = dict(card or {})
    sources = [source["path"] for source in card.get("sources", ()) if source.get("path")]
    check_output(out, force=force, sources=sources)
    if dtype not in DTYPES:
        raise FormatError(f"dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
    outline = adapter.outline
    layout = Layout(outline)
    parts = map(adapter.read, layout.groups.values()) if isinstance(adapter, Adapter) else adapter
    kept: dict[str, float] = {}
    with atomic.atomic_folder(out, markers=(CONFIG,), force=force) as folder:
        with TensorWriter(folder / WEIGHTS, layout.keys(), {"format": "pt"}) as file:
            writer = _Writer(layout, file, jnp.dtype(dtype))
            writer.write_extras(wide=True)
            for part in _cut(parts, rank, energy, kept):
                writer.write(part)
                del part  # before the next one is made
            writer.check_complete()
            writer.write_extras(wide=False)
        content = {"modules": len(outline), "rank": max(writer.ranks.values()), "dtype": dtype}
        readme, provenance = model_card(outline.metadata.base_model, {**content, **card})
        config = layout.config(writer.ranks)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        (folder / "README.md").write_text(readme, encoding="utf-8")
        (folder / PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n")
    return {path: kept[path] for path in outline} if kept else None


def _cut(
    parts: Iterable[Mapping[str, LoRA]],
    rank: int | None,
    energy: float | None,
    kept: dict[str, float],
) -> Iterator[Mapping[str, LoRA]]:
    """The parts, truncated where that is wanted; notes the energy that each module kept."""
    if rank is None and energy is None:
        return iter(parts)
    from coremerge_jax.truncation import truncate

    def cut(part: Mapping[str, LoRA]) -> Mapping[str, LoRA]:
        shorter, shares = truncate(Adapter(part), rank=rank, energy=energy)
        kept.update(shares)
        return shorter

    return map(cut, filter(None, parts))


class _Writer:
    """Writes tensors of an adapter as they come.

    Attributes:
        ranks: of the groups that are written.
    """

    def __init__(self, layout: Layout, file: TensorWriter, dtype: np.dtype) -> None:
        self._layout, self._file, self._dtype = layout, file, dtype
        self._missing = set(layout.group)
        self._waiting: dict[str, dict[str, LoRA]] = {}
        self.ranks: dict[str, int] = {}

    def write(self, part: Mapping[str, LoRA]) -> None:
        """Writes the groups that are complete with this part, and keeps the other modules."""
        for path, lora in part.items():
            if path not in self._missing:
                raise MismatchError(
                    f"module {path!r} came twice, or is not in the stream's outline"
                )
            self._missing.remove(path)
            group = self._layout.group[path]
            waiting = self._waiting.setdefault(group, {})
            waiting[path] = lora
            if len(waiting) == len(self._layout.groups[group]):
                self._write_group(group, self._waiting.pop(group))
        for waiting in self._waiting.values():
            for path in waiting.keys() & part.keys():  # a view would keep the whole part
                lora = waiting[path]
                waiting[path] = dataclasses.replace(lora, a=np.array(lora.a), b=np.array(lora.b))

    def check_complete(self) -> None:
        """Raises the error that modules are missing."""
        if self._missing:
            raise MismatchError(
                f"the stream ended without {len(self._missing)} modules of its outline "
                f"(first: {min(self._missing)!r})"
            )

    def write_extras(self, *, wide: bool) -> None:
        """Writes the extras wider than the factors, or the others: the file is in this order."""
        extras = self._layout.extras
        widths = {key: self._dtype_of(value).itemsize for key, value in extras.items()}
        for key in sorted(widths, key=lambda key: -widths[key]):
            if (widths[key] > self._dtype.itemsize) == wide:
                self._write(key, np.asarray(extras[key]))

    def _write_group(self, group: str, loras: Mapping[str, LoRA]) -> None:
        rank = max(1, *(lora.rank for lora in loras.values()))
        self.ranks[group] = rank
        for key, value in self._layout.tensors(group, loras, rank):
            self._write(key, value)

    def _write(self, key: str, value: np.ndarray) -> None:
        self._file.write(key, _cast(key, value, self._dtype_of(value)))

    def _dtype_of(self, value: Array) -> np.dtype:
        """What a tensor is written as."""
        return value.dtype if _is_whole(value.dtype) else self._dtype


def _cast(key: str, value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The tensor in another dtype, if that can hold the largest of its magnitudes."""
    if _is_whole(dtype):
        return value
    with np.errstate(over="ignore", invalid="ignore"):
        largest = np.maximum(value.max(initial=0), -value.min(initial=0))
        if np.isfinite(largest.astype(dtype)):
            return value.astype(dtype, copy=False)
    if np.isfinite(largest):
        raise FormatError(f"tensor {key!r} overflows {dtype}; choose bfloat16 or float32")
    raise FormatError(f"tensor {key!r} has NaN or infinite values, so it is not written")


def _is_whole(dtype: np.dtype) -> bool:
    return np.issubdtype(dtype, np.integer) or dtype == np.bool_
