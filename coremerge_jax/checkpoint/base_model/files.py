"""Updates added to the tensors of a Hugging Face folder, in copies of its files."""

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from coremerge_jax import addition
from coremerge_jax.addition import FLOATS, add, add_update, cast
from coremerge_jax.checkpoint.base_model.extras import place_extras
from coremerge_jax.checkpoint.base_model.folder import INDEX, BaseModel
from coremerge_jax.checkpoint.base_model.folding import Applied, Folding, Report
from coremerge_jax.checkpoint.base_model.names import find_tensors
from coremerge_jax.checkpoint.base_model.tied import refuse_tied
from coremerge_jax.checkpoint.base_model.updates import Update, place_updates
from coremerge_jax.checkpoint.outputs import RECORD
from coremerge_jax.checkpoint.tensor_file import LazyTensor, TensorEditor
from coremerge_jax.errors import UnsupportedError
from coremerge_jax.lora import Adapter, Array, LoRA


class FileFolding(Folding):
    """An adapter and a Hugging Face folder.

    Args:
        adapter: see `apply_adapter`.
        base: see `apply_adapter`.
        scale: see `apply_adapter`.
    """

    def __init__(self, adapter: Adapter, base: str | Path, *, scale: float = 1.0) -> None:
        self._base = model = BaseModel(base)
        outline = adapter.outline
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
        report = Report(
            modules={path: modules[path] for path in outline},
            replaced=sorted({*extras.replaced, *extras.rows, *extras.biases}),
            appended=list(extras.appended),
            copied=[name for name in copied if name != RECORD],
            skipped=skipped,
        )
        super().__init__(adapter, base, [model.folder, *adapter.folders], report, scale)

    def _fold(self, folder: Path, origin: Mapping[str, Any]) -> Iterator[tuple[str, float]]:  # noqa: ARG002
        for name in self._base.shards:
            self._copy_shard(name, folder)
            with TensorEditor(folder / name) as file:
                yield from self._change(file)
        self._copy_others(folder)

    @property
    def _last(self) -> str:
        """The file that gets the tensors that the base does not have."""
        return list(self._base.shards)[-1]

    def _copy_shard(self, name: str, folder: Path) -> None:
        reader, more = self._base.shards[name], self._extras.appended
        if more and name == self._last:
            dtypes = {key: self._dtype(value) for key, value in more.items()}
            values = {key: cast(key, np.asarray(more[key]), dtypes[key]) for key in more}
            reader.copy_with(folder / name, values)
        else:
            shutil.copyfile(reader.file, folder / name)

    def _dtype(self, value: Array) -> np.dtype:
        """Returns the dtype for a tensor that the base lacks: that of its weights, for floats."""
        weight = self._base.floating(next(iter(self._updates))).dtype
        return weight if value.dtype.name in FLOATS else value.dtype

    def _change(self, file: TensorEditor) -> Iterator[tuple[str, float]]:
        """Changes tensors of one file; the loss of each module."""
        extras = self._extras
        for name, tensor in file.tensors.items():
            dtype = tensor.dtype
            for start, value in _parts(extras.replaced.get(name)):
                file.write(name, start, cast(name, value, dtype))
            if name in extras.rows:
                values = cast(name, np.asarray(extras.rows[name].values), dtype)
                for row, value in zip(extras.rows[name].indices, values, strict=True):
                    file.write(name, row * value.size, value)
            if name in extras.biases:
                bias = np.asarray(extras.biases[name], np.float32) * np.float32(self.scale)
                file.write(name, 0, add(name, file.read(name, 0, bias.size), bias)[0])
            if name in self._updates:
                loras = self.adapter.read(update.path for update in self._updates[name])
                for update in self._updates[name]:
                    lora = loras.pop(update.path)
                    yield update.path, _fold(file, name, update, lora, self.scale)

    def _copy_others(self, folder: Path) -> None:
        for name in self.report.copied:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self._base.folder / name, folder / name)
        if self._base.index is not None and self._extras.appended:
            index = json.dumps(self._index(self._base.index), indent=2) + "\n"
            (folder / INDEX).write_text(index)

    def _index(self, index: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the index of the files, with the tensors that the base does not have."""
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


def _fold(file: TensorEditor, name: str, update: Update, lora: LoRA, scale: float) -> float:
    """Adds the update of a module to its part of a tensor; the rounding loss."""
    columns = update.shape[1]

    def read(start: int, stop: int) -> np.ndarray:
        first, last = (update.start + row * columns for row in (start, stop))
        return file.read(name, first, last).reshape(-1, columns)

    def write(start: int, rows: np.ndarray) -> None:
        file.write(name, update.start + start * columns, rows.reshape(-1))

    return add_update(name, lora, read, write, transposed=update.transposed, scale=scale)


def _parts(value: Array | LazyTensor | None) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the parts of a flat tensor, and where each starts; none of no tensor."""
    if value is None:
        return
    if isinstance(value, LazyTensor):
        read = value.read
    else:
        flat = np.asarray(value).reshape(-1)
        read = lambda start, stop: flat[start:stop]  # noqa: E731
    size = math.prod(value.shape)
    for start in range(0, size, addition.BLOCK):
        yield start, read(start, min(start + addition.BLOCK, size))
