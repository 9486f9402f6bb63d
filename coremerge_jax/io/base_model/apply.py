"""Adapters folded into the base models that they adapt, on disk."""

import abc
import dataclasses
import itertools
import json
import math
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from coremerge_jax import __version__
from coremerge_jax.errors import CoreMergeWarning, RecipeError, UnsupportedError
from coremerge_jax.io.atomic import atomic_folder
from coremerge_jax.io.base_model.folder import INDEX, BaseModel
from coremerge_jax.io.base_model.places import Update, place_updates, split_modules
from coremerge_jax.io.base_model.replacements import find_twins, place_extras, read_parts
from coremerge_jax.io.base_model.tensor_names import find_tensors
from coremerge_jax.io.orbax.orbax_folder import is_orbax
from coremerge_jax.io.orbax.orbax_tree import open_tree, write_tree
from coremerge_jax.io.outputs import MODEL, RECORD, check_output, write_record
from coremerge_jax.io.tensors import TensorEditor
from coremerge_jax.io.untrusted import check_path
from coremerge_jax.lora import FLOATS, Adapter, Array, LoRA
from coremerge_jax.naming.spelling import is_expert_layer, template
from coremerge_jax.trees.families import find_names
from coremerge_jax.trees.fold import add, add_update, cast, fold_on_host
from coremerge_jax.trees.kernels import find_kernels
from coremerge_jax.trees.layouts import LAYOUTS
from coremerge_jax.trees.paths import flatten


@dataclasses.dataclass(frozen=True)
class Applied:
    """Result of adding one module's update.

    Attributes:
        tensor: name of the tensor in the base model.
        shape: shape of the update, as it is stored.
        dtype: dtype of the tensor.
        rounding_loss: the share of the update that rounding to the dtype changed,
            ``‖cast(W + ΔW) - (W + ΔW)‖ / ‖ΔW‖``; 0 without an update.
    """

    tensor: str
    shape: tuple[int, ...]
    dtype: str
    rounding_loss: float = 0.0


@dataclasses.dataclass(frozen=True)
class Report:
    """Report on the changes to a base model.

    Attributes:
        modules: the result for each module.
        replaced: tensors that were set to trained values, in whole or in some rows, or to which
            a trained bias was added.
        appended: tensors that the base model does not have.
        copied: files that were copied unchanged, beside those with the weights.
        skipped: files with weights that lack the update, an adapter's configuration beside them,
            and other items of a checkpoint; they are left out.
    """

    modules: dict[str, Applied]
    replaced: list[str] = dataclasses.field(default_factory=list)
    appended: list[str] = dataclasses.field(default_factory=list)
    copied: list[str] = dataclasses.field(default_factory=list)
    skipped: list[str] = dataclasses.field(default_factory=list)


