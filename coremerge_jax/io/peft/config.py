"""Ranks and scales of a PEFT adapter's modules, and the keys of its tensors."""

import contextlib
import itertools
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from coremerge_jax.errors import FormatError
from coremerge_jax.io.adapter_config import ALPHAS, RANK, read_adapter_config
from coremerge_jax.io.module_paths import unwrapped, without_wrappers
from coremerge_jax.io.patterns import Patterns
from coremerge_jax.io.untrusted import NUMBER, short

# More patterns are not searched for pairs that match one module.
_MOST_COMPARED = 100


class PeftConfig:
    """A checked adapter_config.json.

    Args:
        file: the file to read.
        allowed: fields that may be there beside those of a plain low-rank update.

    Attributes:
        file: the file, for messages.
        fields: its content.

    Raises:
        FormatError: the file is missing, broken or incomplete.
        UnsupportedError: it describes more than a plain low-rank update.
    """

    def __init__(self, file: Path, allowed: Collection[str] = ()) -> None:
        self.file, self.fields = file, read_adapter_config(file, allowed)
        self._patterns = {
            "rank_pattern": self._read_patterns("rank_pattern", *RANK),
            "alpha_pattern": self._read_patterns("alpha_pattern", *NUMBER),
        }

    def _read_patterns(self, name: str, test: Callable[[Any], bool], expected: str) -> Patterns:
        values = self.fields.get(name) or {}
        for pattern, value in values.items():
            if not test(value):
                raise FormatError(
                    f"{self.file}: {name}[{pattern!r}] is {short(value)}; expected {expected}"
                )
        try:
            return Patterns(values)
        except ValueError as error:
            raise FormatError(f"{self.file}: {name} has a {error}") from error

    @property
    def alpha(self) -> float | None:
        """The nominal alpha; None for VeRA, whose update has none."""
        field = ALPHAS[self.fields["peft_type"]]
        return None if field is None else self.fields[field]

    @property
    def transposed(self) -> bool:
        """True if the base weights are stored as (inputs, outputs)."""
        return bool(self.fields.get("fan_in_fan_out"))

    def rank(self, path: str) -> int:
        """Returns the rank of a module by ``rank_pattern``, else ``r``."""
        return int(self._by_pattern("rank_pattern", path, self.fields["r"]))

    def scale(self, path: str) -> float:
        """Returns the s of ``ΔW = s · B A``: alpha / r; alpha / sqrt(r) if rank-stabilized."""
        if self.alpha is None:
            return 1.0
        rank = self.rank(path)
        alpha = self._by_pattern("alpha_pattern", path, self.alpha)
        return alpha / (math.sqrt(rank) if self.fields.get("use_rslora") else rank)

    def find_overlap(self, paths: Iterable[str]) -> str | None:
        """Returns a sentence on the first module to which two patterns give two alphas."""
        values, patterns = self.fields.get("alpha_pattern") or {}, self._patterns["alpha_pattern"]
        if not 2 <= len(values) <= _MOST_COMPARED:
            return None
        with contextlib.suppress(ValueError):  # takes too long
            for path in paths:
                names = patterns.all(path)
                if len({values[name] for name in names}) > 1:
                    told = " and ".join(f"{name!r} ({values[name]})" for name in names[:2])
                    return (
                        f"{self.file}: alpha_pattern has {told} for module {path!r}; as in peft, "
                        "the first counts"
                    )
        return None

    def _by_pattern(self, field: str, path: str, default: float) -> float:
        try:
            first = self._patterns[field].first(path)
        except ValueError as error:
            raise FormatError(f"{self.file}: {field}, module {path!r}: {error}") from error
        return default if first is None else self.fields[field][first]


# `.default` or another adapter's name stands before the last part in raw state dicts; twice, where
# a raw dump was loaded and saved again.
_NAMED = r"(\.[^.]+){0,2}"
_FACTORS = (
    re.compile(rf"(?P<path>.+)\.(?P<part>lora_[AB]){_NAMED}\.(?P<leaf>weight|bias)"),
    re.compile(rf"(?P<path>.+)\.(?P<part>(lora_embedding_[AB]|vera_lambda_[bd])){_NAMED}"),
    re.compile(rf"(?P<path>base_model)\.(?P<part>vera_[AB]){_NAMED}"),
    re.compile(rf"(?P<path>.+)\.(?P<part>hada_(w[12]_[ab]|t[12])|lokr_(w[12](_[ab])?|t2)){_NAMED}"),
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

EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "wpe", "word_embeddings", "shared", "embed_out")


def split_factor(key: str) -> tuple[str, str] | None:
    """Splits a key into module path and factor (``"lora_A.weight"``); None for other tensors."""
    name = without_wrappers(key)[1]
    for pattern in _FACTORS:
        match = pattern.fullmatch(name)
        if match:
            leaf = match.groupdict().get("leaf")
            return match["path"], match["part"] + (f".{leaf}" if leaf else "")
    return None


def extra_name(key: str) -> str:
    """Returns the name of a tensor that is not a factor, as it is in the base model."""
    return unwrapped(_TOKENS.sub("", _SAVED.sub("", without_wrappers(key)[1])))


def is_saved(key: str) -> bool:
    """Returns True for the key of a tensor inside of peft's wrapper for ``modules_to_save``."""
    return _SAVED.search(key) is not None


def is_copy(name: str, names: Collection[str]) -> bool:
    """Returns True if a bias was saved by its own name, and by that of peft's wrapper."""
    return name != (own := _COPY.sub("", name)) and own in names


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
    if leaf == "weight" and (path in embeddings or path.rpartition(".")[2] in EMBEDDINGS):
        return True
    saved = (*(fields.get("modules_to_save") or ()), *_HEADS.get(fields.get("task_type") or "", ()))
    # As peft does: each module whose path ends so is saved, with all that is in it.
    owners = itertools.accumulate(path.split("."), lambda above, part: f"{above}.{part}")
    return any(owner.endswith(saved) for owner in owners)
