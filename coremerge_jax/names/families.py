"""The names of each implementation of a model family."""

from collections.abc import Mapping

import numpy as np

from coremerge_jax.lora import Array
from coremerge_jax.names.name_map import Change, NameMap, Rule


def interleaved(b: Array, head_dim: int, back: bool) -> Array:
    """Puts rotary pairs (j, j + half) of each head side by side, as MaxText's Llama has them."""
    inner = (head_dim // 2, 2) if back else (2, head_dim // 2)
    heads = b.reshape(-1, *inner, b.shape[1])
    return heads.swapaxes(1, 2).reshape(b.shape)


def interleaved_query(b: Array, head_dim: int, back: bool) -> Array:
    """Returns the same, and 1/√head_dim, by which attention does not divide there."""
    factor = np.asarray(head_dim**0.5 if back else head_dim**-0.5, b.dtype)
    return interleaved(b, head_dim, back) * factor


# By the end of a kernel's name: the ends of Hugging Face's, the key, the factor with heads.
_Kernels = Mapping[str, tuple[tuple[str, ...], str, str | None]]


def _in_layers(
    ours: str, key: str, kernels: _Kernels, changes: Mapping[str, Change] | None = None
) -> tuple[Rule, ...]:
    """Rules for kernels of each layer, from the ends of their names and keys."""
    return tuple(
        Rule(
            ours + name,
            tuple(f"model.layers.{{i}}.{end}" for end in theirs),
            f"{key}{end_of_key}{{factor}}",
            heads,
            (changes or {}).get(name),
        )
        for name, (theirs, end_of_key, heads) in kernels.items()
    )


_QKV = tuple(f"self_attn.{x}_proj" for x in "qkv")
_EINSUMS: dict[str, tuple[tuple[str, ...], str]] = {
    "q_einsum": (_QKV[:1], "b"),
    "kv_einsum": (_QKV[1:], "b"),
    "qkv_einsum": (_QKV, "b"),
    "attn_vec_einsum": (("self_attn.o_proj",), "a"),
}

_TUNIX_MLP: _Kernels = {
    f"mlp.{x}_proj": ((f"mlp.{x}_proj",), f"mlp/{x}_proj/kernel_lora_", None)
    for x in ("gate", "up", "down")
}
_TUNIX: _Kernels = {
    f"attn.{x}_proj": ((f"self_attn.{x}_proj",), f"attn/{x}_proj/w_lora_", "a" if x == "o" else "b")
    for x in "qkvo"
}
_TUNIX_GEMMA: _Kernels = {
    f"attn.{name}": (theirs, f"attn/{name}/w_lora_", heads)
    for name, (theirs, heads) in _EINSUMS.items()
}
_GEMMA: _Kernels = {
    f"attn.{name}": (theirs, f"attn/{name}/_LoRAEinsum_0/lora/", heads)
    for name, (theirs, heads) in _EINSUMS.items()
} | {
    "mlp.gating_einsum": (
        ("mlp.gate_proj", "mlp.up_proj"),
        "mlp/_LoRAEinsum_gating_einsum/lora/",
        None,
    ),
    "mlp.linear": (("mlp.down_proj",), "mlp/_LoRAEinsum_linear/lora/", None),
}
# Stacked along axis 1. Heads have no axis of their own: MaxText multiplies by flat kernels.
_MAXTEXT: _Kernels = {
    f"{block}.{ours}": ((theirs,), f"{block}/{ours}/kernel_lora_", None)
    for block, ours, theirs in (
        ("self_attention", "query", "self_attn.q_proj"),
        ("self_attention", "key", "self_attn.k_proj"),
        ("self_attention", "value", "self_attn.v_proj"),
        ("self_attention", "out", "self_attn.o_proj"),
        ("mlp", "wi_0", "mlp.gate_proj"),
        ("mlp", "wi_1", "mlp.up_proj"),
        ("mlp", "wo", "mlp.down_proj"),
    )
}
_LLAMA = {"self_attention.query": interleaved_query, "self_attention.key": interleaved}

# Tunix's Llama and Qwen rotate as Hugging Face's do (tunix/models/*/params.py); so do its Gemma
# and google-deepmind's. MaxText's Llama does not (maxtext/checkpoint_conversion/utils/
# param_mapping.py), its Qwen does.
NAME_MAPS = {
    found.name: found
    for found in (
        NameMap(
            "tunix",
            "qwix",
            (
                *_in_layers("layers.{i}.", "layers/{i}/", {**_TUNIX, **_TUNIX_MLP}),
                Rule("lm_head", ("lm_head",), "lm_head/w_lora_{factor}"),
            ),
            item="model_params",
        ),
        NameMap(
            "tunix-gemma",
            "qwix",
            _in_layers("layers.{i}.", "layers/{i}/", {**_TUNIX_GEMMA, **_TUNIX_MLP}),
            item="model_params",
        ),
        NameMap("gemma", "gemma", _in_layers("layer.{i}.", "layer_{i}/", _GEMMA)),
        NameMap(
            "maxtext-llama3.1",
            "qwix",
            _in_layers("decoder.layers.{i}.", "decoder/layers/", _MAXTEXT, _LLAMA),
            scan_axis=1,
            item="model_params",
        ),
        NameMap(
            "maxtext-qwen",
            "qwix",
            _in_layers("decoder.layers.{i}.", "decoder/layers/", _MAXTEXT),
            scan_axis=1,
            item="model_params",
        ),
    )
}
