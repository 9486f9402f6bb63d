"""`Adapter`, or a stream of its modules, to PEFT adapter folder."""

import contextlib
import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from coremerge_jax.errors import FormatError, MismatchError
from coremerge_jax.io.adapter_config import CONFIG
from coremerge_jax.io.atomic import atomic_folder, shared_folder
from coremerge_jax.io.card import model_card
from coremerge_jax.io.module_paths import (
    LORA_BIAS,
    PREFIX,
    WRAPPED,
    outermost,
    split_expert,
    unwrapped,
)
from coremerge_jax.io.outputs import ADAPTER, check_output, write_record
from coremerge_jax.io.peft import experts
from coremerge_jax.io.peft.files import WEIGHTS
from coremerge_jax.io.tensors import TensorReader, TensorWriter
from coremerge_jax.lora import DTYPES, Adapter, Array, Kind, LoRA, ModuleStream
from coremerge_jax.merging.mesh import is_spread
from coremerge_jax.merging.processes import exchange


class _Pair(NamedTuple):
    """Two tensors: the factors of one module, or of all experts of a fused parameter."""

    path: str
    kind: Kind
    modules: list[str]

    @property
    def names(self) -> tuple[str, str]:
        a, b = "lora_A.weight", "lora_B.weight"
        if self.kind.name == "embedding":
            a, b = "lora_embedding_A", "lora_embedding_B"
        return f"{PREFIX}{self.path}.{a}", f"{PREFIX}{self.path}.{b}"

    def tensors(self, loras: Mapping[str, LoRA], rank: int) -> Iterator[tuple[str, np.ndarray]]:
        factors = [_padded(loras[path], rank) for path in self.modules]
        a, b = experts.pack(factors) if self.kind.name == "expert" else factors[0]
        if self.kind.name == "conv2d":
            a, b = a.reshape(len(a), *self.kind.kernel), b[:, :, None, None]
        return zip(self.names, (a, b), strict=True)


