"""PEFT adapter folder to `Adapter`."""

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from coremerge_jax.errors import CoreMergeWarning, FormatError, UnsupportedError, nearest
from coremerge_jax.io import lycoris
from coremerge_jax.io.adapter_config import CONFIG, GIVE_BASE, RETRAIN
from coremerge_jax.io.factors import (
    FactorFile,
    Factors,
    FactorSource,
    is_float,
    open_extra,
    outline_of,
    to_float32,
)
from coremerge_jax.io.folders import source_name
from coremerge_jax.io.module_paths import LORA_BIAS, WRAPPED, outermost, without_wrappers
from coremerge_jax.io.peft import experts
from coremerge_jax.io.peft.config import (
    EMBEDDINGS,
    PeftConfig,
    extra_name,
    is_copy,
    is_extra,
    is_saved,
    split_factor,
)
from coremerge_jax.io.peft.files import find_beside, find_checkpoints, locate, weights_files
from coremerge_jax.io.tensors import LazyTensor, TensorFiles, TensorReader
from coremerge_jax.lora import Adapter, Kind, Metadata, Shape

# Names of Tinker's for layers that have another in transformers.
_RENAMED = dict.fromkeys(("unembed_tokens", "model.unembed_tokens"), "lm_head")

MAGNITUDE = "lora_magnitude_vector"  # of DoRA

# Parts of the names of other methods' tensors. A configuration may not mention the method.
_METHODS = {
    MAGNITUDE: "DoRA",
    "lora_E": "AdaLoRA",
    "lora_diag": "KaSA",
    "lora_monteclora": "MonteCLoRA",
}