class Folding(abc.ABC):
    """An adapter and a base model that it fits. Arguments and errors are those of `apply_adapter`.

    Attributes:
        adapter: with the names of the base model.
        report: the changes to make; rounding losses are not known yet.
        scale: factor of the update.
    """

    def __init__(
        self,
        adapter: Adapter,
        base: str | Path,
        inputs: Sequence[Path],
        report: Report,
        scale: float,
    ) -> None:
        self.adapter, self.report, self.scale = adapter, report, scale
        self._source, self._inputs = str(base), inputs

    @abc.abstractmethod
    def _fold(self, folder: Path, origin: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
        """Writes the changed model into a folder; yields each module and its rounding loss.

        Args:
            folder: the folder to fill.
            origin: names and hashes of base and adapter, for the model's metadata.
        """

    def check_output(self, out: str | Path, *, force: bool = False) -> None:
        """Raises the error that `write` would for its arguments, before any work is done."""
        check_output(out, kind=MODEL, inputs=self._inputs, force=force)

    def write(
        self,
        out: str | Path,
        *,
        force: bool = False,
        provenance: Mapping[str, Any] | None = None,
        advance: Callable[[], None] = lambda: None,
    ) -> Report:
        """Writes the changed model, and calls `advance` after each module.

        The other arguments are those of `apply_adapter`.
        """
        self.check_output(out, force=force)
        origin = {
            "coremerge_version": __version__,
            "base": self._source,
            "adapter": self.adapter.metadata.name,
            "scale": self.scale,
            **(provenance or {}),
        }
        losses = {}
        # The products are small: threads would wait for each other for longer than they compute.
        with (
            threadpool_limits(1, user_api="blas"),
            atomic_folder(out, kind=MODEL, inputs=self._inputs, force=force) as folder,
        ):
            for path, loss in self._fold(folder, origin):
                losses[path] = loss
                advance()
            modules = {
                path: dataclasses.replace(module, rounding_loss=losses[path])
                for path, module in self.report.modules.items()
            }
            report = dataclasses.replace(self.report, modules=modules)
            write_record(folder, MODEL, {**origin, **dataclasses.asdict(report)})
        return report


class FileFolding(Folding):
    """An adapter and a Hugging Face folder."""

    def __init__(self, adapter: Adapter, base: str | Path, *, scale: float = 1.0) -> None:
        self._base = model = BaseModel(base)
        twins = find_twins(model, adapter.outline)
        kinds = {path: lora.kind for path, lora in adapter.outline.items()}
        self._is_packed = any(kind.name == "expert" for kind in kinds.values())
        names, found = find_tensors(kinds, model.shard, str(model.folder))
        adapter, sites = split_modules(model, adapter, found)
        self._updates = place_updates(model, adapter.outline, sites)
        self._extras = place_extras(model, adapter.outline, names, twins)
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
            modules={path: modules[path] for path in adapter},
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
        """Changes the tensors of one file; yields each module and its rounding loss."""
        for _, names in itertools.groupby(file.tensors, self._reading):
            together = list(names)
            updates = [update for name in together for update in self._updates.get(name, ())]
            loras = self.adapter.read(update.path for update in updates)
            for name in together:
                self._change_extras(file, name)
                for update in self._updates.get(name, ()):
                    lora = loras.pop(update.path)
                    yield update.path, _fold(file, name, update, lora, self.scale)

    def _reading(self, name: str) -> str:
        """Returns the same text for tensors whose updates are read at once.

        These are an expert's layers, of one parameter in the adapter: it is read as a whole.
        """
        together = self._is_packed and name in self._updates and is_expert_layer(template(name))
        return name.partition("experts.")[0] if together else name

    def _change_extras(self, file: TensorEditor, name: str) -> None:
        """Replaces a tensor, or rows of it, by trained values, and adds a trained bias."""
        extras, dtype = self._extras, file.tensors[name].dtype
        for start, value in read_parts(extras.replaced.get(name)):
            file.write(name, start, cast(name, value, dtype))
        if name in extras.rows:
            values = cast(name, np.asarray(extras.rows[name].values), dtype)
            for row, value in zip(extras.rows[name].indices, values, strict=True):
                file.write(name, row * value.size, value)
        if name in extras.biases:
            bias = np.asarray(extras.biases[name], np.float32) * np.float32(self.scale)
            file.write(name, 0, add(name, file.read(name, 0, bias.size), bias)[0])

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
    """Adds the update of a module to its part of a tensor; returns the rounding loss."""
    columns, stride = update.shape[1], update.stride
    first_column = update.start % stride
    first_row = update.start // stride

    def read_rows(start: int, stop: int) -> np.ndarray:
        first, last = ((first_row + row) * stride for row in (start, stop))
        return file.read(name, first, last).reshape(-1, stride)

    def read(start: int, stop: int) -> np.ndarray:
        return read_rows(start, stop)[:, first_column : first_column + columns]

    def write(start: int, rows: np.ndarray) -> None:
        if columns < stride:
            whole = read_rows(start, start + len(rows))
            whole[:, first_column : first_column + columns] = rows
            rows = whole
        file.write(name, (first_row + start) * stride, rows.reshape(-1))

    return add_update(name, lora, read, write, transposed=update.transposed, scale=scale)


class TreeFolding(Folding):
    """An adapter and an orbax checkpoint."""

    def __init__(
        self,
        adapter: Adapter,
        base: str | Path,
        *,
        scale: float = 1.0,
        names: str | None = None,
        head_dim: int | None = None,
        item: str | None = None,
        step: int | None = None,
        **options: Any,
    ) -> None:
        self._base = open_tree(base, item=item, step=step)
        leaves = flatten(self._base.tree)
        _check_base(str(self._base), leaves)
        inputs = [Path(base), *adapter.folders]
        if names is not None:
            adapter = find_names(names).from_hugging_face(adapter, head_dim=head_dim)
        scan_axes = self._base.scan_axes
        self._kernels = find_kernels(leaves, adapter, scan_axes=scan_axes, **options)
        modules = {
            path: Applied(key, kernel.layer_shape, leaves[key].dtype.name)
            for key, kernel in self._kernels.items()
            for path in kernel.modules
        }
        report = Report({path: modules[path] for path in adapter}, skipped=self._base.others())
        super().__init__(adapter, base, inputs, report, scale)

    def _fold(self, folder: Path, origin: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
        tree = self._base.load()
        leaves = flatten(tree)
        for key, kernel in self._kernels.items():
            loras = self.adapter.read(kernel.modules)
            yield from fold_on_host(leaves[key], kernel, loras, self.scale)
        custom = {**self._base.custom, "coremerge": dict(origin)}
        write_tree(folder, tree, item=self._base.item, custom=custom)


def _check_base(where: str, leaves: Mapping[str, Any]) -> None:
    for key, leaf in leaves.items():
        dtype = getattr(leaf, "dtype", None)
        if dtype is not None and _is_quantized(np.dtype(dtype)):
            raise UnsupportedError(
                f"{where}: {key!r} has dtype {dtype}: the base is quantized; apply the adapter to "
                "the model it was made from, then quantize the result"
            )
        layout = next((layout for layout in LAYOUTS.values() if layout.match(key)), None)
        if layout is not None:
            raise UnsupportedError(
                f"{where}: {key!r} is a LoRA factor (layout {layout.name!r}), which would go on to "
                "act beside the update; give a base model's parameters alone"
            )


def _is_quantized(dtype: np.dtype) -> bool:
    return dtype.itemsize == 1 and dtype != np.bool_


def apply_adapter(
    adapter: Adapter,
    base: str | Path,
    out: str | Path,
    *,
    scale: float = 1.0,
    force: bool = False,
    provenance: Mapping[str, Any] | None = None,
    **options: Any,
) -> Report:
    """Folds an adapter into the weights of its base model on disk.

    ``W' = W + scale * b @ a``, in float32 (the sum with float64 weights in float64), and rounded
    once to the dtype of W.

    Of a Hugging Face safetensors folder, every file with weights is copied, and the adapted tensors
    in it are overwritten block by block: all else stays as it is, to the byte, and memory does not
    depend on the size of the model. Weights in other formats and hidden files are not copied.

    Of an orbax checkpoint, the tree of parameters is read into the host's memory, changed there and
    written as it was, with its structure, dtypes and custom metadata, to which ``"coremerge"`` is
    added. Kernels are found as by `fold_tree`. Other items are not copied.

    Extras of the adapter, with a Hugging Face folder: full weights and biases replace the base's,
    trained token rows those of the embedding, and what the base does not have (a classifier) comes
    at the end of its last file, in the dtype of its weights.

    Args:
        adapter: the adapter; one from `open_peft` is read module by module.
        base: a folder with ``config.json`` and ``model.safetensors``, or shards and their index;
            or a Hugging Face id ``owner/name`` or ``owner/name@revision``; or an orbax checkpoint,
            or a folder of steps.
        out: the folder to write; it appears whole or not at all.
        scale: factor of the update.
        force: replace a folder that is already there, if coremerge wrote it.
        provenance: further fields of coremerge.json, beside names, scale and report.
        **options: for an orbax checkpoint: ``item`` and ``step`` as of `open_orbax`; ``scan_axis``
            and ``axes`` as of `fold_tree`; and ``names`` (of `names.NAME_MAPS`) and ``head_dim``
            where the adapter has Hugging Face's names.

    Raises:
        FormatError: files of the base are missing or broken, the output may not be replaced, or a
            result does not fit into the base's dtype.
        MismatchError: the adapter does not fit the base.
        RecipeError: the scale is not finite, or options are not for this base.
        UnsupportedError: the base is quantized or no safetensors folder; or the adapter changes
            one of two embeddings that are tied, or has extras and the base is a tree.
    """
    folding = find_folding(adapter, base, scale=scale, **options)
    return folding.write(out, force=force, provenance=provenance)


def find_folding(
    adapter: Adapter, base: str | Path, *, scale: float = 1.0, **options: Any
) -> Folding:
    """Checks that an adapter fits a base model of any kind; arguments as for `apply_adapter`."""
    if not math.isfinite(scale):
        raise RecipeError(f"scale is {scale}; expected a finite number")
    if beside := ", ".join(sorted(file.name for file in adapter.metadata.beside)):
        warnings.warn(
            f"other trained weights beside the adapter ({beside}) are not applied; put them into "
            "the model as its trainer does",
            CoreMergeWarning,
            stacklevel=3,
        )
    check_path(base)
    if is_orbax(base):
        return TreeFolding(adapter, base, scale=scale, **options)
    if options:
        told = ", ".join(f"{name} (--{name.replace('_', '-')})" for name in options)
        raise RecipeError(f"{base}: no orbax checkpoint; {told} can be given for these only")
    return FileFolding(adapter, base, scale=scale)
