"""`Adapter`, or a stream of its modules, to a GGUF file that llama.cpp loads with ``--lora``.

The file is as llama.cpp's convert_lora_to_gguf.py writes it: tensors have the names that its
conversion gives the base model's, with ``.lora_a`` (r, n) and ``.lora_b`` (m, r) at the end, and
rows of B are in the order that it gives those of the weight (``conversion/`` in its repository).
llama.cpp scales a pair by ``adapter.lora.alpha / r`` (``src/llama-adapter.h``), so all have one
rank.
"""

import dataclasses
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from coremerge_jax.errors import FormatError, MismatchError, UnsupportedError
from coremerge_jax.io import untrusted
from coremerge_jax.io.adapter_writer import Written, write_adapter
from coremerge_jax.io.file_layout import pad
from coremerge_jax.io.one_file.keyed_layout import KINDS
from coremerge_jax.io.outputs import GGUF
from coremerge_jax.io.tensors import TensorReader
from coremerge_jax.lora import Adapter, Array, LoRA, ModuleStream
from coremerge_jax.text import short

_CONFIG = "config.json"

_ELSEWHERE = "write a PEFT adapter (--to peft), and convert that with llama.cpp's scripts"

# Classes of Hugging Face models, of which llama.cpp changes linear weights in names and order of
# rows only; its name of the architecture, and True if it reorders rows of queries and keys, whose
# rotary embedding it computes on neighbours.
_ARCHITECTURES = {
    "LlamaForCausalLM": ("llama", True),
    "MistralForCausalLM": ("llama", True),
    "Qwen2ForCausalLM": ("qwen2", False),
    "Qwen3ForCausalLM": ("qwen3", False),
    "GemmaForCausalLM": ("gemma", False),
    "Gemma2ForCausalLM": ("gemma2", False),
    "Gemma3ForCausalLM": ("gemma3", False),
    "Gemma3ForConditionalGeneration": ("gemma3", False),
    "Phi3ForCausalLM": ("phi3", False),
}

# Bytes that a value in a GGUF file takes, by its type; those of the last two types vary.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9

_LEAST_TENSOR = 24  # bytes that the description of a tensor takes, at least
_MOST_ENTRIES = 10_000_000  # of a list; tokenizers have less than a million

# Names in GGUF files, after the architecture, by those of config.json.
_IN_GGUF = {
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "hidden_size": "embedding_length",
    "head_dim": "attention.key_length",
}

_LINEAR = re.compile(
    r"blk\.\d+\.(attn_(q|k|v|qkv|output)|ffn_(gate|up|down))\.weight|(?P<head>output)\.weight"
)


def write_gguf(
    adapter: Adapter | ModuleStream,
    out: str | Path,
    *,
    base_config: str | Path | None = None,
    uniform_rank: bool = True,
    **options: Any,
) -> Written:
    """Writes a folder with a GGUF file, named as the folder.

    Args:
        adapter: an adapter, in memory or in a file, or a stream of its modules.
        out: the folder to write.
        base_config: config.json of the base model, the folder that has it, or the base model as a
            GGUF file; by default, the folder that the adapter names as its base model.
        uniform_rank: has no effect: one alpha for all modules needs one rank.
        **options: further ones of `write_adapter`.

    Raises:
        FormatError: as `write_adapter`; or there is no configuration of the base model.
        MismatchError: a module does not fit the base model.
        UnsupportedError: the conversion of the architecture, or of a module, is not known; or the
            package gguf is not installed.
    """
    del uniform_rank
    layout, architecture = layout_for(adapter.outline, base_config)
    finish = partial(_to_gguf, architecture=architecture)
    return write_adapter(
        adapter, out, layout, kind=GGUF, uniform_rank=True, finish=finish, **options
    )


def layout_for(outline: Adapter, base_config: str | Path | None) -> tuple["GgufLayout", str]:
    """Returns the places of an adapter's modules, and the architecture of its base model.

    Arguments and errors are those of `write_gguf`.
    """
    base = _Base(_find_config(base_config, outline.metadata.base_model))
    return GgufLayout(outline, base), base.architecture


def _find_config(given: str | Path | None, base_model: str | None) -> Path:
    """Returns the file with the base model's configuration, which may be a GGUF file."""
    if given is not None:
        return Path(given, _CONFIG) if Path(given).is_dir() else Path(given)
    if base_model and Path(base_model, _CONFIG).is_file():
        return Path(base_model, _CONFIG)
    raise FormatError(
        f"GGUF needs the {_CONFIG} of the base model ({base_model or 'unknown'}) for names and "
        "numbers of heads; give that file, its folder, or the model's GGUF file with --base-config"
    )


