"""Folders of Hugging Face models: the file of each tensor, and the files beside the weights."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import LocalEntryNotFoundError

from coremerge_jax.errors import FormatError, UnsupportedError
from coremerge_jax.io import untrusted
from coremerge_jax.io.adapter_config import CONFIG as ADAPTER_CONFIG
from coremerge_jax.io.folders import find_folder
from coremerge_jax.io.tensors import TensorReader
from coremerge_jax.lora import FLOATS, Kind, Shape
from coremerge_jax.naming.table import CONV1D_LAYERS

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_FOLDER = "a model's folder"

# Fields that are used of the configuration, or of its ``text_config``.
_FIELDS = {
    "architectures": untrusted.TEXTS,
    "compression_config": untrusted.OBJECT,
    "is_encoder_decoder": untrusted.SWITCH,
    "model_type": untrusted.TEXT,
    "quantization_config": untrusted.OBJECT,
    "text_config": untrusted.OBJECT,
    "tie_word_embeddings": untrusted.SWITCH,
    "vocab_size": untrusted.WHOLE,
}

_INDEX_FIELDS = {"metadata": untrusted.OBJECT, "weight_map": untrusted.OBJECT}
_TOTALS = {"total_parameters": untrusted.NUMBER, "total_size": untrusted.NUMBER}
_LISTED = "expected a list of modules with their paths"
_INDEX_SIZE = 64 * 2**20

# Models of transformers with such layers as `CONV1D_LAYERS`.
_CONV1D_MODELS = {"clvp", "clvp_decoder", "decision_transformer", "gpt2", "imagegpt", "openai-gpt"}

# Endings of the names of files with weights, and of their indices.
_WEIGHTS = (
    *("safetensors", "bin", "pt", "pth", "ckpt", "pkl", "h5", "keras", "msgpack", "ot", "npz"),
    *("gguf", "ggml", "onnx", "onnx_data", "tflite", "mlmodel"),
    *("safetensors.index.json", "bin.index.json", "h5.index.json", "msgpack.index.json"),
)

# Weights in other formats, which are not downloaded.
_OTHERS = ["pytorch_model*", "tf_model*", "flax_model*", "rust_model.ot", "*.gguf", "*.onnx*"]
_OTHERS += ["original/*", "consolidated*", "*.pth", "*.ckpt"]


class BaseModel:
    """A Hugging Face model on disk. Only headers and configuration are read.

    Args:
        source: a folder with ``config.json`` and ``model.safetensors``, or shards and
            ``model.safetensors.index.json``; or a Hugging Face id ``owner/name``, with
            ``/folder`` and ``@revision`` behind it, if need be.

    Attributes:
        folder: the folder.
        config: the content of ``config.json``.
        index: the content of the shards' index, None if there is a single file.
        shards: the files with the tensors, by name.
        shard: for each tensor, the name of its file.

    Raises:
        FormatError: files are missing, broken or contradict each other.
        UnsupportedError: the model is quantized, or not in safetensors files.
    """

    def __init__(self, source: str | Path) -> None:
        self.folder = find_folder(source, _download, CONFIG)
        self.config = untrusted.read_json(self.folder / CONFIG, _FOLDER)
        untrusted.check_kinds(self.folder / CONFIG, self.config, _FIELDS)
        text = self.config.get("text_config") or {}
        untrusted.check_kinds(f"{self.folder / CONFIG}: text_config", text, _FIELDS)
        self._refuse_quantized()
        self.index = self._read_index()
        self.shards = {name: self._open(name) for name in self._names()}
        self.shard: dict[str, str] = {}
        for name, reader in self.shards.items():
            for tensor in (*reader.tensors, *reader.foreign):
                if tensor in self.shard:
                    raise FormatError(
                        f"{self.folder}: tensor {tensor!r} is in {self.shard[tensor]} and {name}"
                    )
                self.shard[tensor] = name
        for tensor, name in self._weight_map().items():
            if self.shard.get(tensor) != name:
                raise FormatError(
                    f"{self.folder / INDEX}: tensor {tensor!r} is not in {name}; "
                    "the download may be incomplete"
                )

    def tensor(self, name: str) -> Shape:
        """Returns the shape and dtype of a tensor.

        Raises:
            UnsupportedError: NumPy does not know the dtype.
        """
        reader = self.shards[self.shard[name]]
        if name in reader.foreign:
            raise UnsupportedError(
                f"{reader.file}: tensor {name!r} has dtype {reader.foreign[name]}; a quantized "
                "weight takes no update: apply the adapter to the model it was made from"
            )
        return reader.tensors[name]

    def floating(self, name: str) -> Shape:
        """Returns the shape and dtype of a tensor that takes an update.

        Raises:
            UnsupportedError: it has no floating-point dtype that NumPy knows.
        """
        tensor = self.tensor(name)
        if tensor.dtype.name not in FLOATS:
            raise UnsupportedError(
                f"{self.folder}: tensor {name!r} has dtype {tensor.dtype}, so it is quantized, or "
                "no weight; apply the adapter to the model in a floating-point dtype"
            )
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor of any dtype."""
        return self.shards[self.shard[name]].shape(name)

    def is_transposed(self, name: str, kind: Kind) -> bool:
        """Returns True if a tensor is the transpose of the weight of a layer of some kind.

        Like peft, goes by the class of a linear layer where that is known: ``fan_in_fan_out`` of an
        adapter is a single value, that of the layer which peft has adapted last.
        """
        if kind.name == "linear" and not _CONV1D_MODELS.isdisjoint(self.configured("model_type")):
            return name.removesuffix(".weight").rpartition(".")[2] in CONV1D_LAYERS
        return kind.transposed

    def configured(self, field: str) -> list[Any]:
        """Returns the values of a field in the configuration of the model and of its text model."""
        configs = (self.config, self.config.get("text_config") or {})
        return [config[field] for config in configs if config.get(field) is not None]

    def others(self) -> tuple[list[str], list[str]]:
        """Finds the files beside the shards, except for hidden ones.

        Returns:
            The files to copy, which hold for an adapted model, too; among them the weights of the
            parts of a sentence-transformers model that ``modules.json`` names. And those to leave
            out: weights without the update, the configuration of an adapter, and links to folders,
            which may lead anywhere. All relative to the folder.
        """
        parts = _sentence_parts(self.folder / "modules.json")
        copied: list[str] = []
        skipped: list[str] = []
        for file in _visible_files(self.folder):
            name = file.relative_to(self.folder).as_posix()
            if name in self.shards:
                continue
            if file.is_dir():
                skipped.append(f"{name}/ (a link)")
                continue
            weights = name.endswith(tuple(f".{ending}" for ending in _WEIGHTS))
            used = name == INDEX and self.index is not None
            stale = weights and not used and name.rpartition("/")[0] not in parts
            stale |= name == ADAPTER_CONFIG  # by which transformers would look for an adapter
            (skipped if stale else copied).append(name)
        return copied, skipped

    def _refuse_quantized(self) -> None:
        for field in ("quantization_config", "compression_config"):
            for found in self.configured(field):
                method = found.get("quant_method") if isinstance(found, Mapping) else found
                raise UnsupportedError(
                    f"{self.folder / CONFIG}: {field} says that the model is quantized "
                    f"({method or 'method not named'}); apply the adapter to the model it was "
                    "made from, then quantize the result"
                )

    def _read_index(self) -> dict[str, Any] | None:
        file = self.folder / INDEX
        if untrusted.is_regular(self.folder / WEIGHTS):  # transformers then ignores an index
            return None
        if untrusted.is_regular(file):
            return _read_index(file)
        pickles = sorted(path.name for path in self.folder.glob("pytorch_model*.bin"))
        if pickles:
            raise UnsupportedError(
                f"{self.folder / pickles[0]}: pickle files can run code when they are read, so "
                "they are not; load the model with transformers and save it again, which writes "
                "safetensors"
            )
        raise FormatError(f"{self.folder}: no {WEIGHTS} and no {INDEX}; expected {_FOLDER}")

    def _weight_map(self) -> Mapping[str, str]:
        if self.index is None:
            return {}
        found = self.index.get("weight_map")
        if not isinstance(found, dict) or not found or {*map(type, found.values())} != {str}:
            raise FormatError(f"{self.folder / INDEX}: no weight_map; expected tensors and files")
        return found

    def _names(self) -> list[str]:
        names = sorted(set(self._weight_map().values())) or [WEIGHTS]
        for name in names:
            if Path(name).name != name or name in ("", "..") or "\0" in name:
                raise FormatError(f"{self.folder / INDEX}: {name!r} is not the name of a file")
        return names

    def _open(self, name: str) -> TensorReader:
        file = self.folder / name
        if not untrusted.is_regular(file):
            raise FormatError(f"{file}: missing, though {INDEX} names it; get the whole model")
        return TensorReader(file, strict=False)


