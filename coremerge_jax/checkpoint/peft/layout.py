"""Layout of an adapter's files: the configuration, and the tensors by key."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from coremerge_jax.checkpoint.peft import experts
from coremerge_jax.checkpoint.peft.keys import PREFIX, WRAPPED, unwrapped
from coremerge_jax.errors import FormatError
from coremerge_jax.lora import Adapter, Array, Kind, LoRA


class _Pair(NamedTuple):
    """Two tensors: the factors of one module, or of all experts of a fused parameter."""

    path: str
    kind: Kind
    modules: list[str]

    @property
    def names(self) -> tuple[str, str]:
        a, b = "lora_A.weight", "lora_B.weight"
        if self.kind.name == "embedding":
            a, b = "lora_embedding_A", "lora_embedding_B"
        return f"{PREFIX}{self.path}.{a}", f"{PREFIX}{self.path}.{b}"

    def tensors(self, loras: Mapping[str, LoRA], rank: int) -> Iterator[tuple[str, np.ndarray]]:
        factors = [_padded(loras[path], rank) for path in self.modules]
        a, b = experts.pack(factors) if self.kind.name == "expert" else factors[0]
        if self.kind.name == "conv2d":
            a, b = a.reshape(len(a), *self.kind.kernel), b[:, :, None, None]
        return zip(self.names, (a, b), strict=True)


class Layout:
    """Places of an adapter's modules in PEFT's files.

    What peft configures by one path is a group of modules, which have one rank: a layer, which an
    attention shares with its output projection, or all experts of a parameter.

    Args:
        outline: the adapter; only the shapes of its factors matter.

    Attributes:
        groups: the modules of each group.
        group: the group of each module.
        extras: extra tensors by key.

    Raises:
        FormatError: the experts of a parameter are not complete.
        UnsupportedError: peft's layout of the experts is not known.
    """

    def __init__(self, outline: Adapter) -> None:
        self._outline = outline
        self._layers = {p: lora for p, lora in outline.items() if lora.kind.name != "expert"}
        self._parameters = _parameters(path for path in outline if path not in self._layers)
        self._pairs: dict[str, list[_Pair]] = {}
        for path, lora in self._layers.items():
            self._pairs.setdefault(_outer(path), []).append(_Pair(path, lora.kind, [path]))
        for parameter, path in experts.nest(self._parameters).items():
            pair = _Pair(path, Kind("expert"), self._parameters[parameter])
            self._pairs.setdefault(parameter, []).append(pair)
        self.groups = {
            group: [path for pair in pairs for path in pair.modules]
            for group, pairs in self._pairs.items()
        }
        self.group = {path: group for group, paths in self.groups.items() for path in paths}
        self.extras = self._place_extras()

    def _place_extras(self) -> dict[str, Array]:
        extras = dict(self._outline.extras)
        if self._has_lora_bias():  # peft then expects one in every layer that can have it
            for path, lora in self._layers.items():
                if lora.kind.name in ("linear", "conv2d"):
                    zeros = np.zeros(lora.shape[0], np.float32)
                    extras.setdefault(f"{path}.lora_B.bias", zeros)
        wrapped: dict[str, str] = {}
        for pairs in self._pairs.values():
            for pair in pairs:
                owner = unwrapped(pair.path)
                nested = wrapped.get(owner, owner) if pair.kind.name == "expert" else pair.path
                wrapped[owner] = nested + WRAPPED
        placed = {}
        for name, value in extras.items():
            owner, _, leaf = name.rpartition(".")
            placed[f"{PREFIX}{wrapped.get(owner, owner)}.{leaf}"] = value
        return placed

    def _has_lora_bias(self) -> bool:
        return any(name.endswith(".lora_B.bias") for name in self._outline.extras)

    def keys(self, groups: Iterable[str]) -> list[str]:
        """Returns the names of the tensors of groups."""
        return [key for group in groups for pair in self._pairs[group] for key in pair.names]

    def tensors(
        self, group: str, loras: Mapping[str, LoRA], rank: int
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Yields the tensors of a group by key, given its modules and their common rank."""
        for pair in self._pairs[group]:
            yield from pair.tensors(loras, rank)

    def config(self, ranks: Mapping[str, int]) -> dict[str, Any]:
        """Returns the content of adapter_config.json; alpha is the rank, so that the scaling is 1.

        Args:
            ranks: of each group.
        """
        top = max(ranks.values())
        patterns = {
            f"^{re.escape(group)}": ranks[group] for group in self._pairs if ranks[group] != top
        }
        kinds = [lora.kind for lora in self._layers.values()]
        metadata = self._outline.metadata
        config = {
            "peft_type": "LORA",
            # The release whose layout of experts this is.
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
            "target_modules": list(dict.fromkeys(map(_outer, self._layers))),
            **metadata.config,
        }
        if self._parameters:
            config["target_parameters"] = list(self._parameters)
        if config.get("bias") == "vera_only":
            config["bias"] = "lora_only"
        return config


def _parameters(paths: Iterable[str]) -> dict[str, list[str]]:
    """Returns the experts of each fused parameter, in order."""
    found: dict[str, dict[int, str]] = {}
    for path in paths:
        parameter, index = experts.split_path(path)
        found.setdefault(parameter, {})[index] = path
    for parameter, parts in found.items():
        if sorted(parts) != list(range(len(parts))):
            raise FormatError(
                f"module {parameter!r} has the experts {sorted(parts)}; expected all from 0 on"
            )
    return {path: [parts[index] for index in sorted(parts)] for path, parts in found.items()}


def _outer(path: str) -> str:
    """Returns the layer that a module is part of: an attention has its output projection."""
    return path.partition(WRAPPED)[0]


def _padded(lora: LoRA, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the factors with zeros up to a rank, which does not change the update."""
    more = rank - lora.rank
    a, b = np.asarray(lora.a), np.asarray(lora.b)
    return (np.pad(a, ((0, more), (0, 0))), np.pad(b, ((0, 0), (0, more)))) if more else (a, b)