class Contents:
    """Tensors of one file sorted into modules and extras.

    Args:
        reader: the file.
        config: the configuration beside it.
        dora: True if there may be DoRA's magnitudes, without which the modules are not whole.

    Attributes:
        magnitudes: key of DoRA's magnitude, by a module's path.
        modules: source of each module, by its path in the base model, in the order of the file.
        extras: tensors that are not low-rank updates, by their name in the base model.
        dtype: dtype of the first factor.
        prefix: "" if no factor's key has peft's prefix, else None.

    Raises:
        FormatError: a tensor is missing, or file and configuration contradict each other.
        UnsupportedError: there are other tensors than low-rank updates and extras.
    """

    def __init__(
        self, reader: TensorReader | TensorFiles, config: PeftConfig, *, dora: bool = False
    ) -> None:
        self.file, self.config, self._reader = reader.file, config, reader
        self.magnitudes: dict[str, str] = {}
        self._dora = dora
        # Module path to names of factors to their keys, and names of other tensors to their keys.
        self._groups: dict[str, dict[str, str]] = {}
        self._others: dict[str, str] = {}
        self._sort()
        self._shared = self._groups.pop("base_model", {})
        self.dtype = next(
            (str(self._tensor(key).dtype) for g in self._groups.values() for key in g.values()),
            None,
        )
        factors = (key for group in self._groups.values() for key in group.values())
        self.prefix = None if any(without_wrappers(key)[0] for key in factors) else ""
        self._biases: dict[str, tuple[str, float]] = {}
        self.modules = dict(self._find_modules())
        if not self.modules:
            keys = ", ".join(map(repr, itertools.islice(reader.tensors, 2))) or "no tensors"
            raise FormatError(
                f"{self.file}: no LoRA factors in it; expected keys like 'x.lora_A.weight', "
                f"found {keys}"
            )
        self._refuse_tied()
        self.extras = self._find_extras()

    def _sort(self) -> None:
        origin: dict[tuple[str, str], str] = {}
        for key in self._reader.tensors:
            found = split_factor(key)
            path, part = found or ("", extra_name(key))
            earlier = origin.get((path, part))
            if earlier and not found and is_saved(earlier) != is_saved(key):
                if is_saved(key):  # a bias of modules_to_save, which is there by its own name too
                    continue
            elif earlier:
                raise FormatError(
                    f"{self.file}: {earlier!r} and {key!r} are both "
                    f"{'.'.join(filter(None, (path, part)))!r}; expected one adapter a file"
                )
            origin[path, part] = key
            (self._groups.setdefault(path, {}) if found else self._others)[part] = key

    def _tensor(self, key: str) -> Shape:
        return self._reader.tensors[key]

    def _factor(self, key: str) -> Shape:
        """Returns the shape and dtype of a tensor that is part of an update."""
        tensor = self._tensor(key)
        if not is_float(tensor.dtype):
            raise UnsupportedError(
                f"{self.file}: tensor {key!r} has dtype {tensor.dtype}, so the factors are "
                "quantized, or no weights; save the adapter in float32, bfloat16 or float16"
            )
        return tensor

    def _find_modules(self) -> Iterator[tuple[str, FactorSource]]:
        targets = self.config.fields.get("target_parameters") or ()
        packed: dict[str, dict[str, tuple[str, str]]] = {}
        for path, parts in self._groups.items():
            bias = parts.pop("lora_B.bias", None)
            if bias is not None:
                if not self.config.fields.get("lora_bias"):
                    raise FormatError(
                        f"{self.file}: module {path!r} has a lora_B.bias, but lora_bias is false"
                    )
                scale = self.config.scale(outermost(path))
                self._biases[f"{path}{LORA_BIAS}"] = bias, scale
            owner = path
            while owner.endswith(WRAPPED):
                owner = owner.removesuffix(WRAPPED)
            if set(parts) == {"vera_lambda_b", "vera_lambda_d"}:
                yield path, self._vera(path, parts["vera_lambda_b"], parts["vera_lambda_d"])
            elif lycoris.method(parts):
                yield path, self._lycoris(path, parts)
            elif set(parts) == {"lora_embedding_A", "lora_embedding_B"}:
                keys = parts["lora_embedding_A"], parts["lora_embedding_B"]
                yield path, self._layer(path, keys, Kind("embedding", transposed=True))
            elif set(parts) != {"lora_A.weight", "lora_B.weight"}:
                raise FormatError(
                    f"{self.file}: module {path!r} has {' and '.join(sorted(parts))} only; "
                    "expected an A and a B factor"
                )
            else:
                keys = parts["lora_A.weight"], parts["lora_B.weight"]
                if experts.target_names(owner, targets):
                    packed.setdefault(owner, {})[path] = keys
                elif experts.is_stack(path, *(self._factor(key).shape for key in keys)):
                    yield from self._stack(path, keys)
                else:
                    yield _RENAMED.get(path, path), self._matrix(path, keys)
        for owner, levels in packed.items():
            yield from self._experts(owner, levels, experts.target_names(owner, targets))

    def _matrix(self, path: str, keys: tuple[str, str]) -> FactorSource:
        a, b = (self._factor(key).shape for key in keys)
        swapped = len(a) == len(b) == 2 and a[1] == b[0] and a[0] != b[1]
        if swapped and path.rpartition(".")[2] in EMBEDDINGS:  # as SkyRL writes an embedding
            kind = Kind("embedding", transposed=True)
            return self._whole(path, a[::-1], b[::-1], kind, keys, _swapped)
        return self._layer(path, keys, self._kind(path, keys))

    def _stack(self, path: str, keys: tuple[str, str]) -> Iterator[tuple[str, FactorSource]]:
        """Yields the experts of a layer whose factors are stacked along a first axis."""
        a, b = (self._factor(key).shape for key in keys)
        if 0 in a and 0 in b:  # Tinker's placeholder for a layer that the model does not have
            return
        count = max(a[0], b[0])
        self._check_shapes(path, a[1:], b[1:])
        if count == 1 or {a[0], b[0]} - {1, count}:
            raise FormatError(
                f"{self.file}: module {path!r}: A has shape {a} and B has shape {b}; expected "
                "(experts, r, inputs) and (experts, outputs, r), of which one may have 1 expert "
                "for all"
            )
        for index, name in enumerate(experts.stacked_names(path, count, self._groups)):
            kind = Kind("expert") if name.endswith("]") else Kind()
            factors = partial(experts.unstack, index=index)
            yield name, self._whole(path, a[1:], b[1:], kind, keys, factors)

    def _kind(self, path: str, keys: tuple[str, str]) -> Kind:
        """Returns a linear layer or a two-dimensional convolution."""
        a, b = (self._factor(key).shape for key in keys)
        if len(a) == len(b) == 2:
            return Kind(transposed=self.config.transposed)
        self._refuse_empty(path, a, b)
        if len(a) != 4 or len(b) != 4:
            raise UnsupportedError(
                f"{self.file}: module {path!r} has factors of shapes {a} and {b}; "
                "only linear layers, embeddings and two-dimensional convolutions are supported"
            )
        if 0 < b[1] < a[0] and a[0] % b[1] == 0:
            raise UnsupportedError(
                f"{self.file}: module {path!r} is a convolution with "
                f"{a[0] // b[1]} groups, whose update is not of low rank"
            )
        if b[2:] != (1, 1):
            raise FormatError(f"{self.file}: module {path!r}: B has shape {b}; expected 1 x 1")
        return Kind("conv2d", kernel=a[1:])

    def _layer(self, path: str, keys: tuple[str, str], kind: Kind) -> FactorSource:
        a, b = (self._factor(key).shape for key in keys)
        if kind.name == "conv2d":
            a, b = (a[0], int(np.prod(a[1:]))), b[:2]
        return self._whole(path, a, b, kind, keys, _matrices)

    def _lycoris(self, path: str, parts: Mapping[str, str]) -> FactorSource:
        """Returns the update of LoHa or LoKr, whose rank is what its parts allow."""
        try:
            size = lycoris.size({name: self._factor(key).shape for name, key in parts.items()})
        except FormatError as error:
            raise FormatError(f"{self.file}: module {path!r} {error}") from error
        kind = Kind("conv2d", kernel=size.kernel) if size.kernel else Kind()
        outline = outline_of(size.rank, size.m, size.n, kind)
        factors, scale = partial(lycoris.named_factors, tuple(parts)), self.config.scale(path)
        return FactorSource(self.file, path, outline, tuple(parts.values()), factors, scale)

    def _vera(self, path: str, key_rows: str, key_inner: str) -> FactorSource:
        if set(self._shared) != {"vera_A", "vera_B"}:
            raise FormatError(
                f"{self.file}: no base_model.vera_A and base_model.vera_B; "
                "save the adapter again with save_projection=True"
            )
        keys = key_rows, key_inner, self._shared["vera_A"], self._shared["vera_B"]
        rows, inner, a, b = (self._factor(key).shape for key in keys)
        if not (inner == a[:1] == b[1:] and len(rows) == 1 and rows <= b[:1]):
            raise FormatError(
                f"{self.file}: module {path!r}: lambda_b {rows} and lambda_d {inner} "
                f"do not fit the projections A {a} and B {b}"
            )
        kind = Kind(transposed=self.config.transposed)
        return self._whole(path, a, (*rows, *b[1:]), kind, keys, _vera)

    def _whole(
        self,
        path: str,
        a: tuple[int, ...],
        b: tuple[int, ...],
        kind: Kind,
        keys: tuple[str, ...],
        factors: Callable[..., Factors],
    ) -> FactorSource:
        """Returns a module with tensors of its own, and with the rank of the configuration."""
        self._check_shapes(path, a, b)
        rank = self.config.rank(outermost(path))
        if a[0] != rank:
            raise FormatError(
                f"{self.file}: module {path!r} has rank {a[0]}, but {CONFIG} says {rank}; "
                "take both files from one checkpoint, or correct r and rank_pattern"
            )
        scale = self.config.scale(outermost(path))
        outline = outline_of(rank, b[0], a[1], kind)
        return FactorSource(self.file, path, outline, keys, factors, scale)

    def _experts(
        self, owner: str, levels: Mapping[str, tuple[str, str]], names: list[str]
    ) -> Iterator[tuple[str, FactorSource]]:
        shapes = {
            path: (self._factor(a).shape, self._factor(b).shape) for path, (a, b) in levels.items()
        }
        for path, (a, b) in shapes.items():
            self._check_shapes(path, a, b)
        version = str(self.config.fields.get("peft_version") or "")
        named = experts.name_levels(str(self.file), owner, shapes, names, version)
        for path, parameter in named.items():
            (rows, n), (m, _) = shapes[path]
            rank, scale = self.config.rank(parameter), self.config.scale(parameter)
            try:
                count = experts.count(rows, rank)
            except FormatError as error:
                raise FormatError(f"{self.file}: module {path!r}: {error}") from error
            outline = outline_of(rank, m, n, Kind("expert"))
            for e in range(count):
                factors = partial(experts.unpack, rank=rank, index=e)
                source = FactorSource(self.file, path, outline, levels[path], factors, scale)
                yield f"{parameter}[{e}]", source

    def _refuse_empty(self, path: str, a: tuple[int, ...], b: tuple[int, ...]) -> None:
        if 0 in (*a, *b):
            raise FormatError(
                f"{self.file}: module {path!r}: A has shape {a} and B has shape {b}: empty; of a "
                "model that is sharded (DeepSpeed ZeRO-3, FSDP), gather the weights and save again"
            )

    def _check_shapes(self, path: str, a: tuple[int, ...], b: tuple[int, ...]) -> None:
        self._refuse_empty(path, a, b)
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise FormatError(
                f"{self.file}: module {path!r}: A has shape {a} and B has shape {b}; "
                "expected (r, inputs) and (outputs, r) of one rank r"
            )

    def _refuse_tied(self) -> None:
        """Refuses updates of tied embeddings, of which peft makes one that acts twice."""
        if not self.config.fields.get("ensure_weight_tying"):
            return
        for path in self.modules:
            if path.rpartition(".")[2] in EMBEDDINGS:
                raise UnsupportedError(
                    f"{self.file}: module {path!r} with ensure_weight_tying: its update is that of "
                    f"the output embedding too, transposed, which a merge would separate; {RETRAIN}"
                )

    def _find_extras(self) -> dict[str, Any]:
        """Finds the tensors that are not updates, all of which the configuration must explain."""
        modules = self.modules.items()
        embeddings = {path for path, m in modules if m.outline.kind.name == "embedding"}
        extras, unclaimed = {}, []
        for name, key in self._others.items():
            method = next((_METHODS[part] for part in _METHODS if f".{part}" in name), None)
            if method == "DoRA" and self._dora:
                self.magnitudes[name.partition(f".{MAGNITUDE}")[0]] = key
                continue
            if method:
                remedy = GIVE_BASE if method == "DoRA" else RETRAIN
                raise UnsupportedError(
                    f"{self.file}: tensor {name!r} belongs to {method}, whose update is not a "
                    f"plain low-rank one; {remedy}"
                )
            if ".lora_velora_embed" in name or is_copy(name, self._others):  # not used by peft
                continue
            # Written for a module that one adapter adapts, and another has as a whole.
            beside = WRAPPED in key and name.rpartition(".")[0] in self.modules
            if beside or is_extra(name, self.config.fields, embeddings):
                extras[name] = self._extra(key)
            else:
                unclaimed.append(name)
        if unclaimed:
            factors = [key for key in self._reader.tensors if split_factor(key)]
            near = nearest(unclaimed[0], factors)
            hint = f"; {unclaimed[0]!r} is nearest to {near[0]!r}" if near else ""
            raise FormatError(
                f"{self.file}: {len(unclaimed)} tensors that {CONFIG} does not account for: "
                f"{', '.join(map(repr, unclaimed[:3]))}{hint}"
            )
        return extras | {name: self._extra(*bias) for name, bias in self._biases.items()}

    def _extra(self, key: str, scale: float = 1.0) -> LazyTensor:
        return open_extra(self._reader, key, scale)


