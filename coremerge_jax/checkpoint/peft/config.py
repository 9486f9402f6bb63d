"""adapter_config.json: which configurations are plain low-rank updates, and how they scale."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coremerge_jax.checkpoint.json_file import read_json
from coremerge_jax.errors import FormatError, UnsupportedError

# Fields that the reader handles, or that do not change what the update is.
_ACCEPTED = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "d_initial",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "init_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_bias",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "merge_weights",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "projection_prng_key",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "save_projection",
        "target_modules",
        "target_parameters",
        "task_type",
        "trainable_token_indices",
        "use_rslora",
        "velora_config",
        "vera_dropout",
    }
)

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

    @classmethod
    def read(cls, file: Path) -> "PeftConfig":
        """Reads and checks a configuration.

        Raises:
            FormatError: it is missing, broken or incomplete.
            UnsupportedError: it describes more than a plain low-rank update.
        """
        config = cls(file, read_json(file, "a PEFT adapter folder"))
        config._check_type()
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
                    f"{self.file}: {name} is {_short(value)}, which is not supported: {reason}; "
                    f"{RETRAIN}"
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
        self._check_number("r", self.fields["r"], integer=True)
        for name, integer in (("rank_pattern", True), ("alpha_pattern", False)):
            patterns = self.fields.get(name) or {}
            if not isinstance(patterns, dict):
                raise FormatError(f"{self.file}: {name} is {_short(patterns)}; expected an object")
            for pattern, value in patterns.items():
                self._check_number(f"{name}[{pattern!r}]", value, integer=integer)
        if not self.is_vera:
            self._check_number("lora_alpha", self.fields["lora_alpha"], integer=False)

    def _check_number(self, name: str, value: Any, *, integer: bool) -> None:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if (
            not number
            or not math.isfinite(value)
            or (integer and (value != int(value) or value < 1))
        ):
            expected = "a positive integer" if integer else "a finite number"
            raise FormatError(f"{self.file}: {name} is {_short(value)}; expected {expected}")

    @property
    def is_vera(self) -> bool:
        """Whether the update is VeRA's: scaled rows of shared projections."""
        return self.fields["peft_type"] == "VERA"

    @property
    def bias(self) -> str:
        """Which biases of the base model were trained."""
        return self.fields.get("bias") or "none"

    @property
    def transposed(self) -> bool:
        """Whether the base weights are stored as (inputs, outputs)."""
        return bool(self.fields.get("fan_in_fan_out"))

    def names(self, field: str) -> list[str]:
        """A field that is a list of names, or one name."""
        value = self.fields.get(field) or []
        return [value] if isinstance(value, str) else list(value)

    def rank(self, path: str) -> int:
        """The rank of a module by ``rank_pattern``, else ``r``."""
        return int(self._by_pattern("rank_pattern", path, self.fields["r"]))

    def scale(self, path: str) -> float:
        """The s of ``ΔW = s · B A``: alpha / r, or alpha / sqrt(r) for rank-stabilized LoRA."""
        if self.is_vera:
            return 1.0
        rank = self.rank(path)
        alpha = self._by_pattern("alpha_pattern", path, self.fields["lora_alpha"])
        return alpha / (math.sqrt(rank) if self.fields.get("use_rslora") else rank)

    def _by_pattern(self, field: str, path: str, default: float) -> float:
        for pattern, value in (self.fields.get(field) or {}).items():
            try:
                if re.match(rf"(.*\.)?({pattern})$", path):
                    return value
            except re.error as error:
                raise FormatError(
                    f"{self.file}: {field} has a broken pattern {pattern!r} ({error})"
                ) from error
        return default


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
