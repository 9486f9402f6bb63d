"""`Adapter`, or a stream of its modules, to PEFT adapter folder."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from coremerge_jax.checkpoint.atomic import atomic_folder, shared_folder
from coremerge_jax.checkpoint.outputs import ADAPTER, check_output, write_record
from coremerge_jax.checkpoint.peft.card import model_card
from coremerge_jax.checkpoint.peft.layout import Layout
from coremerge_jax.checkpoint.peft.source import CONFIG, WEIGHTS
from coremerge_jax.checkpoint.tensor_file import TensorReader, TensorWriter
from coremerge_jax.errors import FormatError, MismatchError
from coremerge_jax.grid import is_spread
from coremerge_jax.lora import Adapter, Array, LoRA
from coremerge_jax.processes import exchange
from coremerge_jax.recipe import DTYPES


class Stream(Protocol):
    """An adapter whose modules come in parts, each module once, in any order.

    One that several processes share has, as a `MergeStream`, a ``share`` for each of them, and says
    which they are in ``processes``; or it says that its factors are ``spread`` over their devices.

    Attributes:
        outline: the adapter with shapes in place of its factors.
    """

    @property
    def outline(self) -> Adapter: ...  # noqa: D102

    def __iter__(self) -> Iterator[Mapping[str, LoRA]]: ...


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

    Of a merge that several processes share, each writes what it merges, into a folder that all of
    them see; the first one puts it together.

    Args:
        adapter: what to write: an adapter, in memory or in a file, or a stream of its modules.
        out: the folder to write.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        rank: cut every module to this rank first.
        energy: cut every module to the lowest rank that keeps this fraction of ``||ΔW||_F^2``.
        force: replace a folder that is already there, if coremerge wrote all that is in it.
        card: where the adapter comes from, for README.md and coremerge.json; under ``"sources"``
            a list of mappings with ``"name"``, ``"path"`` and ``"sha256"``.

    Returns:
        The energy kept in each module, where `rank` or `energy` is given.

    Raises:
        FormatError: the output may not be replaced, or a value does not fit into `dtype`.
        MismatchError: the modules of a stream are not those of its outline.
        ProcessError: another process has failed.
    """
    card = dict(card or {})
    inputs = [source["path"] for source in card.get("sources", ()) if source.get("path")]
    inputs += getattr(adapter, "folders", ())
    check_output(out, kind=ADAPTER, inputs=inputs, force=force)
    if dtype not in DTYPES:
        raise FormatError(f"dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
    layout, factors = Layout(adapter.outline), jnp.dtype(dtype)
    cut = partial(_cut, rank=rank, energy=energy)
    shared, spread = bool(getattr(adapter, "processes", ())), _is_spread(adapter)
    write = _write_share if shared else _write_spread if spread else _write_all
    open_folder = shared_folder if shared or spread else atomic_folder
    with open_folder(out, kind=ADAPTER, inputs=inputs, force=force) as folder:
        ranks, kept = write(adapter, layout, factors, folder, cut)
        if not (shared or spread) or jax.process_index() == 0:
            content = {"modules": len(layout.group), "rank": max(ranks.values()), "dtype": dtype}
            base_model = adapter.outline.metadata.base_model
            readme, provenance = model_card(base_model, {**content, **card})
            config = layout.config(ranks)
            (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
            (folder / "README.md").write_text(readme, encoding="utf-8")
            write_record(folder, ADAPTER, provenance)
    return {path: kept[path] for path in adapter.outline} if kept else None


# The rank of each group, and the energy that each module has kept.
Written = tuple[dict[str, int], dict[str, float]]


def _is_spread(adapter: Any) -> bool:
    if type(adapter) is Adapter:  # not in a file
        return any(map(is_spread, jax.tree.leaves(dict(adapter))))
    return getattr(adapter, "spread", False)


def _write_spread(adapter: Any, layout: Layout, *how: Any) -> Written:
    """Gathers what is on devices of all processes; one process writes it."""
    parts = _parts(adapter, layout)
    near = (multihost_utils.process_allgather(dict(part), tiled=True) for part in parts)
    if jax.process_index() == 0:
        return exchange(_write_all(near, layout, *how))[0]
    for _ in near:
        pass
    return exchange()[0]


def _write_all(
    adapter: Any, layout: Layout, dtype: np.dtype, folder: Path, cut: Callable
) -> Written:
    kept: dict[str, float] = {}
    parts = cut(_parts(adapter, layout), kept=kept)
    with _weights(folder / WEIGHTS, layout, dtype) as file:
        ranks = _write_groups(file, layout, layout.groups, parts, dtype)
    return ranks, kept


def _parts(adapter: Any, layout: Layout) -> Iterable[Mapping[str, LoRA]]:
    return map(adapter.read, layout.groups.values()) if isinstance(adapter, Adapter) else adapter


def _write_share(
    stream: Any, layout: Layout, dtype: np.dtype, folder: Path, cut: Callable
) -> Written:
    """Writes this process's share to a file of its own, then all these files into one."""
    kept: dict[str, float] = {}
    index = jax.process_index()
    share, owner = stream.share(layout.groups.values())
    own = [group for group, paths in layout.groups.items() if owner[paths[0]] == index]
    files = [folder / f"{i}.safetensors" for i in range(jax.process_count())]
    with TensorWriter(files[index], layout.keys(own)) as file:
        ranks = _write_groups(file, layout, own, cut(share, kept=kept), dtype)
    for other_ranks, other_kept in exchange([ranks, kept]):
        ranks, kept = ranks | other_ranks, kept | other_kept
    if index == 0:
        with _weights(folder / WEIGHTS, layout, dtype) as file:
            for part in files:
                _copy(part, file)
                part.unlink()
    return ranks, kept


def _copy(part: Path, file: TensorWriter) -> None:
    reader = TensorReader(part)
    for key in reader.tensors:
        with reader.opened() as tensor:
            file.write(key, tensor(key))


@contextlib.contextmanager
def _weights(file: Path, layout: Layout, dtype: np.dtype) -> Iterator[TensorWriter]:
    """Yields a writer for an adapter's factors: wider extras come before them, others behind."""
    widths = {key: _written_as(value, dtype).itemsize for key, value in layout.extras.items()}
    ordered = sorted(widths, key=lambda key: -widths[key])
    names = [*layout.keys(layout.groups), *ordered]
    with TensorWriter(file, names, {"format": "pt"}) as tensors:
        for wide in (True, False):
            for key in ordered:
                if (widths[key] > dtype.itemsize) == wide:
                    _write(tensors, key, np.asarray(layout.extras[key]), dtype)
            if wide:
                yield tensors


def _cut(
    parts: Iterable[Mapping[str, LoRA]],
    *,
    rank: int | None,
    energy: float | None,
    kept: dict[str, float],
) -> Iterator[Mapping[str, LoRA]]:
    """Yields the parts, truncated where that is wanted; notes the energy that each module kept."""
    if rank is None and energy is None:
        return iter(parts)
    from coremerge_jax.truncation import truncate

    def cut(part: Mapping[str, LoRA]) -> Mapping[str, LoRA]:
        shorter, shares = truncate(Adapter(part), rank=rank, energy=energy)
        kept.update(shares)
        return shorter

    return map(cut, filter(None, parts))


def _write_groups(
    file: TensorWriter,
    layout: Layout,
    groups: Iterable[str],
    parts: Iterable[Mapping[str, LoRA]],
    dtype: np.dtype,
) -> dict[str, int]:
    """Writes the modules of some groups as they come; gives the groups' ranks."""
    missing = {path for group in groups for path in layout.groups[group]}
    waiting: dict[str, dict[str, LoRA]] = {}
    ranks: dict[str, int] = {}

    def write_complete(part: Mapping[str, LoRA]) -> None:
        for path, lora in part.items():
            if path not in missing:
                raise MismatchError(
                    f"module {path!r} came twice, or is not in the stream's outline"
                )
            missing.remove(path)
            group = layout.group[path]
            loras = waiting.setdefault(group, {})
            loras[path] = lora
            if len(loras) == len(layout.groups[group]):
                ranks[group] = max(1, *(lora.rank for lora in loras.values()))
                for key, value in layout.tensors(group, waiting.pop(group), ranks[group]):
                    _write(file, key, value, dtype)

    for part in parts:
        write_complete(part)
        for loras in waiting.values():
            for path in loras.keys() & part.keys():  # a view would keep the whole part
                lora = loras[path]
                loras[path] = dataclasses.replace(lora, a=np.array(lora.a), b=np.array(lora.b))
        del part  # before the next one is made
    if missing:
        raise MismatchError(
            f"the stream ended without {len(missing)} modules of its outline "
            f"(first: {min(missing)!r})"
        )
    return ranks


def _write(file: TensorWriter, key: str, value: np.ndarray, dtype: np.dtype) -> None:
    file.write(key, _cast(key, value, _written_as(value, dtype)))


def _written_as(value: Array, dtype: np.dtype) -> np.dtype:
    """Returns the dtype in which a tensor is written."""
    return value.dtype if _is_whole(value.dtype) else dtype


def _cast(key: str, value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Returns the tensor in another dtype, if that can hold the largest of its magnitudes."""
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