def _swapped(a: np.ndarray, b: np.ndarray) -> Factors:
    """Returns the factors of an embedding that are stored transposed."""
    return a.T, b.T


def _matrices(a: np.ndarray, b: np.ndarray) -> Factors:
    """Returns the factors of a layer; a convolution's are flat."""
    return a.reshape(len(a), -1), b.reshape(b.shape[:2])


def _vera(rows: np.ndarray, inner: np.ndarray, a: np.ndarray, b: np.ndarray) -> Factors:
    """Returns VeRA's shared projections, scaled by the vectors of a module."""
    rows, inner, a, b = map(to_float32, (rows, inner, a, b))
    with np.errstate(over="ignore", invalid="ignore"):
        return a * inner[:, None], b[: len(rows)] * rows[:, None]


# Fields that are needed to write the extras of an adapter.
_EXTRA_FIELDS = (
    "bias",
    "ensure_weight_tying",
    "modules_to_save",
    "revision",
    "trainable_token_indices",
)


def open_peft(source: str | Path, *, name: str | None = None) -> Adapter:
    """Opens a PEFT adapter, whose factors stay in the file; the scaling becomes part of ``b``.

    The configuration and the header of the file are read and checked. Factors, float32 NumPy
    arrays, are read and checked to be finite when a module is asked for, and not kept. So are
    extras, when ``np.asarray`` makes an array of one.

    Module paths are those of the base model, except that the output projection of a
    ``torch.nn.MultiheadAttention`` keeps peft's ``.base_layer.out_proj``, and that the experts of
    a fused parameter are modules ``parameter[index]``. A VeRA module gets the input width of the
    shared projections, as the file does not hold its own.

    Args:
        source: a folder with ``adapter_config.json`` and ``adapter_model.safetensors`` (or shards
            of it), a trainer's folder with such folders ``checkpoint-N``, of which the newest
            counts, or a Hugging Face id: ``owner/name``, ``owner/name/folder``, and any of these
            with ``@revision``.
        name: a name for messages and tables; the name of the folder or repository by default.

    Raises:
        FormatError: the files are missing, broken or inconsistent.
        UnsupportedError: the adapter is more than a low-rank update of the base model.
    """
    folder = locate(source)
    config = PeftConfig(folder / CONFIG)
    _tell_checkpoint(source, folder)
    reader = open_weights(folder)
    contents = Contents(reader, config)
    if note := config.find_overlap(outermost(path).partition("[")[0] for path in contents.modules):
        warnings.warn(note, CoreMergeWarning, stacklevel=2)
    metadata = metadata_of(source, folder, contents, name)
    return FactorFile(reader, contents.modules, metadata, contents.extras)


