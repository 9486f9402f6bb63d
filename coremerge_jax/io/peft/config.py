"""PEFT's adapter_config.json, and the keys of its tensors."""

import dataclasses
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from coremerge_jax.errors import FormatError, UnsupportedError
from coremerge_jax.io import untrusted
from coremerge_jax.io.peft.patterns import Patterns

_MAX_RANK = 2**20


def _is_rank(value: Any) -> bool:
    return untrusted.is_number(value) and value == int(value) and 0 < value <= _MAX_RANK


_are_numbers = untrusted.is_list_of(untrusted.is_whole)

_are_indices = untrusted.is_list_of(lambda value: untrusted.is_whole(value) and value >= 0)

_RANK = (_is_rank, f"a positive integer up to {_MAX_RANK}")

_NAMES = untrusted.either(untrusted.TEXT, untrusted.TEXTS)

# Fields that the reader handles, or that do not change what the update is.
_ACCEPTED = {
    "alpha_pattern": untrusted.OBJECT,
    "auto_mapping": untrusted.OBJECT,
    "base_model_name_or_path": untrusted.TEXT,
    "bias": untrusted.TEXT,
    "corda_config": untrusted.OBJECT,
    "d_initial": untrusted.NUMBER,
    "eva_config": untrusted.OBJECT,
    "exclude_modules": _NAMES,
    "fan_in_fan_out": untrusted.SWITCH,
    "inference_mode": untrusted.SWITCH,
    "init_lora_weights": untrusted.either(untrusted.SWITCH, untrusted.TEXT),
    "init_weights": untrusted.SWITCH,
    "layers_pattern": _NAMES,
    "layers_to_transform": (
        lambda x: untrusted.is_whole(x) or _are_numbers(x),
        "a whole number or a list of them",
    ),
    "loftq_config": untrusted.OBJECT,
    "lora_alpha": untrusted.NUMBER,
    "lora_bias": untrusted.SWITCH,
    "lora_dropout": untrusted.NUMBER,
    "lora_ga_config": untrusted.OBJECT,
    "megatron_core": untrusted.TEXT,
    "merge_weights": untrusted.SWITCH,
    "modules_to_save": untrusted.TEXTS,
    "peft_type": untrusted.TEXT,
    "peft_version": untrusted.TEXT,
    "projection_prng_key": untrusted.WHOLE,
    "qalora_group_size": untrusted.WHOLE,
    "r": _RANK,
    "rank_pattern": untrusted.OBJECT,
    "revision": untrusted.TEXT,
    "runtime_config": untrusted.OBJECT,
    "save_projection": untrusted.SWITCH,
    "target_modules": _NAMES,
    "target_parameters": untrusted.TEXTS,
    "task_type": untrusted.TEXT,
    "trainable_token_indices": (
        lambda x: _are_indices(x) or (isinstance(x, dict) and all(map(_are_indices, x.values()))),
        "a list of whole numbers from 0 on, or such lists by module",
    ),
    "use_rslora": untrusted.SWITCH,
    "velora_config": untrusted.OBJECT,
    "vera_dropout": untrusted.NUMBER,
}

# Those of refused fields that may be there, and false.
_SWITCHES = dict.fromkeys(("ensure_weight_tying", "use_dora", "use_qalora"), untrusted.SWITCH)

_REFUSED = {
    "alora_invocation_tokens": "activated LoRA acts only after its invocation tokens",
    "arrow_config": "Arrow routes each token to other adapters",
    "enable_lora": "its factors are those of a merged, grouped projection of an early peft",
    "ensure_weight_tying": "tied layers share one update, which merging would separate",
    "kasa_config": "KaSA truncates the weights of the base model",
    "layer_replication": "the model has repeated layers, so its base weights are another model's",
    "megatron_config": "tensor-parallel layers keep only parts of the factors",
    "monteclora_config": "MonteCLoRA samples its update at random",
    "use_bdlora": "BD-LoRA's factors are block-diagonal, stored in another shape",
    "use_dora": "DoRA rescales the base weights, so its update is not of low rank",
    "use_qalora": "QALoRA pools the inputs of quantized layers",
}

