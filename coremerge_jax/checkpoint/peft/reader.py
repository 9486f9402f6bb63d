"""PEFT adapter folder to `Adapter`."""

import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from coremerge_jax.checkpoint.peft import experts
from coremerge_jax.checkpoint.peft.config import RETRAIN, PeftConfig
from coremerge_jax.checkpoint.peft.keys import WRAPPED, extra_name, is_extra, split_factor
from coremerge_jax.checkpoint.peft.source import CONFIG, locate, weights_file
from coremerge_jax.errors import FormatError, UnsupportedError
from coremerge_jax.lora import Adapter, Kind, LoRA, Metadata

# Fields that writing the extras of an adapter back needs.
_EXTRA_FIELDS = ("bias", "modules_to_save", "revision", "trainable_token_indices")

# Tensors of methods that a configuration may not mention.
_METHODS = {
    "lora_magnitude_vector": "DoRA",
    "lora_E": "AdaLoRA",
    "lora_diag": "KaSA",
    "lora_monteclora": "MonteCLoRA",
}


def load_peft(source: str | Path, *, name: str | None = None) -> Adapter:
    """Reads a PEFT adapter; the scaling becomes part of ``b``.

    Factors are float32 NumPy arrays. Module paths are those of the base model, except that the
    output projection of a ``torch.nn.MultiheadAttention`` keeps peft's ``.base_layer.out_proj``,
    and that the experts of a fused parameter are modules ``parameter[index]``. A VeRA module gets
    the input width of the shared projections, as the file does not hold its own.

    Args:
        source: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``, or a
            Hugging Face id ``owner/name`` or ``owner/name@revision``.
        name: a name for messages and tables; the name of the folder or repository by default.

    Raises:
        FormatError: the files are missing, broken or inconsistent.
        UnsupportedError: the adapter is more than a low-rank update of the base model.
    """
    folder = locate(source)
    config = PeftConfig.read(folder / CONFIG)
    file = weights_file(folder)
    reader = _Reader(file, config, _read_tensors(file))
    modules = dict(reader.modules())
    if not modules:
        raise FormatError(f"{file}: no LoRA factors in it; expected keys like 'x.lora_A.weight'")
    extras = reader.extras({p for p, lora in modules.items() if lora.kind.name == "embedding"})
    metadata = Metadata(
        name=name or _name(source, folder),
        base_model=config.fields.get("base_model_name_or_path") or None,
        task_type=config.fields.get("task_type") or None,
        rank=int(config.fields["r"]),
        alpha=config.fields.get("lora_alpha"),
        dtype=reader.dtype,
        config={f: config.fields[f] for f in _EXTRA_FIELDS if config.fields.get(f)},
    )
    return Adapter(modules, metadata=metadata, extras=extras)


def _name(source: str | Path, folder: Path) -> str:
    return (folder.resolve() if Path(source).is_dir() else Path(str(source).split("@")[0])).name


