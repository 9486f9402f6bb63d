"""An adapter's updates, added to the weights of its base model: ``W' = W + b @ a``."""

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from coremerge_jax import __version__
from coremerge_jax.checkpoint import atomic
from coremerge_jax.checkpoint.base_model.extras import place_extras
from coremerge_jax.checkpoint.base_model.folder import FLOATS, INDEX, BaseModel
from coremerge_jax.checkpoint.base_model.names import find_tensors
from coremerge_jax.checkpoint.base_model.tied import refuse_tied
from coremerge_jax.checkpoint.base_model.updates import Update, place_updates
from coremerge_jax.checkpoint.peft.card import PROVENANCE
from coremerge_jax.checkpoint.tensor_file import LazyTensor, TensorEditor
from coremerge_jax.errors import FormatError, RecipeError, UnsupportedError
from coremerge_jax.lora import Adapter, Array, LoRA, widest

# Elements of a tensor that are in memory at a time, a few times over: they fit into caches, which
# makes three times the speed of blocks of 16 MiB.
_BLOCK = 2**18


@dataclasses.dataclass(frozen=True)
class Applied:
    """What came of a module's update.

    Attributes:
        tensor: name of the tensor in the base model.
        shape: of the update, as it is stored.
        dtype: of the tensor.
        rounding_loss: the share of the update that rounding to the dtype changed,
            ``‖cast(W + ΔW) - (W + ΔW)‖ / ‖ΔW‖``; 0 without an update.
    """

    tensor: str
    shape: tuple[int, int]
    dtype: str
    rounding_loss: float = 0.0


@dataclasses.dataclass(frozen=True)
class Report:
    """What was done to a base model.

    Attributes:
        modules: what came of the update of each module.
        replaced: tensors that were set to trained values, in whole or in some rows, or to which
            a trained bias was added.
        appended: tensors that the base model does not have.
        copied: files that were copied as they are, beside those with the weights.
        skipped: files that were left out, as they hold weights without the update.
    """

    modules: dict[str, Applied]
    replaced: list[str]
    appended: list[str]
    copied: list[str]
    skipped: list[str]


