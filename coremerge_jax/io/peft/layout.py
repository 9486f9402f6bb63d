"""Places of an adapter's modules in PEFT's files."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from coremerge_jax.errors import FormatError
from coremerge_jax.io.adapter_config import CONFIG
from coremerge_jax.io.file_layout import pad
from coremerge_jax.io.module_paths import (
    LORA_BIAS,
    PREFIX,
    WRAPPED,
    outermost,
    split_expert,
    unwrapped,
)
from coremerge_jax.io.peft import experts
from coremerge_jax.io.peft.files import WEIGHTS
from coremerge_jax.lora import Adapter, Array, Kind, LoRA


class _Pair(NamedTuple):
    """Two tensors: the factors of one module, or of all experts of a fused parameter."""

    path: str
    kind: Kind
    modules: list[str]

    @property
    def leaves(self) -> tuple[str, str]:
        if self.kind.name == "embedding":
            return "lora_embedding_A", "lora_embedding_B"
        return "lora_A.weight", "lora_B.weight"

    def factors(self, loras: Mapping[str, LoRA], rank: int) -> tuple[np.ndarray, np.ndarray]:
        padded = [pad(loras[path], rank) for path in self.modules]
        a, b = experts.pack(padded) if self.kind.name == "expert" else padded[0]
        if self.kind.name == "conv2d":
            a, b = a.reshape(len(a), *self.kind.kernel), b[:, :, None, None]
        return a, b


class PeftLayout:
    """Places of an adapter's modules in PEFT's files. See `file_layout.FileLayout`.

    Modules that peft configures by one path form a group: a layer (for an attention, with its
    output projection), or all experts of a parameter. Keys have the prefix of the adapter's
    metadata; by default peft's own.

    Args:
        outline: the adapter, of which only the shapes of factors are used.

    Attributes:
        weights: name of the safetensors file.
        groups: the modules of each group.
        extras: extra tensors by key.

    Raises:
        FormatError: the experts of a parameter are not complete.
        UnsupportedError: peft's layout of the experts is not known.
    """

    weights = WEIGHTS

    def __init__(self, outline: Adapter) -> None:
        self._outline = outline
        prefix = outline.metadata.prefix
        self._prefix = PREFIX if prefix is None else prefix
        self._layers = {p: lora for p, lora in outline.items() if lora.kind.name != "expert"}
        self._parameters = _parameters(path for path in outline if path not in self._layers)
        self._pairs: dict[str, list[_Pair]] = {}
        for path, lora in self._layers.items():
            self._pairs.setdefault(outermost(path), []).append(_Pair(path, lora.kind, [path]))
        for parameter, path in experts.nest(self._parameters).items():
            pair = _Pair(path, Kind("expert"), self._parameters[parameter])
            self._pairs.setdefault(parameter, []).append(pair)
        self.groups = {
            group: [path for pair in pairs for path in pair.modules]
            for group, pairs in self._pairs.items()
        }
        self.extras: Mapping[str, Array] = self._place_extras()

    def _place_extras(self) -> dict[str, Array]:
        extras = dict(self._outline.extras)
        if self._has_lora_bias():  # peft then expects one in every layer that can have it
            for path, lora in self._layers.items():
                if lora.kind.name in ("linear", "conv2d"):
                    zeros = np.zeros(lora.shape[0], np.float32)
                    extras.setdefault(f"{path}{LORA_BIAS}", zeros)
        wrapped: dict[str, str] = {}
        for pairs in self._pairs.values():
            for pair in pairs:
                owner = unwrapped(pair.path)
                nested = wrapped.get(owner, owner) if pair.kind.name == "expert" else pair.path
                wrapped[owner] = nested + WRAPPED
        placed = {}
        for name, value in extras.items():
            owner, _, leaf = name.rpartition(".")
            placed[f"{self._prefix}{wrapped.get(owner, owner)}.{leaf}"] = value
        return placed

    def _has_lora_bias(self) -> bool:
        return any(name.endswith(LORA_BIAS) for name in self._outline.extras)

    def keys(self, groups: Iterable[str]) -> list[str]:
        """Returns the names of the tensors of groups."""
        return [key for group in groups for pair in self._pairs[group] for key in self._names(pair)]

    def _names(self, pair: _Pair) -> list[str]:
        return [f"{self._prefix}{pair.path}.{leaf}" for leaf in pair.leaves]

    def tensors(
        self, group: str, loras: Mapping[str, LoRA], rank: int, dtype: np.dtype
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Yields the tensors of a group by key, given its modules and their common rank."""
        del dtype  # the writer's
        for pair in self._pairs[group]:
            yield from zip(self._names(pair), pair.factors(loras, rank), strict=True)

    def metadata(self, ranks: Mapping[str, int]) -> dict[str, str]:
        """Returns the metadata that peft writes."""
        del ranks  # they are in the configuration
        return {"format": "pt"}

    def files(self, ranks: Mapping[str, int]) -> dict[str, str]:
        """Returns the text of adapter_config.json by its name."""
        return {CONFIG: json.dumps(self.config(ranks), indent=2) + "\n"}

    def config(self, ranks: Mapping[str, int]) -> dict[str, Any]:
        """Returns the content of adapter_config.json; alpha is the rank, so that the scaling is 1.

        Args:
            ranks: rank of each group.
        """
        top = max(ranks.values())
        patterns = {
            f"^{re.escape(group)}": ranks[group] for group in self._pairs if ranks[group] != top
        }
        kinds = [lora.kind for lora in self._layers.values()]
        metadata = self._outline.metadata
        config = {
            "peft_type": "LORA",
            # Readers recognise the layout of experts by the release.
            "peft_version": experts.LAYOUT_VERSION,
            "base_model_name_or_path": metadata.base_model,
            "task_type": metadata.task_type,
            "inference_mode": True,
            "r": top,
            "lora_alpha": top,
            "rank_pattern": patterns,
            "alpha_pattern": patterns,
            "use_rslora": False,
            "lora_dropout": 0.0,
            "lora_bias": self._has_lora_bias(),
            "init_lora_weights": True,
            "fan_in_fan_out": any(k.transposed for k in kinds if k.name == "linear"),
            "target_modules": list(dict.fromkeys(map(outermost, self._layers))),
            **metadata.config,
        }
        if self._parameters:
            config["target_parameters"] = list(self._parameters)
        if config.get("bias") == "vera_only":
            config["bias"] = "lora_only"
        if config.get("modules_to_save"):
            config["modules_to_save"] = list(self._modules_to_save(config["modules_to_save"]))
        return config

    def _modules_to_save(self, names: Iterable[str]) -> Iterator[str]:
        """Yields names of modules that are saved whole, without those that are adapted.

        peft cannot do both. It loads the weight of an adapted module too, by the key that the
        weight has here, if the configuration does not name the module.
        """
        whole = {name.rpartition(".")[0] for name in self._outline.extras}
        for name in names:
            if any(path.endswith(name) for path in self._layers):
                yield from sorted(x for x in whole - set(self._layers) if x.endswith(name))
            else:
                yield name


def _parameters(paths: Iterable[str]) -> dict[str, list[str]]:
    """Returns the experts of each fused parameter, in order."""
    found: dict[str, dict[int, str]] = {}
    for path in paths:
        parameter, index = split_expert(path)
        found.setdefault(parameter, {})[index] = path
    for parameter, parts in found.items():
        if sorted(parts) != list(range(len(parts))):
            raise FormatError(
                f"module {parameter!r} has the experts {sorted(parts)}; expected all from 0 on"
            )
    return {path: [parts[index] for index in sorted(parts)] for path, parts in found.items()}