_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")

RETRAIN = "merge it into its base model, or train the task again with plain LoRA"

_CONVERT = (
    "convert it with peft: "
    "save_pretrained(..., path_initial_model_for_weight_conversion=<the initial adapter>)"
)


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """A checked adapter_config.json.

    Attributes:
        file: where it was read, for messages.
        fields: the content.
    """

    file: Path
    fields: Mapping[str, Any]
    _patterns: dict[str, Patterns] = dataclasses.field(default_factory=dict, repr=False)

    @classmethod
    def read(cls, file: Path) -> "PeftConfig":
        """Reads and checks a configuration.

        Raises:
            FormatError: it is missing, broken or incomplete.
            UnsupportedError: it describes more than a plain low-rank update.
        """
        config = cls(file, untrusted.read_json(file, "a PEFT adapter folder"))
        config._check_type()
        untrusted.check_kinds(file, config.fields, _ACCEPTED | _SWITCHES)
        config._check_fields()
        config._check_scaling()
        return config

    def _check_type(self) -> None:
        kind = self.fields.get("peft_type")
        if not isinstance(kind, str):
            raise FormatError(f"{self.file}: peft_type is {kind!r}; expected 'LORA' or 'VERA'")
        if kind not in ("LORA", "VERA"):
            raise UnsupportedError(
                f"{self.file}: peft_type {kind!r} is not supported, only 'LORA' and 'VERA' are; "
                "peft.convert_to_lora can turn some other types into LoRA"
            )
        if self.is_vera and not self.fields.get("save_projection", True):
            raise UnsupportedError(
                f"{self.file}: save_projection is false, and VeRA's projections cannot be rebuilt "
                "without the model; save the adapter again with save_projection=True"
            )

    def _check_fields(self) -> None:
        for name, value in self.fields.items():
            if value and name not in _ACCEPTED:
                reason = _REFUSED.get(name, "this field is not known, so it may change the update")
                raise UnsupportedError(
                    f"{self.file}: {name} is {untrusted.short(value)}, which is not supported: "
                    f"{reason}; {RETRAIN}"
                )
        init = self.fields.get("init_lora_weights", True)
        if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
            raise UnsupportedError(
                f"{self.file}: init_lora_weights is {init!r}, which is not supported: it may "
                f"change the base weights, to which the update then belongs; {_CONVERT}"
            )
        if self.bias not in ("none", "all", "lora_only", "vera_only"):
            raise FormatError(
                f"{self.file}: bias is {self.bias!r}; expected 'none', 'all' or 'lora_only'"
            )

    def _check_scaling(self) -> None:
        names = ("r",) if self.is_vera else ("r", "lora_alpha")
        for name in names:
            if self.fields.get(name) is None:
                raise FormatError(f"{self.file}: no {name}; the update's scaling needs it")
        kinds = {"rank_pattern": _RANK, "alpha_pattern": untrusted.NUMBER}
        for name, (test, expected) in kinds.items():
            for pattern, value in (self.fields.get(name) or {}).items():
                if not test(value):
                    raise FormatError(
                        f"{self.file}: {name}[{pattern!r}] is {untrusted.short(value)}; "
                        f"expected {expected}"
                    )
            try:
                self._patterns[name] = Patterns(self.fields.get(name) or ())
            except ValueError as error:
                raise FormatError(f"{self.file}: {name} has a {error}") from error

    @property
    def is_vera(self) -> bool:
        """True if the update is VeRA's: scaled rows of shared projections."""
        return self.fields["peft_type"] == "VERA"

    @property
    def bias(self) -> str:
        """The biases of the base model that were trained: ``none``, ``all`` or ``lora_only``."""
        return self.fields.get("bias") or "none"

    @property
    def transposed(self) -> bool:
        """True if the base weights are stored as (inputs, outputs)."""
        return bool(self.fields.get("fan_in_fan_out"))

    def names(self, field: str) -> list[str]:
        """Returns a field that is a list of names, or one name."""
        value = self.fields.get(field) or []
        return [value] if isinstance(value, str) else list(value)

    def rank(self, path: str) -> int:
        """Returns the rank of a module by ``rank_pattern``, else ``r``."""
        return int(self._by_pattern("rank_pattern", path, self.fields["r"]))

    def scale(self, path: str) -> float:
        """Returns the s of ``ΔW = s · B A``: alpha / r; alpha / sqrt(r) if rank-stabilized."""
        if self.is_vera:
            return 1.0
        rank = self.rank(path)
        alpha = self._by_pattern("alpha_pattern", path, self.fields["lora_alpha"])
        return alpha / (math.sqrt(rank) if self.fields.get("use_rslora") else rank)

    def _by_pattern(self, field: str, path: str, default: float) -> float:
        try:
            first = self._patterns[field].first(path)
        except ValueError as error:
            raise FormatError(f"{self.file}: {field}, module {path!r}: {error}") from error
        return default if first is None else self.fields[field][first]