def open_weights(folder: Path) -> TensorReader | TensorFiles:
    """Opens the file or files with an adapter's tensors."""
    files = weights_files(folder)
    return TensorReader(files[0]) if len(files) == 1 else TensorFiles(files)


def metadata_of(source: str | Path, folder: Path, contents: Contents, name: str | None) -> Metadata:
    """Returns the metadata of an adapter in a folder."""
    fields = contents.config.fields
    return Metadata(
        name=name or source_name(source),
        base_model=fields.get("base_model_name_or_path") or None,
        task_type=fields.get("task_type") or None,
        rank=int(fields["r"]),
        alpha=contents.config.alpha,
        dtype=contents.dtype,
        config={f: fields[f] for f in _EXTRA_FIELDS if fields.get(f)},
        format="peft",
        prefix=contents.prefix,
        beside=tuple(folder / name for name in find_beside(folder)),
    )


def _tell_checkpoint(source: str | Path, folder: Path) -> None:
    """Warns if the adapter of a trainer's folder is that of its newest checkpoint."""
    if Path(source).is_dir() and folder != Path(source):
        count = len(find_checkpoints(Path(source)))
        warnings.warn(
            f"{source}: no adapter in the folder itself; takes the newest of its {count} "
            f"checkpoints, {folder.name}",
            CoreMergeWarning,
            stacklevel=3,
        )


def load_peft(source: str | Path, *, name: str | None = None) -> Adapter:
    """Reads a PEFT adapter into memory. Arguments are those of `open_peft`.

    Raises:
        FormatError: the files are missing, broken or inconsistent, or a value is not finite.
        UnsupportedError: the adapter is more than a low-rank update of the base model.
    """
    opened = open_peft(source, name=name)
    return Adapter(
        opened.read(opened),
        metadata=opened.metadata,
        extras={key: np.asarray(value) for key, value in opened.extras.items()},
    )
