"""Files of mlx-lm and mlx-vlm to an `Adapter`, and the layout to write them.

``x.lora_a`` is (inputs, r) and ``x.lora_b`` (r, outputs): the transposes of A and B, times one
scale for all modules; an embedding's are (rows, r) and (r, columns). A layer with all experts of a
block has an axis of experts in front, (experts, r, inputs) and (experts, outputs, r): see
``mlx_lm/tuner/lora.py``.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from coremerge_jax.errors import FormatError, UnsupportedError
from coremerge_jax.io import untrusted
from coremerge_jax.io.adapter_config import CONFIG, RANK, RETRAIN
from coremerge_jax.io.factors import FactorFile, Factors, FactorSource, is_float, outline_of
from coremerge_jax.io.file_layout import pad
from coremerge_jax.io.one_file.keyed_layout import refuse_kinds, refuse_twins
from coremerge_jax.io.single_file import ADAPTERS, is_pipeline
from coremerge_jax.io.tensors import TensorReader
from coremerge_jax.lora import LINEAR, Adapter, Array, Kind, LoRA, Metadata
from coremerge_jax.trees.arguments import refuse_extras

_FIELDS = {
    "fine_tune_type": untrusted.TEXT,
    "lora_parameters": untrusted.OBJECT,
    "model": untrusted.TEXT,
}

_PARAMETERS = {"rank": RANK, "scale": untrusted.NUMBER, "alpha": untrusted.NUMBER}

_REFUSED = {
    "dora": "DoRA rescales the base weights, so its update is not of low rank",
    "full": "the file has whole weights of the model, and no low-rank updates",
}

# Last parts of the names of both factors: mlx-lm's, and mlx-vlm's (``mlx_vlm/trainer/lora.py``).
_PAIRS = (("lora_a", "lora_b"), ("A", "B"))
_LEAVES = {leaf for pair in _PAIRS for leaf in pair}

# The last part of the path of an embedding, whose factors look like a linear layer's.
_EMBEDDINGS = ("embed_tokens", "embed", "embeddings", "wte", "tok_embeddings", "word_embeddings")

# A layer with all experts of a block, and one expert by its own name.
_SWITCH = re.compile(r"(?P<block>.+)\.switch_mlp\.(?P<name>[^.]+)")
_EXPERT = re.compile(r"(?P<block>.+)\.experts\.(?P<index>\d{1,9})\.(?P<name>[^.]+)")

# Names of an expert's layers in the blocks of Mixtral and its like, by those in MLX.
_BLOCK = ".block_sparse_moe"
_BLOCK_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}

# Names of a language model in a model for images, of the other parts, and of models without one.
_INNER = re.compile(r"^model\.language_model\.(?!model\.)")
_SENSES = re.compile(
    r"(model\.)?(visual|vit|vision(_\w+)?|image_\w+|audio_\w+|multi_modal_projector"
    r"|embed_vision|embed_audio|mm_projector|clip|dinov2|siglip)\."
)

# What comes before the name of a module that each layer has.
_LAYER = re.compile(r"(.*\.)?layers\.\d+\.")

Shape = tuple[int, ...]


# --- Reading --------------------------------------------------------------------------------
def open_mlx(file: Path, config: Path, name: str) -> FactorFile:
    """Opens an adapter of mlx-lm; factors stay in the file.

    Each expert of a block is a module, ``experts.INDEX`` in place of ``switch_mlp``, as in the
    checkpoints that mlx-lm reads.

    Args:
        file: the file with the factors.
        config: the configuration.
        name: a name for messages and tables.

    Raises:
        FormatError: the files are broken, or contradict each other.
        UnsupportedError: they have more than low-rank updates.
    """
    reader = TensorReader(file)
    is_vlm = any(key.endswith(".A") for key in reader.tensors)
    fields, rank, scale = read_config(config, is_vlm)
    modules: dict[str, FactorSource] = {}
    for path, keys in _pairs(reader).items():
        for module, source in _sources(reader, path, keys, scale):
            if module in modules:
                raise FormatError(f"{file}: {module!r} is there twice; expected one adapter a file")
            modules[module] = source
    for source in modules.values():
        if source.outline.rank != rank:
            raise FormatError(
                f"{file}: module {source.path!r} has rank {source.outline.rank}, but {CONFIG} says "
                f"{rank}; take both files from one training"
            )
    dtype = str(next(iter(reader.tensors.values())).dtype)
    metadata = Metadata(
        name=name,
        base_model=fields.get("model") or None,
        rank=rank,
        alpha=scale * rank,
        dtype=dtype,
        format="mlx",
    )
    return FactorFile(reader, modules, metadata)


def read_config(file: Path, is_vlm: bool = False) -> tuple[dict[str, Any], int, float]:
    """Returns the configuration, its rank, and the scale of all updates.

    Args:
        file: the configuration.
        is_vlm: True for one of mlx-vlm, whose ``alpha`` is the scale.

    Raises:
        FormatError: it is broken, or does not tell rank and scale.
        UnsupportedError: it is of something else than low-rank updates.
    """
    fields = untrusted.read_json(file, "an MLX adapter")
    untrusted.check_kinds(file, fields, _FIELDS)
    kind = fields.get("fine_tune_type") or "lora"
    if kind != "lora":
        reason = _REFUSED.get(kind, "only 'lora' is known")
        raise UnsupportedError(f"{file}: fine_tune_type is {kind!r}: {reason}; {RETRAIN}")
    if is_vlm:
        untrusted.check_kinds(file, fields, _PARAMETERS)
        for name in ("rank", "alpha"):
            if fields.get(name) is None:
                raise FormatError(f"{file}: no {name}; expected that of the training by mlx-vlm")
        return fields, int(fields["rank"]), float(fields["alpha"])
    told = fields.get("lora_parameters") or {}
    untrusted.check_kinds(f"{file}: lora_parameters", told, _PARAMETERS)
    rank, scale, alpha = (told.get(name) for name in ("rank", "scale", "alpha"))
    if rank is None or scale is None:
        raise FormatError(
            f"{file}: no {'rank' if rank is None else 'scale'} in lora_parameters; expected "
            '{"lora_parameters": {"rank": 8, "scale": 20.0, ...}} with the values of the training, '
            "as mlx-lm writes them"
        )
    if alpha is not None and alpha != rank:
        raise FormatError(
            f"{file}: lora_parameters has alpha ({alpha:g}) and scale ({scale:g}): releases of "
            "mlx-lm that wrote alpha scaled by scale * alpha / rank, later ones by scale; leave "
            "alpha out, and give the scale of the training"
        )
    return fields, int(rank), float(scale)


def _pairs(reader: TensorReader) -> dict[str, tuple[str, str]]:
    """Returns the keys of both factors, by path.

    Raises:
        FormatError: one is missing, or there is none.
        UnsupportedError: there are other tensors.
    """
    paths: dict[str, set[str]] = {}
    for key in reader.tensors:
        path, _, leaf = key.rpartition(".")
        if leaf not in _LEAVES or not path:
            reason = "belongs to DoRA" if leaf == "m" else "is no factor lora_a or lora_b"
            raise UnsupportedError(f"{reader.file}: tensor {key!r} {reason}; {RETRAIN}")
        paths.setdefault(path, set()).add(leaf)
    for path, leaves in paths.items():
        if tuple(sorted(leaves)) not in _PAIRS:
            raise FormatError(
                f"{reader.file}: module {path!r} has {' and '.join(sorted(leaves))} only; expected "
                "lora_a and lora_b"
            )
    if not paths:
        raise FormatError(f"{reader.file}: no tensors in it; expected keys like 'x.lora_a'")
    ordered = {path: sorted(leaves) for path, leaves in paths.items()}
    return {path: (f"{path}.{a}", f"{path}.{b}") for path, (a, b) in ordered.items()}


def _sources(
    reader: TensorReader, path: str, keys: tuple[str, str], scale: float
) -> Iterator[tuple[str, FactorSource]]:
    """Yields a module, or each expert of a layer with several, by its path."""
    a, b = (_shape(reader, key) for key in keys)
    switch = _SWITCH.fullmatch(path)
    if len(b) == 3 and switch:
        if len(a) == 2 and b[0] and a[0] == b[0] * b[2]:  # of older releases
            a = b[0], b[2], a[1]
        if len(a) == 3 and a[0] == b[0] and a[1] == b[2] and 0 not in (*a, *b):
            outline = outline_of(a[1], b[1], a[2], LINEAR)
            own = _BLOCK_NAMES if switch["block"].endswith(_BLOCK) else {}
            name = own.get(switch["name"], switch["name"])
            for index in range(b[0]):
                factors = partial(_expert, index=index)
                source = FactorSource(reader.file, path, outline, keys, factors, scale)
                yield f"{switch['block']}.experts.{index}.{name}", source
            return
    elif len(a) == len(b) == 2 and a[1] == b[0] and 0 not in (*a, *b):
        is_embedding = path.rpartition(".")[2] in _EMBEDDINGS
        kind = Kind("embedding", transposed=True) if is_embedding else LINEAR
        outline = outline_of(a[1], b[1], a[0], kind)
        yield path, FactorSource(reader.file, path, outline, keys, _transposed, scale)
        return
    raise FormatError(
        f"{reader.file}: module {path!r}: lora_a has shape {a} and lora_b has shape {b}; expected "
        "(inputs, r) and (r, outputs) of one rank r, or for experts, in a 'switch_mlp', (experts, "
        "r, inputs) and (experts, outputs, r)"
    )


def _shape(reader: TensorReader, key: str) -> Shape:
    tensor = reader.tensors[key]
    if not is_float(tensor.dtype):
        raise UnsupportedError(
            f"{reader.file}: tensor {key!r} has dtype {tensor.dtype}; expected floats"
        )
    return tensor.shape


def _transposed(a: np.ndarray, b: np.ndarray) -> Factors:
    return a.T, b.T


def _expert(a: np.ndarray, b: np.ndarray, *, index: int) -> Factors:
    return a.reshape(len(b), b.shape[2], -1)[index], b[index]


# --- Writing --------------------------------------------------------------------------------
class MlxLayout:
    """Places of an adapter's modules in the files of mlx-lm; see `file_layout.FileLayout`.

    Args:
        outline: the adapter.
        name: name of the format, for messages.

    Raises:
        UnsupportedError: the format cannot hold the adapter.
    """

    weights = ADAPTERS

    def __init__(self, outline: Adapter, name: str) -> None:
        for path in outline:
            _check_name(path)
        refuse_extras(outline, f"{name}s")
        refuse_kinds(outline, name, ("linear", "embedding"))
        self._check_embeddings(outline)
        self.extras: Mapping[str, Array] = {}
        self._base_model = outline.metadata.base_model
        self.groups: dict[str, list[str]] = {}
        names = _names(outline)
        for path in outline:
            self.groups.setdefault(_layer(names[path]), []).append(path)
        for path, modules in self.groups.items():
            if _is_stack(modules):
                self.groups[path] = _in_order(path, modules, outline)
        refuse_twins({p: path for path, ps in self.groups.items() for p in ps[:1]}, name)

    def _check_embeddings(self, outline: Adapter) -> None:
        for path, lora in outline.items():
            if (path.rpartition(".")[2] in _EMBEDDINGS) != (lora.kind.name == "embedding"):
                raise UnsupportedError(
                    f"module {path!r} is of kind {lora.kind.name!r}, but mlx-lm takes modules for "
                    f"embeddings by their names ({', '.join(_EMBEDDINGS)}); write it with --to peft"
                )

    def keys(self, groups: Iterable[str]) -> list[str]:
        """Returns the names of the tensors of layers."""
        return [f"{path}.{leaf}" for path in groups for leaf in ("lora_a", "lora_b")]

    def tensors(
        self, group: str, loras: Mapping[str, LoRA], rank: int, dtype: np.dtype
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Yields both factors of a layer, with all its experts if it has some."""
        del dtype
        pairs = [pad(loras[path], rank) for path in self.groups[group]]
        if _is_stack(self.groups[group]):
            a, b = (np.stack(factors) for factors in zip(*pairs, strict=True))
        else:
            ((a, b),) = ((a.T, b.T) for a, b in pairs)
        yield f"{group}.lora_a", a
        yield f"{group}.lora_b", b

    def metadata(self, ranks: Mapping[str, int]) -> dict[str, str]:
        """Returns the metadata in the header, as MLX writes it."""
        del ranks
        return {"format": "mlx"}

    def files(self, ranks: Mapping[str, int]) -> dict[str, str]:
        """Returns the configuration, by which mlx-lm adapts all layers (-1)."""
        keys = list(dict.fromkeys(_LAYER.sub("", path, count=1) for path in self.groups))
        config = {
            "fine_tune_type": "lora",
            **({"model": self._base_model} if self._base_model else {}),
            "num_layers": -1,
            "lora_parameters": {
                "rank": max(ranks.values()),
                "scale": 1.0,
                "dropout": 0.0,
                "keys": keys,
            },
        }
        return {CONFIG: json.dumps(config, indent=4) + "\n"}