PREFIX = "base_model.model."

# What surrounds a wrapped layer or parameter in peft; not part of the base model's names.
WRAPPED = ".base_layer"

# `.default` or another adapter's name stands before the last part in raw state dicts.
_FACTORS = (
    re.compile(r"(?P<path>.+)\.(?P<part>lora_[AB])(\.[^.]+)?\.(?P<leaf>weight|bias)"),
    re.compile(r"(?P<path>.+)\.(?P<part>(lora_embedding_[AB]|vera_lambda_[bd]))(\.[^.]+)?"),
    re.compile(r"(?P<path>base_model)\.(?P<part>vera_[AB])(\.[^.]+)?"),
)

_SAVED = re.compile(r"\.modules_to_save\.[^.]+(?=\.)")

_COPY = re.compile(r"\.(modules_to_save|original_module)(?=\.)")

_TOKENS = re.compile(r"(?<=\.token_adapter\.trainable_tokens_delta)\.[^.]+$")

# Heads that peft trains for a task without naming them in `modules_to_save`.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}

_EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "wpe", "word_embeddings", "shared", "embed_out")


def split_factor(key: str) -> tuple[str, str] | None:
    """Splits a key into module path and factor (``"lora_A.weight"``); None for other tensors."""
    for pattern in _FACTORS:
        match = pattern.fullmatch(key.removeprefix(PREFIX))
        if match:
            leaf = match.groupdict().get("leaf")
            return match["path"], match["part"] + (f".{leaf}" if leaf else "")
    return None


def extra_name(key: str) -> str:
    """Returns the name of a tensor that is not a factor, as it is in the base model."""
    return unwrapped(_TOKENS.sub("", _SAVED.sub("", key.removeprefix(PREFIX))))


def is_copy(name: str, names: Collection[str]) -> bool:
    """Returns True if a bias was saved by its own name, and by that of peft's wrapper."""
    return name != (own := _COPY.sub("", name)) and own in names


def unwrapped(path: str) -> str:
    """Returns a path or name without peft's wrappers."""
    return re.sub(rf"({re.escape(WRAPPED)})+(?=\.|$)", "", path)


def is_extra(name: str, fields: Mapping[str, Any], embeddings: Collection[str]) -> bool:
    """Returns True if a configuration accounts for a tensor that is not a factor.

    Args:
        name: the tensor's name in the base model.
        fields: the configuration.
        embeddings: paths of adapted embeddings, whose full weights may be saved along.
    """
    path, _, leaf = name.rpartition(".")
    if leaf == "trainable_tokens_delta":
        return bool(fields.get("trainable_token_indices"))
    if "bias" in leaf and fields.get("bias", "none") != "none":
        return True
    if leaf == "weight" and (path in embeddings or path.rpartition(".")[2] in _EMBEDDINGS):
        return True
    saved = {*(fields.get("modules_to_save") or ()), *_HEADS.get(fields.get("task_type") or "", ())}
    parts = name.split(".")[:-1]
    for size in {module.count(".") + 1 for module in saved}:
        for start in range(len(parts) - size + 1):
            if ".".join(parts[start : start + size]) in saved:
                return True
    return False