class Folding:
    """An adapter and its base model, found to fit. See `apply_adapter` for arguments and errors.

    Attributes:
        report: what will be done; no losses are known yet.
    """

    def __init__(self, adapter: Adapter, base: str | Path, *, scale: float = 1.0) -> None:
        if not np.isfinite(scale):
            raise RecipeError(f"scale is {scale}; expected a finite number")
        self._adapter, self._scale, self._base = adapter, scale, BaseModel(base)
        outline, model = adapter.outline, self._base
        refuse_tied(model, outline)
        kinds = {path: lora.kind for path, lora in outline.items()}
        prefix, tensors = find_tensors(kinds, model.shard, str(model.folder))
        self._updates = place_updates(model, outline, tensors)
        self._extras = place_extras(model, outline, prefix)
        for name in self._extras.rows.keys() & self._updates.keys():
            raise UnsupportedError(
                f"{model.folder}: tensor {name!r} has both trained rows and a low-rank update; "
                "merge the adapter with peft"
            )
        modules = {
            update.path: Applied(name, update.shape, model.floating(name).dtype.name)
            for name, updates in self._updates.items()
            for update in updates
        }
        extras, (copied, skipped) = self._extras, model.others()
        self.report = Report(
            {path: modules[path] for path in outline},
            replaced=sorted({*extras.replaced, *extras.rows, *extras.biases}),
            appended=list(extras.appended),
            copied=[name for name in copied if name != PROVENANCE],
            skipped=skipped,
        )

    def check_output(self, out: str | Path, *, force: bool = False) -> None:
        """Raises the error that `write` would for its arguments, before any work is done."""
        path, folder = Path(os.path.realpath(out)), Path(os.path.realpath(self._base.folder))
        if path == folder or folder in path.parents or path in folder.parents:
            raise FormatError(f"{out}: is, or contains, or is in the base; choose another output")
        atomic.check_output(out, marker=PROVENANCE, force=force)

    def write(
        self,
        out: str | Path,
        *,
        force: bool = False,
        provenance: Mapping[str, Any] | None = None,
        advance: Callable[[], None] = lambda: None,
    ) -> Report:
        """Writes the changed model.

        Args:
            out: see `apply_adapter`.
            force: see `apply_adapter`.
            provenance: see `apply_adapter`.
            advance: called after each module.
        """
        self.check_output(out, force=force)
        losses: dict[str, float] = {}
        # The products are small: threads would wait for each other for longer than they compute.
        with (
            threadpool_limits(1, user_api="blas"),
            atomic.atomic_folder(out, marker=PROVENANCE, force=force) as folder,
        ):
            for name in self._base.shards:
                self._copy_shard(name, folder)
                with TensorEditor(folder / name) as file:
                    for path, loss in self._change(file):
                        losses[path] = loss
                        advance()
            self._copy_others(folder)
            done = {
                path: dataclasses.replace(module, rounding_loss=losses[path])
                for path, module in self.report.modules.items()
            }
            report = dataclasses.replace(self.report, modules=done)
            self._write_provenance(folder / PROVENANCE, report, provenance or {})
        return report

    @property
    def _last(self) -> str:
        """The file that gets the tensors that the base does not have."""
        return list(self._base.shards)[-1]

    def _copy_shard(self, name: str, folder: Path) -> None:
        reader, more = self._base.shards[name], self._extras.appended
        if more and name == self._last:
            dtypes = {key: self._dtype(value) for key, value in more.items()}
            cast = {key: _cast(key, np.asarray(more[key]), dtype) for key, dtype in dtypes.items()}
            reader.copy_with(folder / name, cast)
        else:
            shutil.copyfile(reader.file, folder / name)

    def _dtype(self, value: Array) -> np.dtype:
        """What a tensor is written as that the base does not have: floats like its weights."""
        weight = self._base.floating(next(iter(self._updates))).dtype
        return weight if value.dtype.name in FLOATS else value.dtype

    def _change(self, file: TensorEditor) -> Iterator[tuple[str, float]]:
        """Changes tensors of one file; the loss of each module."""
        extras = self._extras
        for name, tensor in file.tensors.items():
            dtype = tensor.dtype
            for start, value in _parts(extras.replaced.get(name)):
                file.write(name, start, _cast(name, value, dtype))
            if name in extras.rows:
                values = _cast(name, np.asarray(extras.rows[name].values), dtype)
                for row, value in zip(extras.rows[name].indices, values, strict=True):
                    file.write(name, row * value.size, value)
            if name in extras.biases:
                bias = np.asarray(extras.biases[name], np.float32) * np.float32(self._scale)
                file.write(name, 0, _add(name, file.read(name, 0, bias.size), bias)[0])
            if name in self._updates:
                loras = self._adapter.read(update.path for update in self._updates[name])
                for update in self._updates[name]:
                    lora = loras.pop(update.path)
                    yield update.path, _fold(file, name, update, lora, self._scale)

    def _copy_others(self, folder: Path) -> None:
        for name in self.report.copied:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self._base.folder / name, folder / name)
        if self._base.index is not None and self._extras.appended:
            index = json.dumps(self._index(self._base.index), indent=2) + "\n"
            (folder / INDEX).write_text(index)

    def _index(self, index: Mapping[str, Any]) -> dict[str, Any]:
        """The index of the files, with the tensors that the base does not have."""
        more, metadata = self._extras.appended, dict(index.get("metadata") or {})
        sizes = {name: math.prod(value.shape) for name, value in more.items()}
        counts = {
            "total_parameters": sum(sizes.values()),
            "total_size": sum(self._dtype(more[name]).itemsize * sizes[name] for name in more),
        }
        metadata |= {
            field: metadata[field] + count for field, count in counts.items() if field in metadata
        }
        weight_map = {**index["weight_map"], **dict.fromkeys(more, self._last)}
        return {**index, "metadata": metadata, "weight_map": weight_map}

    def _write_provenance(self, file: Path, report: Report, more: Mapping[str, Any]) -> None:
        content = {
            "coremerge_version": __version__,
            "base": self._base.source,
            "adapter": self._adapter.metadata.name,
            "scale": self._scale,
            **more,
            **dataclasses.asdict(report),
        }
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def apply_adapter(
    adapter: Adapter,
    base: str | Path,
    out: str | Path,
    *,
    scale: float = 1.0,
    force: bool = False,
    provenance: Mapping[str, Any] | None = None,
) -> Report:
    """Folds an adapter into the weights of its base model, a Hugging Face safetensors folder.

    ``W' = W + scale * b @ a``, in float32 (the sum with float64 weights in float64), and rounded
    once to the dtype of W. Every file with weights is copied, and the adapted tensors in it are
    overwritten block by block: all else stays as it is, to the byte, and memory does not depend on
    the size of the model. Weights in other formats, and hidden files, are not copied.

    Extras of the adapter: full weights and biases replace the base's, trained token rows those of
    the embedding, and what the base does not have (a classifier) comes at the end of its last
    file, in the dtype of its weights.

    Args:
        adapter: the adapter; one from `open_peft` is read module by module.
        base: a folder with ``config.json`` and ``model.safetensors``, or shards and their index;
            or a Hugging Face id ``owner/name`` or ``owner/name@revision``.
        out: the folder to write; it appears whole or not at all.
        scale: of the update.
        force: replace a folder written by coremerge that is already there.
        provenance: what coremerge.json shall say beside names, scale and report.

    Raises:
        FormatError: files of the base are missing or broken, the output may not be replaced, or a
            result does not fit into the base's dtype.
        MismatchError: the adapter does not fit the base.
        UnsupportedError: the base is quantized or no safetensors folder; or the adapter changes
            one of two embeddings that are tied.
    """
    folding = Folding(adapter, base, scale=scale)
    return folding.write(out, force=force, provenance=provenance)