def _read_tensors(file: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(file, framework="numpy") as stream:
            tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
    except (SafetensorError, TypeError) as error:
        raise FormatError(f"{file}: not a readable safetensors file ({error})") from error
    for key, value in tensors.items():
        if not np.isfinite(value).all():
            raise FormatError(f"{file}: tensor {key!r} has NaN or infinite values")
    return tensors


@dataclasses.dataclass
class _Reader:
    """Tensors of one file sorted into modules and the rest."""

    file: Path
    config: PeftConfig
    tensors: Mapping[str, np.ndarray]

    def __post_init__(self) -> None:
        self.groups: dict[str, dict[str, np.ndarray]] = {}
        self.others: dict[str, np.ndarray] = {}
        origin: dict[tuple[str, str], str] = {}
        for key, value in self.tensors.items():
            found = split_factor(key)
            path, part = found or ("", extra_name(key))
            if (path, part) in origin:
                raise FormatError(
                    f"{self.file}: {origin[path, part]!r} and {key!r} are both "
                    f"{'.'.join(filter(None, (path, part)))!r}; expected one adapter a file"
                )
            origin[path, part] = key
            (self.groups.setdefault(path, {}) if found else self.others)[part] = value
        self.shared = self.groups.pop("base_model", {})
        self.dtype = next((str(v.dtype) for g in self.groups.values() for v in g.values()), None)

    def modules(self) -> Iterator[tuple[str, LoRA]]:
        """Each module's update, in the order of the file."""
        targets = self.config.names("target_parameters")
        packed: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
        for path, parts in self.groups.items():
            bias = parts.pop("lora_B.bias", None)
            if bias is not None:
                if not self.config.fields.get("lora_bias"):
                    raise FormatError(
                        f"{self.file}: module {path!r} has a lora_B.bias, but lora_bias is false"
                    )
                scale = self.config.scale(_pattern_path(path))
                self.others[f"{path}.lora_B.bias"] = _float32(bias, scale)
            owner = path
            while owner.endswith(WRAPPED):
                owner = owner.removesuffix(WRAPPED)
            if set(parts) == {"vera_lambda_b", "vera_lambda_d"}:
                yield path, self._vera(path, parts)
            elif set(parts) == {"lora_embedding_A", "lora_embedding_B"}:
                factors = parts["lora_embedding_A"], parts["lora_embedding_B"]
                yield path, self._lora(path, *factors, Kind("embedding", transposed=True))
            elif set(parts) != {"lora_A.weight", "lora_B.weight"}:
                raise FormatError(
                    f"{self.file}: module {path!r} has {' and '.join(sorted(parts))} only; "
                    "expected an A and a B factor"
                )
            elif experts.target_names(owner, targets):
                factors = parts["lora_A.weight"], parts["lora_B.weight"]
                packed.setdefault(owner, {})[path] = factors
            else:
                yield path, self._layer(path, parts["lora_A.weight"], parts["lora_B.weight"])
        for owner, levels in packed.items():
            yield from self._experts(owner, levels, experts.target_names(owner, targets))

    def _layer(self, path: str, a: np.ndarray, b: np.ndarray) -> LoRA:
        """A linear layer or a two-dimensional convolution."""
        if a.ndim == b.ndim == 2:
            return self._lora(path, a, b, Kind(transposed=self.config.transposed))
        if a.ndim != 4 or b.ndim != 4:
            raise UnsupportedError(
                f"{self.file}: module {path!r} has factors of shapes {a.shape} and {b.shape}; "
                "only linear layers, embeddings and two-dimensional convolutions are supported"
            )
        if 0 < b.shape[1] < len(a) and len(a) % b.shape[1] == 0:
            raise UnsupportedError(
                f"{self.file}: module {path!r} is a convolution with "
                f"{len(a) // b.shape[1]} groups, whose update is not of low rank"
            )
        if b.shape[2:] != (1, 1):
            raise FormatError(
                f"{self.file}: module {path!r}: B has shape {b.shape}; expected 1 x 1"
            )
        kind = Kind("conv2d", kernel=a.shape[1:])
        return self._lora(path, a.reshape(len(a), -1), b.reshape(b.shape[:2]), kind)

    def _lora(self, path: str, a: np.ndarray, b: np.ndarray, kind: Kind) -> LoRA:
        self._check_shapes(path, a, b)
        expected = self.config.rank(_pattern_path(path))
        if len(a) != expected:
            raise FormatError(
                f"{self.file}: module {path!r} has rank {len(a)}, but {CONFIG} says {expected}"
            )
        return self._scaled(path, _pattern_path(path), a, b, kind)

    def _experts(
        self,
        owner: str,
        levels: Mapping[str, tuple[np.ndarray, np.ndarray]],
        names: list[str],
    ) -> Iterator[tuple[str, LoRA]]:
        for path, (a, b) in levels.items():
            self._check_shapes(path, a, b)
        version = str(self.config.fields.get("peft_version") or "")
        named = experts.name_levels(str(self.file), owner, levels, names, version)
        for path, parameter in named.items():
            try:
                parts = experts.unpack(*levels[path], self.config.rank(parameter))
            except FormatError as error:
                raise FormatError(f"{self.file}: module {path!r}: {error}") from error
            for index, (a, b) in enumerate(parts):
                yield (
                    f"{parameter}[{index}]",
                    self._scaled(path, parameter, a, b, Kind("expert")),
                )

    def _vera(self, path: str, parts: Mapping[str, np.ndarray]) -> LoRA:
        rows, inner = _float32(parts["vera_lambda_b"]), _float32(parts["vera_lambda_d"])
        if set(self.shared) != {"vera_A", "vera_B"}:
            raise FormatError(
                f"{self.file}: no base_model.vera_A and base_model.vera_B; "
                "save the adapter again with save_projection=True"
            )
        a, b = _float32(self.shared["vera_A"]), _float32(self.shared["vera_B"])
        fits = inner.shape == (len(a),) == b.shape[1:] and rows.ndim == 1 and len(rows) <= len(b)
        if not fits:
            raise FormatError(
                f"{self.file}: module {path!r}: lambda_b {rows.shape} and lambda_d {inner.shape} "
                f"do not fit the projections A {a.shape} and B {b.shape}"
            )
        kind = Kind(transposed=self.config.transposed)
        a, b = a * inner[:, None], b[: len(rows)] * rows[:, None]
        return self._lora(path, a, b, kind)

    def _scaled(self, path: str, pattern: str, a: np.ndarray, b: np.ndarray, kind: Kind) -> LoRA:
        lora = LoRA(_float32(a), _float32(b, self.config.scale(pattern)), kind)
        if not np.isfinite(lora.b).all():
            raise FormatError(f"{self.file}: module {path!r}: B times the scaling overflows")
        return lora

    def _check_shapes(self, path: str, a: np.ndarray, b: np.ndarray) -> None:
        if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1] or 0 in (*a.shape, *b.shape):
            raise FormatError(
                f"{self.file}: module {path!r}: A has shape {a.shape} and B has shape {b.shape}; "
                "expected (r, inputs) and (outputs, r) of one rank r"
            )

    def extras(self, embeddings: set[str]) -> dict[str, np.ndarray]:
        """Tensors that are not updates, all of which the configuration must account for."""
        extras, unclaimed = {}, []
        for name, value in self.others.items():
            method = next((_METHODS[part] for part in _METHODS if f".{part}" in name), None)
            if method:
                raise UnsupportedError(
                    f"{self.file}: tensor {name!r} belongs to {method}, whose update is not a "
                    f"plain low-rank one; {RETRAIN}"
                )
            if ".lora_velora_embed" in name:  # used in training only
                continue
            if name.endswith(".lora_B.bias") or is_extra(name, self.config.fields, embeddings):
                extras[name] = _float32(value) if _is_float(value) else value
            else:
                unclaimed.append(name)
        if unclaimed:
            factors = [key for key in self.tensors if split_factor(key)]
            near = difflib.get_close_matches(unclaimed[0], factors, n=1, cutoff=0)
            hint = f"; {unclaimed[0]!r} is nearest to {near[0]!r}" if near else ""
            raise FormatError(
                f"{self.file}: {len(unclaimed)} tensors that {CONFIG} does not account for: "
                f"{', '.join(map(repr, unclaimed[:3]))}{hint}"
            )
        return extras


def _pattern_path(path: str) -> str:
    """The path that peft matches patterns with: that of the outermost wrapped module."""
    return path.partition(WRAPPED)[0]


def _is_float(value: np.ndarray) -> bool:
    return not np.issubdtype(value.dtype, np.integer) and value.dtype != np.bool_


def _float32(value: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """The value times the scale in float32, rounded once."""
    if scale == 1.0:
        return value.astype(np.float32, copy=False)
    with np.errstate(over="ignore"):
        return (value.astype(np.float64) * scale).astype(np.float32)