class _Base:
    """The base model, as far as names and order of its weights in llama.cpp need it.

    Args:
        file: its configuration.

    Attributes:
        file: the configuration, for messages.
        architecture: llama.cpp's name of the architecture.
    """

    def __init__(self, file: Path) -> None:
        gguf = _import_gguf()
        self.file = file
        self._shapes: dict[str, list[int]] = {}
        if file.suffix.lower() == ".gguf":
            config, self._shapes = _read_base(file)
        else:
            config = untrusted.read_json(file, "the configuration of the base model")
        inner = config.get("text_config")
        self._fields = {**config, **inner} if isinstance(inner, dict) else config
        models = self._fields.get("architectures")
        model = models[0] if isinstance(models, list) and models else None
        if not isinstance(model, str) or model not in _ARCHITECTURES:
            raise UnsupportedError(
                f"{file}: architecture {short(model)}; to GGUF, only those are converted whose "
                "weights llama.cpp just renames and reorders: "
                f"{', '.join(_ARCHITECTURES)}; {_ELSEWHERE}"
            )
        self.architecture, self._reorders = _ARCHITECTURES[model]
        number = gguf.MODEL_ARCH[self.architecture.upper()]
        self._names = gguf.get_tensor_name_map(number, self._whole("num_hidden_layers"))

    def _whole(self, name: str, default: int | None = None) -> int:
        value: Any = self._fields.get(name)
        value = default if value is None else value
        if not untrusted.is_whole(value) or not 0 < value < 2**31:
            raise FormatError(f"{self.file}: {name} is {value!r}; expected a whole number above 0")
        return int(value)

    def name(self, path: str, shape: tuple[int, ...]) -> str:
        """Returns llama.cpp's name of the weight ``(m, n)`` of a linear layer.

        Raises:
            UnsupportedError: it has none, or is no linear layer that is certain.
            MismatchError: the base model's file has no such weight, or one of another shape.
        """
        own = re.sub(r"^(model\.)?language_model\.(model\.)?", "model.", path)
        name = self._names.get_name(f"{own}.weight", (".weight",))
        found = name and _LINEAR.fullmatch(name)
        if not found:
            raise UnsupportedError(
                f"module {path!r}: is no linear layer of attention or MLP that llama.cpp has in "
                f"{self.architecture} of this size; leave it out, or {_ELSEWHERE}"
            )
        if found["head"] and self._is_tied:
            raise UnsupportedError(
                f"module {path!r}: llama.cpp has no weight of its own for it, as it is tied to the "
                "embedding; leave it out"
            )
        if self._shapes and (there := self._shapes.get(name)) != list(shape):
            raise MismatchError(
                f"module {path!r} is {shape}; in {self.file} {name!r} is {there or 'missing'}; "
                "this is another model"
            )
        return str(name)

    @property
    def _is_tied(self) -> bool:
        is_gemma = self.architecture.startswith("gemma")
        return is_gemma or bool(self._fields.get("tie_word_embeddings"))

    def heads(self, path: str, rows: int) -> int:
        """Returns the number of heads whose rows llama.cpp reorders; 0 if it does not.

        Raises:
            MismatchError: the module has another number of rows.
        """
        leaf = path.rpartition(".")[2]
        if not self._reorders or leaf not in ("q_proj", "k_proj"):
            return 0
        queries = self._whole("num_attention_heads")
        heads = queries if leaf == "q_proj" else self._whole("num_key_value_heads", queries)
        given = self._fields.get("head_dim")
        size = self._whole("hidden_size") // queries if given is None else self._whole("head_dim")
        if rows != heads * size or size % 2:
            raise MismatchError(
                f"module {path!r} has {rows} rows; by {self.file} it has {heads} heads of {size}; "
                "this is the configuration of another model"
            )
        return heads


def _read_base(file: Path) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """Returns what config.json would say, and the shapes of weights, of a model's GGUF file.

    Raises:
        FormatError: it is no such file.
    """
    gguf = _import_gguf()
    try:
        _check_lengths(file)
        reader = gguf.GGUFReader(file)
        shapes = {tensor.name: tensor.shape.tolist()[::-1] for tensor in reader.tensors}
        fields = {x: y.contents() for x, y in reader.fields.items() if "tokenizer." not in x}
    except Exception as error:  # of any kind, as the package trusts its files
        raise FormatError(f"{file}: cannot be read as a GGUF file: {short(str(error))}") from error
    if (kind := fields.get("general.type", "model")) != "model":
        raise FormatError(f"{file}: is a GGUF file of type {short(kind)}; expected the base model")
    architecture = fields.get("general.architecture")
    config = {ours: fields.get(f"{architecture}.{name}") for ours, name in _IN_GGUF.items()}
    models = [model for model, (name, _) in _ARCHITECTURES.items() if name == architecture]
    config["architectures"] = models or [architecture]
    config["tie_word_embeddings"] = "output.weight" not in shapes
    return config, shapes