class PeftLayout:
    """Places of an adapter's modules in PEFT's files.

    Modules that peft configures by one path form a group, and have one rank: a layer (for an
    attention, with its output projection), or all experts of a parameter.

    Args:
        outline: the adapter, of which only the shapes of factors are used.

    Attributes:
        groups: the modules of each group.
        group: the group of each module.
        extras: extra tensors by key.

    Raises:
        FormatError: the experts of a parameter are not complete.
        UnsupportedError: peft's layout of the experts is not known.
    """

    def __init__(self, outline: Adapter) -> None:
        self._outline = outline
        self._layers = {p: lora for p, lora in outline.items() if lora.kind.name != "expert"}
        self._parameters = _parameters(path for path in outline if path not in self._layers)
        self._pairs: dict[str, list[_Pair]] = {}
        for path, lora in self._layers.items():
            self._pairs.setdefault(outermost(path), []).append(_Pair(path, lora.kind, [path]))
        for parameter, path in experts.nest(self._parameters).items():
            pair = _Pair(path, Kind("expert"), self._parameters[parameter])
            self._pairs.setdefault(parameter, []).append(pair)
        self.groups = {
            group: [path for pair in pairs for path in pair.modules]
            for group, pairs in self._pairs.items()
        }
        self.group = {path: group for group, paths in self.groups.items() for path in paths}
        self.extras = self._place_extras()

    def _place_extras(self) -> dict[str, Array]:
        extras = dict(self._outline.extras)
        if self._has_lora_bias():  # peft then expects one in every layer that can have it
            for path, lora in self._layers.items():
                if lora.kind.name in ("linear", "conv2d"):
                    zeros = np.zeros(lora.shape[0], np.float32)
                    extras.setdefault(f"{path}{LORA_BIAS}", zeros)
        wrapped: dict[str, str] = {}
        for pairs in self._pairs.values():
            for pair in pairs:
                owner = unwrapped(pair.path)
                nested = wrapped.get(owner, owner) if pair.kind.name == "expert" else pair.path
                wrapped[owner] = nested + WRAPPED
        placed = {}
        for name, value in extras.items():
            owner, _, leaf = name.rpartition(".")
            placed[f"{PREFIX}{wrapped.get(owner, owner)}.{leaf}"] = value
        return placed

    def _has_lora_bias(self) -> bool:
        return any(name.endswith(LORA_BIAS) for name in self._outline.extras)

    def keys(self, groups: Iterable[str]) -> list[str]:
        """Returns the names of the tensors of groups."""
        return [key for group in groups for pair in self._pairs[group] for key in pair.names]

    def tensors(
        self, group: str, loras: Mapping[str, LoRA], rank: int
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Yields the tensors of a group by key, given its modules and their common rank."""
        for pair in self._pairs[group]:
            yield from pair.tensors(loras, rank)

    def config(self, ranks: Mapping[str, int]) -> dict[str, Any]:
        """Returns the content of adapter_config.json; alpha is the rank, so that the scaling is 1.

        Args:
            ranks: rank of each group.
        """
        top = max(ranks.values())
        patterns = {
            f"^{re.escape(group)}": ranks[group] for group in self._pairs if ranks[group] != top
        }
        kinds = [lora.kind for lora in self._layers.values()]
        metadata = self._outline.metadata
        config = {
            "peft_type": "LORA",
            # Readers recognise the layout of experts by the release.
            "peft_version": experts.LAYOUT_VERSION,
            "base_model_name_or_path": metadata.base_model,
            "task_type": metadata.task_type,
            "inference_mode": True,
            "r": top,
            "lora_alpha": top,
            "rank_pattern": patterns,
            "alpha_pattern": patterns,
            "use_rslora": False,
            "lora_dropout": 0.0,
            "lora_bias": self._has_lora_bias(),
            "init_lora_weights": True,
            "fan_in_fan_out": any(k.transposed for k in kinds if k.name == "linear"),
            "target_modules": list(dict.fromkeys(map(outermost, self._layers))),
            **metadata.config,
        }
        if self._parameters:
            config["target_parameters"] = list(self._parameters)
        if config.get("bias") == "vera_only":
            config["bias"] = "lora_only"
        return config


def _parameters(paths: Iterable[str]) -> dict[str, list[str]]:
    """Returns the experts of each fused parameter, in order."""
    found: dict[str, dict[int, str]] = {}
    for path in paths:
        parameter, index = split_expert(path)
        found.setdefault(parameter, {})[index] = path
    for parameter, parts in found.items():
        if sorted(parts) != list(range(len(parts))):
            raise FormatError(
                f"module {parameter!r} has the experts {sorted(parts)}; expected all from 0 on"
            )
    return {path: [parts[index] for index in sorted(parts)] for path, parts in found.items()}


def _padded(lora: LoRA, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the factors, padded with zeros to a rank, which does not change the update."""
    more = rank - lora.rank
    a, b = np.asarray(lora.a), np.asarray(lora.b)
    return (np.pad(a, ((0, more), (0, 0))), np.pad(b, ((0, 0), (0, more)))) if more else (a, b)


class _Parts(ModuleStream):
    """An adapter as a stream: the modules of one group after the other."""

    def __init__(self, adapter: Adapter, groups: Iterable[Sequence[str]]) -> None:
        self._adapter, self._groups = adapter, groups

    @property
    def outline(self) -> Adapter:
        return self._adapter.outline

    @property
    def spread(self) -> bool:
        adapter = self._adapter
        return adapter.in_memory and any(map(is_spread, jax.tree.leaves(dict(adapter))))

    def __iter__(self) -> Iterator[Mapping[str, LoRA]]:
        return map(self._adapter.read, self._groups)


def save_peft(
    adapter: Adapter | ModuleStream,
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
    written as they come. Memory holds one part of the stream, and the modules that wait for others
    of their group (the experts of a parameter, an attention and its output projection).

    If several processes share a merge, each writes its modules into a folder that all of them see,
    and process 0 joins the files.

    Args:
        adapter: an adapter, in memory or in a file, or a stream of its modules.
        out: the folder to write.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        rank: cut every module to this rank first.
        energy: cut every module to the lowest rank that keeps this fraction of ``||ΔW||_F^2``.
        force: replace a folder that is already there, if coremerge wrote all that is in it.
        card: origin of the adapter, for README.md and coremerge.json; ``"sources"`` is a list of
            mappings with ``"name"``, ``"path"`` and ``"sha256"``.

    Returns:
        The share of energy that each module kept, if `rank` or `energy` is given.

    Raises:
        FormatError: the output may not be replaced, or a value does not fit into `dtype`.
        MismatchError: the modules of a stream are not those of its outline.
        ProcessError: another process has failed.
    """
    card = dict(card or {})
    inputs = [source["path"] for source in card.get("sources", ()) if source.get("path")]
    inputs += adapter.folders
    check_output(out, kind=ADAPTER, inputs=inputs, force=force)
    if dtype not in DTYPES:
        raise FormatError(f"dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
    layout, factors = PeftLayout(adapter.outline), jnp.dtype(dtype)
    cut = partial(_cut, rank=rank, energy=energy)
    stream = _Parts(adapter, layout.groups.values()) if isinstance(adapter, Adapter) else adapter
    together = bool(stream.processes or stream.spread)
    write = _write_share if stream.processes else _write_spread if stream.spread else _write_all
    open_folder = shared_folder if together else atomic_folder
    with open_folder(out, kind=ADAPTER, inputs=inputs, force=force) as folder:
        ranks, kept = write(stream, layout, factors, folder, cut)
        if not together or jax.process_index() == 0:
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


def _write_spread(stream: ModuleStream, layout: PeftLayout, *how: Any) -> Written:
    """Gathers factors from the devices of all processes; process 0 writes them."""
    near = (multihost_utils.process_allgather(dict(part), tiled=True) for part in stream)
    if jax.process_index() == 0:
        return exchange(_write_all(near, layout, *how))[0]
    for _ in near:
        pass
    return exchange()[0]


def _write_all(
    parts: Iterable[Mapping[str, LoRA]],
    layout: PeftLayout,
    dtype: np.dtype,
    folder: Path,
    cut: Callable,
) -> Written:
    kept: dict[str, float] = {}
    parts = cut(parts, kept=kept)
    with _weights(folder / WEIGHTS, layout, dtype) as file:
        ranks = _write_groups(file, layout, layout.groups, parts, dtype)
    return ranks, kept


def _write_share(
    stream: ModuleStream, layout: PeftLayout, dtype: np.dtype, folder: Path, cut: Callable
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
def _weights(file: Path, layout: PeftLayout, dtype: np.dtype) -> Iterator[TensorWriter]:
    """Yields a writer for the factors; wider extras are written before them, others after them."""
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
    """Yields the parts, cut if `rank` or `energy` is given; puts the kept shares into `kept`."""
    if rank is None and energy is None:
        return iter(parts)
    from coremerge_jax.merging.truncation import truncate

    def cut(part: Mapping[str, LoRA]) -> Mapping[str, LoRA]:
        shorter, shares = truncate(Adapter(part), rank=rank, energy=energy)
        kept.update(shares)
        return shorter

    return map(cut, filter(None, parts))


def _write_groups(
    file: TensorWriter,
    layout: PeftLayout,
    groups: Iterable[str],
    parts: Iterable[Mapping[str, LoRA]],
    dtype: np.dtype,
) -> dict[str, int]:
    """Writes the modules of some groups as they come; returns the ranks of the groups."""
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
