"""Module names of JAX implementations of model families, and Hugging Face's names for them."""

from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from coremerge_jax.errors import MismatchError, RecipeError, UnsupportedError
from coremerge_jax.lora import Adapter, Array, LoRA
from coremerge_jax.trees.axes import Shape
from coremerge_jax.trees.names import Change, NameMap, Rule


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


def find_names(names: str) -> NameMap:
    """Returns the names of an implementation.

    Raises:
        RecipeError: there are no such names.
    """
    if names not in NAME_MAPS:
        raise RecipeError(f"names {names!r}: expected one of {', '.join(NAME_MAPS)}")
    return NAME_MAPS[names]


def translate(adapter: Adapter, names: str, *, head_dim: int | None = None) -> Adapter:
    """Translates an adapter's names: to Hugging Face's if it has those of ``names``, else to these.

    Args:
        adapter: with names of either.
        names: one of `NAME_MAPS`.
        head_dim: the size of an attention head, where outputs have to be reordered.

    Raises:
        RecipeError: there are no such names.
        MismatchError: a module has no name there, or not all parts of a fused kernel are there.
        UnsupportedError: ``head_dim`` is needed, or does not fit.
    """
    found = find_names(names)
    if found.fits(adapter.outline):
        return found.to_hugging_face(adapter, head_dim=head_dim)
    return found.from_hugging_face(adapter, head_dim=head_dim)


def outline_tree(adapter: Adapter, names: NameMap, head_dim: int | None = None) -> dict[str, Any]:
    """Returns the keys, shapes and dtypes that an implementation has for an adapter.

    Each leaf is below a level ``value``, as a variable of flax nnx is saved.

    Args:
        adapter: with the names of the implementation; float32 or what its factors are.
        names: of the implementation.
        head_dim: the size of an attention head.

    Returns:
        Nested dicts of `jax.ShapeDtypeStruct`, with the largest rank in all shapes.

    Raises:
        MismatchError: a module has no name there; or some, but not all layers of a stack are there,
            or not of one shape.
        UnsupportedError: ``head_dim`` is needed, or does not fit.
    """
    outline = adapter.outline
    rank = max(lora.rank for lora in outline.values())
    found: dict[Rule, dict[str, LoRA]] = {}
    for path, lora in outline.items():
        rule, layer = names.rule(path, outline)
        found.setdefault(rule, {})[layer] = lora
    leaves = {}
    for rule, layers in found.items():
        shapes = {
            layer: _shapes(rule.ours.format(i=layer), rule, lora, rank, head_dim)
            for layer, lora in layers.items()
        }
        if names.scan_axis is not None:
            shapes = {"": _stacked(rule, shapes, names.scan_axis)}
        for layer, pair in shapes.items():
            for factor, shape in zip("ab", pair, strict=True):
                key = rule.key.format(i=layer, factor=factor)
                dtype = getattr(next(iter(layers.values())), factor).dtype
                leaves[*key.split("/"), "value"] = jax.ShapeDtypeStruct(shape, dtype)
    return flax.traverse_util.unflatten_dict(leaves)


def _shapes(
    path: str, rule: Rule, lora: LoRA, rank: int, head_dim: int | None
) -> tuple[Shape, Shape]:
    """Returns the stored shapes of one layer's factors."""
    m, n = lora.shape
    parts = len(rule.theirs)
    a: Shape = (n,)
    b: Shape = (m,) if parts == 1 else (parts, m // parts)
    if rule.heads == "a":
        a = _in_heads(path, a, head_dim)
    if rule.heads == "b":
        b = _in_heads(path, b, head_dim)
    return (*a, rank), (rank, *b)


def _in_heads(path: str, shape: Shape, head_dim: int | None) -> Shape:
    if head_dim is None:
        raise UnsupportedError(
            f"module {path!r}: attention heads have an axis of their own there; give head_dim "
            "(--head-dim)"
        )
    if shape[-1] % head_dim:
        raise UnsupportedError(
            f"module {path!r} has {shape[-1]} values in all heads; head_dim={head_dim} does not fit"
        )
    return (*shape[:-1], shape[-1] // head_dim, head_dim)


def _stacked(rule: Rule, shapes: dict[str, tuple[Shape, Shape]], axis: int) -> tuple[Shape, Shape]:
    """Returns the shapes of a stack of layers."""
    missing = [i for i in range(len(shapes)) if str(i) not in shapes]
    if missing:
        raise MismatchError(
            f"module {rule.ours.format(i=missing[0])!r} is missing: layers are stacked there, and "
            "the adapter has others of them"
        )
    if len(set(shapes.values())) > 1:
        raise MismatchError(f"modules {rule.ours!r}: layers of several shapes cannot be stacked")
    a, b = shapes["0"]
    count = (len(shapes),)
    return a[:axis] + count + a[axis:], b[:axis] + count + b[axis:]