def _check_name(path: str) -> None:
    if is_pipeline(path) or path.startswith(("diffusion_model.", "lora_", "lycoris_")):
        raise UnsupportedError(
            f"module {path!r} is of an image or video model, which mlx-lm does not load; write it "
            "with --to kohya, diffusers or original"
        )
    if _SENSES.match(path):
        raise UnsupportedError(
            f"module {path!r} is of a vision or audio model, or of such a part of one, which "
            "mlx-lm does not load, without a word; leave it out, or write it with --to peft"
        )


def _names(paths: Iterable[str]) -> dict[str, str]:
    """Returns the names in MLX by those in transformers: those of a model with senses differ.

    mlx-lm ignores names that it does not have (``mlx_lm/tuner/utils.py``), and calls the language
    model in another one ``language_model.model`` (``mlx_lm/models/gemma3.py``, ``qwen2_vl.py``).
    """
    paths = list(paths)
    inside = any(path.startswith(("model.language_model.", "language_model.")) for path in paths)
    names = {path: _INNER.sub("language_model.model.", path) for path in paths}
    return {
        path: f"language_model.{name}" if inside and name == "lm_head" else name
        for path, name in names.items()
    }


def _is_stack(modules: Iterable[str]) -> bool:
    return any(_EXPERT.fullmatch(path) for path in modules)