def _read_index(file: Path) -> dict[str, Any]:
    index = untrusted.read_json(file, _FOLDER, limit=_INDEX_SIZE)
    untrusted.check_kinds(file, index, _INDEX_FIELDS)
    untrusted.check_kinds(f"{file}: metadata", index.get("metadata") or {}, _TOTALS)
    return index


def _sentence_parts(file: Path) -> set[str]:
    """Returns the folders of a sentence-transformers model's parts, except for its transformer."""
    if not untrusted.is_regular(file):
        return set()
    try:
        parts = untrusted.parse_json(untrusted.read_text(file, untrusted.JSON_SIZE), str(file))
    except FormatError as error:
        told = str(error).removeprefix(f"{file}: ")
        raise FormatError(f"{file}: {_LISTED} ({told})") from error
    if not untrusted.is_list_of(_has_path)(parts):
        raise FormatError(f"{file}: {_LISTED}")
    return {part["path"] for part in parts} - {""}


def _has_path(part: Any) -> bool:
    return isinstance(part, dict) and untrusted.is_text(part.get("path"))


def _visible_files(folder: Path) -> Iterator[Path]:
    """Yields the files of a folder and of those in it; of a link to a folder, the link alone."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _visible_files(path)
        elif path.is_dir() or path.is_file():
            yield path


def _download(repo: str, *, subfolder: str | None = None, **options: Any) -> Path:
    """Returns a snapshot without weights in other formats; from the cache if that is whole."""
    wanted = [f"{subfolder}/*"] if subfolder else None
    snapshot = huggingface_hub.snapshot_download(
        repo, allow_patterns=wanted, ignore_patterns=_OTHERS, **options
    )
    folder = Path(snapshot, subfolder or "")
    if options.get("local_files_only") and not _is_whole(folder):
        raise LocalEntryNotFoundError(f"{folder}: not all files are there")
    return folder


def _is_whole(folder: Path) -> bool:
    if not (folder / CONFIG).is_file():
        return False
    if (folder / WEIGHTS).is_file():
        return True
    if not (folder / INDEX).is_file():
        return False
    names = (_read_index(folder / INDEX).get("weight_map") or {}).values()
    return all(untrusted.is_text(name) and (folder / name).is_file() for name in names)