def _check_lengths(file: Path) -> None:
    """Refuses a file that claims more than it has, or endless lists.

    The package would make a Python object of each entry.

    Raises:
        ValueError: it does, or is cut off.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:

        def number(form: str) -> int:
            return int(struct.unpack(form, stream.read(struct.calcsize(form)))[0])

        def skip(count: int) -> None:
            if count > size - stream.tell():
                raise ValueError("a field is longer than the file")
            stream.seek(count, os.SEEK_CUR)

        def skip_value(kind: int) -> None:
            if kind == _STRING:
                skip(number("<Q"))
            elif kind == _ARRAY:
                inner, count = number("<I"), number("<Q")
                if count > _MOST_ENTRIES:
                    raise ValueError(f"a field has a list of {count} entries")
                if inner in _SIZES:
                    skip(count * _SIZES[inner])
                else:
                    for _ in range(count):
                        skip_value(inner)
            else:
                skip(_SIZES[kind])

        stream.seek(8)
        tensors, fields = number("<Q"), number("<Q")
        for _ in range(fields):
            skip(number("<Q"))
            skip_value(number("<I"))
        if tensors * _LEAST_TENSOR > size - stream.tell():
            raise ValueError("it has more tensors than bytes")


def _import_gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise UnsupportedError("GGUF files need gguf: pip install gguf") from error
    return gguf


@dataclasses.dataclass(frozen=True)
class _Target:
    """Name of a module's weight in llama.cpp, and heads whose rows are reordered (0 for none)."""

    name: str
    heads: int

    @property
    def keys(self) -> tuple[str, str]:
        return f"{self.name}.lora_a", f"{self.name}.lora_b"


class GgufLayout:
    """Places of an adapter's modules in a GGUF file. See `file_layout.FileLayout`.

    The safetensors file holds the tensors under their names in the GGUF file, which is made of it.

    Args:
        outline: the adapter, of which only the shapes of factors are used.
        base: its base model.

    Raises:
        MismatchError: a module does not fit the base model.
        UnsupportedError: there are extras, or modules whose conversion is not certain.
    """

    weights = None

    def __init__(self, outline: Adapter, base: _Base) -> None:
        if outline.extras:
            raise UnsupportedError(
                f"tensor {min(outline.extras)!r} is no low-rank update, and GGUF adapters hold "
                "nothing else; leave such tensors out"
            )
        self._targets = {path: _target(path, lora, base) for path, lora in outline.items()}
        self.groups = {path: [path] for path in outline}
        self.extras: Mapping[str, Array] = {}
        taken: dict[str, str] = {}
        for path, target in self._targets.items():
            if (other := taken.setdefault(target.name, path)) != path:
                raise UnsupportedError(
                    f"modules {other!r} and {path!r} are one weight in llama.cpp, {target.name!r}"
                )

    def keys(self, groups: Iterable[str]) -> list[str]:
        """Returns the names of the tensors of groups."""
        return [key for group in groups for key in self._targets[group].keys]

    def tensors(
        self, group: str, loras: Mapping[str, LoRA], rank: int, dtype: np.dtype
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Yields both factors, rows of B in the order of llama.cpp."""
        del dtype  # the writer's
        target = self._targets[group]
        a, b = pad(loras[group], rank)
        yield from zip(target.keys, (a, _reorder(b, target.heads)), strict=True)

    def metadata(self, ranks: Mapping[str, int]) -> dict[str, str]:
        """Returns nothing: this file does not stay."""
        del ranks
        return {}

    def files(self, ranks: Mapping[str, int]) -> dict[str, str]:
        """Returns nothing: the GGUF file has all."""
        del ranks
        return {}


def _target(path: str, lora: LoRA, base: _Base) -> _Target:
    if lora.kind.name != "linear" or lora.kind.transposed:
        kind = KINDS.get(lora.kind.name, "a transposed layer")
        raise UnsupportedError(
            f"module {path!r} is {kind}; to GGUF, only linear layers are converted; leave it out, "
            f"or {_ELSEWHERE}"
        )
    return _Target(base.name(path, lora.shape), base.heads(path, lora.shape[0]))


def _reorder(b: np.ndarray, heads: int) -> np.ndarray:
    """Returns rows ``0, d/2, 1, d/2 + 1, …`` of each head, of d rows; as they are for no heads."""
    if not heads:
        return b
    return b.reshape(heads, 2, -1, b.shape[1]).swapaxes(1, 2).reshape(b.shape)


def _to_gguf(file: Path, ranks: Mapping[str, int], *, architecture: str) -> None:
    """Replaces a safetensors file of a `GgufLayout` by a GGUF file, tensor by tensor."""
    gguf = _import_gguf()
    types = gguf.GGMLQuantizationType
    codes = {"float32": types.F32, "float16": types.F16, "bfloat16": types.BF16}
    (rank,) = set(ranks.values())
    reader, name = TensorReader(file), file.name.removesuffix(".safetensors")
    writer = gguf.GGUFWriter(file.with_name(f"{name}.gguf"), architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
    for key, x in reader.tensors.items():
        size = x.size * x.dtype.itemsize
        writer.add_tensor_info(key, x.shape, x.dtype, size, codes[x.dtype.name])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for key in reader.tensors:
            with reader.opened() as tensor:
                writer.write_tensor_data(tensor(key))
    finally:
        writer.close()
    file.unlink()
