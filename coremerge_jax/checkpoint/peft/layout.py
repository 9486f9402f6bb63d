"""What the files of an adapter contain: its configuration and its tensors by key."""

import re
from typing import Any

import numpy as np

from coremerge_jax.checkpoint.peft import experts
from coremerge_jax.checkpoint.peft.keys import PREFIX, WRAPPED, unwrapped
from coremerge_jax.errors import FormatError
from coremerge_jax.lora import Adapter, LoRA


def to_config(adapter: Adapter) -> dict[str, Any]:
    """The content of adapter_config.json; alpha equals the rank, so that the scaling is 1."""
    layers, parameters = _layers(adapter), _parameters(adapter)
    ranks = _ranks(adapter)
    top = max(ranks.values())
    patterns = {f"^{re.escape(path)}": rank for path, rank in ranks.items() if rank != top}
    linear = [lora.kind for lora in layers.values() if lora.kind.name == "linear"]
    config = {
        "peft_type": "LORA",
        # The release whose layout of experts this is.
        "peft_version": experts.LAYOUT_VERSION,
        "base_model_name_or_path": adapter.metadata.base_model,
        "task_type": adapter.metadata.task_type,
        "inference_mode": True,
        "r": top,
        "lora_alpha": top,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "use_rslora": False,
        "lora_dropout": 0.0,
        "lora_bias": _has_lora_bias(adapter),
        "init_lora_weights": True,
        "fan_in_fan_out": any(kind.transposed for kind in linear),
        "target_modules": list(dict.fromkeys(map(_outer, layers))),
        **adapter.metadata.config,
    }
    if parameters:
        config["target_parameters"] = list(parameters)
    if config.get("bias") == "vera_only":
        config["bias"] = "lora_only"
    return config


def to_tensors(adapter: Adapter) -> dict[str, np.ndarray]:
    """The content of adapter_model.safetensors, in the dtypes of the adapter."""
    ranks = _ranks(adapter)
    tensors: dict[str, np.ndarray] = {}
    wrapped = {}
    for path, lora in _layers(adapter).items():
        tensors |= _layer_tensors(path, lora, ranks[_outer(path)])
        wrapped[unwrapped(path)] = path + WRAPPED
    parameters = _parameters(adapter)
    for parameter, path in experts.nest(parameters).items():
        a, b = experts.pack([_padded(lora, ranks[parameter]) for lora in parameters[parameter]])
        tensors |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
        owner = unwrapped(path)
        wrapped[owner] = wrapped.get(owner, owner) + WRAPPED
    if _has_lora_bias(adapter):  # peft then expects one in every layer that can have it
        for path, lora in _layers(adapter).items():
            if lora.kind.name in ("linear", "conv2d"):
                tensors[f"{path}.lora_B.bias"] = np.zeros(lora.shape[0], np.float32)
    for name, value in adapter.extras.items():
        owner, _, leaf = name.rpartition(".")
        tensors[f"{wrapped.get(owner, owner)}.{leaf}"] = np.asarray(value)
    return {PREFIX + key: value for key, value in tensors.items()}


def _layers(adapter: Adapter) -> dict[str, LoRA]:
    return {path: lora for path, lora in adapter.items() if lora.kind.name != "expert"}


def _parameters(adapter: Adapter) -> dict[str, list[LoRA]]:
    """The experts of each fused parameter, in order."""
    found: dict[str, dict[int, LoRA]] = {}
    for path, lora in adapter.items():
        if lora.kind.name == "expert":
            parameter, index = experts.split_path(path)
            found.setdefault(parameter, {})[index] = lora
    for parameter, parts in found.items():
        if sorted(parts) != list(range(len(parts))):
            raise FormatError(
                f"module {parameter!r} has the experts {sorted(parts)}; expected all from 0 on"
            )
    return {path: [parts[index] for index in sorted(parts)] for path, parts in found.items()}


def _ranks(adapter: Adapter) -> dict[str, int]:
    """The rank of all that peft configures by one path: a layer, or a fused parameter."""
    ranks: dict[str, int] = {}
    for path, lora in adapter.items():
        owner = experts.split_path(path)[0] if lora.kind.name == "expert" else _outer(path)
        ranks[owner] = max(lora.rank, ranks.get(owner, 1))
    return ranks


def _outer(path: str) -> str:
    """The layer that contains a module: the output projection of an attention is part of it."""
    return path.partition(WRAPPED)[0]


def _has_lora_bias(adapter: Adapter) -> bool:
    return any(name.endswith(".lora_B.bias") for name in adapter.extras)


def _layer_tensors(path: str, lora: LoRA, rank: int) -> dict[str, np.ndarray]:
    a, b = _padded(lora, rank)
    if lora.kind.name == "embedding":
        return {f"{path}.lora_embedding_A": a, f"{path}.lora_embedding_B": b}
    if lora.kind.name == "conv2d":
        a, b = a.reshape(len(a), *lora.kind.kernel), b[:, :, None, None]
    return {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}


def _padded(lora: LoRA, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The factors with zeros up to a rank, which does not change the update."""
    more = rank - lora.rank
    a, b = np.asarray(lora.a), np.asarray(lora.b)
    return (np.pad(a, ((0, more), (0, 0))), np.pad(b, ((0, 0), (0, more)))) if more else (a, b)