# What overflows is found in the result, and refused.
_unwarned = np.errstate(over="ignore", invalid="ignore")


@_unwarned
def _fold(file: TensorEditor, name: str, update: Update, lora: LoRA, scale: float) -> float:
    """Adds the update of a module to its part of a tensor, by blocks of rows; the loss."""
    a, b = np.asarray(lora.a, np.float32), np.asarray(lora.b, np.float32)
    left, right = (a.T, b.T) if update.transposed else (b, a)
    rows, columns = update.shape
    step = max(1, _BLOCK // columns)
    norm = lost = 0.0
    for row in range(0, rows, step):
        delta = (left[row : row + step] @ right).reshape(-1)
        delta *= np.float32(scale)
        start = update.start + row * columns
        weight = file.read(name, start, start + delta.size)
        changed, rest = _add(name, weight, delta)
        file.write(name, start, changed)
        norm += _square(delta)
        lost += _square(rest)
    return (lost / norm) ** 0.5 if norm else 0.0


def _parts(value: Array | LazyTensor | None) -> Iterator[tuple[int, np.ndarray]]:
    """The parts of a flat tensor, and where each starts; none of no tensor."""
    if value is None:
        return
    if isinstance(value, LazyTensor):
        read = value.read
    else:
        flat = np.asarray(value).reshape(-1)
        read = lambda start, stop: flat[start:stop]  # noqa: E731
    size = math.prod(value.shape)
    for start in range(0, size, _BLOCK):
        yield start, read(start, min(start + _BLOCK, size))


@_unwarned
def _add(name: str, weight: np.ndarray, delta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sum in the dtype of the weight, and what rounding took from the update."""
    wide = weight.astype(widest(np.dtype(np.float32), weight.dtype))
    changed = _cast(name, wide + delta, weight.dtype)
    # In this order exact, but for updates larger than the weight.
    return changed, delta - (changed.astype(wide.dtype) - wide)


@_unwarned
def _cast(name: str, value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    cast = value.astype(dtype)
    if dtype.name in FLOATS and not np.isfinite(cast).all():
        raise FormatError(
            f"tensor {name!r}: the result has values that {dtype} cannot hold, or that are not "
            "finite; check base and adapter, or apply to a base in a wider dtype"
        )
    return cast


def _square(x: np.ndarray) -> float:
    """Sum of squares."""
    return float(np.square(x, dtype=np.float64).sum())