def _layer(path: str) -> str:
    """Returns the path of the layer in MLX that a module is in."""
    expert = _EXPERT.fullmatch(path)
    if not expert:
        return path
    names = {own: name for name, own in _BLOCK_NAMES.items()}
    own = names if expert["block"].endswith(_BLOCK) else {}
    return f"{expert['block']}.switch_mlp.{own.get(expert['name'], expert['name'])}"


def _in_order(layer: str, paths: list[str], outline: Adapter) -> list[str]:
    """Returns all experts of a layer in the order of their numbers.

    Raises:
        UnsupportedError: one is missing, or is of another size.
    """
    indices = {int(_EXPERT.fullmatch(path)["index"]): path for path in paths}  # type: ignore[index]
    if sorted(indices) != list(range(len(paths))):
        missing = next(i for i in range(len(paths) + 1) if i not in indices)
        raise UnsupportedError(
            f"module {layer!r} has experts, but not number {missing}; an MLX adapter has all "
            "experts of a layer or none; write it with --to peft"
        )
    if len({outline[path].shape for path in paths}) > 1:
        raise UnsupportedError(
            f"module {layer!r} has experts of several shapes; an MLX adapter stacks them; write it "
            "with --to peft"
        )
    return [indices[i] for i in range(len(indices))]
