"""The names of tensors in adapter_model.safetensors."""

import re
from collections.abc import Collection, Mapping
from typing import Any

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
