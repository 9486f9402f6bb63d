"""adapter_config.json, PEFT's description of a LoRA adapter: its fields, read and checked.

Training stacks write one beside orbax checkpoints, too.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from coremerge_jax.errors import FormatError, UnsupportedError
from coremerge_jax.io import untrusted

CONFIG = "adapter_config.json"
_MAX_RANK = 2**20


def _is_rank(value: Any) -> bool:
    return untrusted.is_number(value) and value == int(value) and 0 < value <= _MAX_RANK


_are_numbers = untrusted.is_list_of(untrusted.is_whole)
_are_indices = untrusted.is_list_of(lambda value: untrusted.is_whole(value) and value >= 0)
RANK = (_is_rank, f"a positive integer up to {_MAX_RANK}")
_NAMES = untrusted.either(untrusted.TEXT, untrusted.TEXTS)

# The field with the alpha of each method that is read; VeRA's update has none.
ALPHAS = {"LORA": "lora_alpha", "VERA": None, "LOHA": "alpha", "LOKR": "alpha"}

# Fields that the reader handles, or that do not change what the update is.
_ACCEPTED = {
    "alpha": untrusted.NUMBER,
    "alpha_pattern": untrusted.OBJECT,
    "auto_mapping": untrusted.OBJECT,
    "base_model_name_or_path": untrusted.TEXT,
    "bias": untrusted.TEXT,
    "corda_config": untrusted.OBJECT,
    "d_initial": untrusted.NUMBER,
    "decompose_both": untrusted.SWITCH,
    "decompose_factor": untrusted.WHOLE,
    "ensure_weight_tying": untrusted.SWITCH,
    "eva_config": untrusted.OBJECT,
    "exclude_modules": _NAMES,
    "fan_in_fan_out": untrusted.SWITCH,
    "inference_mode": untrusted.SWITCH,
    # Of Megatron-Bridge, for training.
    **dict.fromkeys(
        ("freeze_language_model", "freeze_vision_model", "freeze_vision_projection"),
        untrusted.SWITCH,
    ),
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
    "module_dropout": untrusted.NUMBER,
    "modules_to_save": untrusted.TEXTS,
    "peft_type": untrusted.TEXT,
    "peft_version": untrusted.TEXT,
    "projection_prng_key": untrusted.WHOLE,
    "qalora_group_size": untrusted.WHOLE,
    "r": RANK,
    "rank_dropout": untrusted.NUMBER,
    "rank_dropout_scale": untrusted.SWITCH,
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
    "use_effective_conv2d": untrusted.SWITCH,
    "use_rslora": untrusted.SWITCH,
    "velora_config": untrusted.OBJECT,
    "vera_dropout": untrusted.NUMBER,
}

# Refused fields that may be there if they are false.
_SWITCHES = dict.fromkeys(("use_dora", "use_qalora"), untrusted.SWITCH)

_REFUSED = {
    "alora_invocation_tokens": "activated LoRA acts only after its invocation tokens",
    "arrow_config": "Arrow routes each token to other adapters",
    "enable_lora": "its factors are those of a merged, grouped projection of an early peft",
    "kasa_config": "KaSA truncates the weights of the base model",
    "layer_replication": "the model has repeated layers, so its base weights are another model's",
    "megatron_config": "tensor-parallel layers keep only parts of the factors",
    "monteclora_config": "MonteCLoRA samples its update at random",
    "use_bdlora": "BD-LoRA's factors are block-diagonal, stored in another shape",
    "use_dora": "DoRA rescales the base weights, so its update is not of low rank",
    "use_qalora": "QALoRA pools the inputs of quantized layers",
}

_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
_BIASES = ("none", "all", "lora_only", "vera_only")
GIVE_BASE = (
    "cut it to LoRA with its base model: coremerge convert ADAPTER -o OUT --base MODEL --rank N"
)
RETRAIN = "merge it into its base model, or train the task again with plain LoRA"

_CONVERT = (
    "convert it with peft: "
    "save_pretrained(..., path_initial_model_for_weight_conversion=<the initial adapter>)"
)


def read_adapter_config(file: Path, allowed: Collection[str] = ()) -> dict[str, Any]:
    """Returns the fields of a configuration that describes a plain low-rank update.

    Args:
        file: the file.
        allowed: further fields that may be there.

    Raises:
        FormatError: the file is missing, broken or incomplete, or a field is of another kind.
        UnsupportedError: the configuration describes more than a plain low-rank update.
    """
    fields = untrusted.read_json(file, "a PEFT adapter folder")
    _check_type(file, fields)
    untrusted.check_kinds(file, fields, _ACCEPTED | _SWITCHES)
    for name, value in fields.items():
        if value and name not in _ACCEPTED and name not in allowed:
            remedy = GIVE_BASE if name == "use_dora" else RETRAIN
            reason = _REFUSED.get(name, "this field is not known, so it may change the update")
            raise UnsupportedError(
                f"{file}: {name} is {untrusted.short(value)}, which is not supported: {reason}; "
                f"{remedy}"
            )
    init = fields.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        raise UnsupportedError(
            f"{file}: init_lora_weights is {init!r}, which is not supported: it may change the "
            f"base weights, to which the update then belongs; {_CONVERT}"
        )
    if (bias := fields.get("bias") or "none") not in _BIASES:
        raise FormatError(f"{file}: bias is {bias!r}; expected 'none', 'all' or 'lora_only'")
    for name in ("r", *filter(None, [ALPHAS[fields["peft_type"]]])):
        if fields.get(name) is None:
            raise FormatError(f"{file}: no {name}; the update's scaling needs it")
    return fields


def _check_type(file: Path, fields: dict[str, Any]) -> None:
    kind = fields.get("peft_type")
    if kind is None and {"r", "lora_alpha"} <= fields.keys():  # as Tinker writes it
        kind = fields["peft_type"] = "LORA"
    if not isinstance(kind, str):
        raise FormatError(f"{file}: peft_type is {kind!r}; expected one of {', '.join(ALPHAS)}")
    if kind not in ALPHAS:
        raise UnsupportedError(
            f"{file}: peft_type {kind!r} is not supported, only {', '.join(ALPHAS)} are; "
            "peft.convert_to_lora can turn some other types into LoRA"
        )
    if kind == "VERA" and not fields.get("save_projection", True):
        raise UnsupportedError(
            f"{file}: save_projection is false, and VeRA's projections cannot be rebuilt without "
            "the model; save the adapter again with save_projection=True"
        )
