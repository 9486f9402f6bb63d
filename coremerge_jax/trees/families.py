"""Module names of JAX implementations of model families, and Hugging Face's names for them.

A family is a row of `NAME_MAPS`: adding one is adding its kernels, if they have other names.
"""

from collections.abc import Iterable, Mapping

import flax.traverse_util
import jax
import numpy as np

from coremerge_jax.errors import MismatchError, RecipeError, UnsupportedError
from coremerge_jax.lora import Adapter, Array, LoRA
from coremerge_jax.trees.axes import Shape
from coremerge_jax.trees.names import Change, NameMap, Rule
from coremerge_jax.trees.paths import Tree


def interleaved(b: Array, head_dim: int, back: bool) -> Array:
    """Puts rotary pairs (j, j + half) of each head side by side, as MaxText's Llama has them."""
    inner = (head_dim // 2, 2) if back else (2, head_dim // 2)
    heads = b.reshape(-1, *inner, b.shape[1])
    return heads.swapaxes(1, 2).reshape(b.shape)


def interleaved_query(b: Array, head_dim: int, back: bool) -> Array:
    """Interleaves, and multiplies by 1/√head_dim, by which attention does not divide there."""
    factor = np.asarray(head_dim**0.5 if back else head_dim**-0.5, b.dtype)
    return interleaved(b, head_dim, back) * factor


# The kernels of a layer: the end of the name, the ends of Hugging Face's names, the end of the key,
# and the factor with an axis of attention heads.
_Kernels = Iterable[tuple[str, tuple[str, ...], str, str | None]]

_ATTENTION = {x: f"self_attn.{x}_proj" for x in "qkvo"}

_EINSUMS = (
    ("q_einsum", (_ATTENTION["q"],), "b"),
    ("kv_einsum", (_ATTENTION["k"], _ATTENTION["v"]), "b"),
    ("qkv_einsum", (_ATTENTION["q"], _ATTENTION["k"], _ATTENTION["v"]), "b"),
    ("attn_vec_einsum", (_ATTENTION["o"],), "a"),
)

_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")

_TUNIX_MLP = [(name, (name,), f"{name.replace('.', '/')}/kernel_lora_", None) for name in _MLP]

_TUNIX = [
    (f"attn.{x}_proj", (theirs,), f"attn/{x}_proj/w_lora_", "a" if x == "o" else "b")
    for x, theirs in _ATTENTION.items()
]

_TUNIX_GEMMA = [
    (f"attn.{name}", theirs, f"attn/{name}/w_lora_", heads) for name, theirs, heads in _EINSUMS
]

_GEMMA = [
    *(
        (f"attn.{name}", theirs, f"attn/{name}/_LoRAEinsum_0/lora/", heads)
        for name, theirs, heads in _EINSUMS
    ),
    ("mlp.gating_einsum", _MLP[:2], "mlp/_LoRAEinsum_gating_einsum/lora/", None),
    ("mlp.linear", _MLP[2:], "mlp/_LoRAEinsum_linear/lora/", None),
]

# Stacked along axis 1. Heads have no axis of their own: MaxText multiplies by flat kernels.
_MAXTEXT = [
    (f"{block}.{name}", (theirs,), f"{block}/{name}/kernel_lora_", None)
    for block, names, every in (
        ("self_attention", ("query", "key", "value", "out"), _ATTENTION.values()),
        ("mlp", ("wi_0", "wi_1", "wo"), _MLP),
    )
    for name, theirs in zip(names, every, strict=True)
]

_LLAMA = {"self_attention.query": interleaved_query, "self_attention.key": interleaved}


def _in_layers(
    ours: str, key: str, kernels: _Kernels, changes: Mapping[str, Change] | None = None
) -> tuple[Rule, ...]:
    """Returns rules for the kernels of each layer, from the starts of names and keys."""
    return tuple(
        Rule(
            ours=ours + name,
            theirs=tuple(f"model.layers.{{i}}.{end}" for end in theirs),
            key=f"{key}{end_of_key}{{factor}}",
            heads=heads,
            change=(changes or {}).get(name),
        )
        for name, theirs, end_of_key, heads in kernels
    )


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
                *_in_layers("layers.{i}.", "layers/{i}/", [*_TUNIX, *_TUNIX_MLP]),
                Rule("lm_head", ("lm_head",), "lm_head/w_lora_{factor}"),
            ),
            item="model_params",
        ),
        NameMap(
            "tunix-gemma",
            "qwix",
            _in_layers("layers.{i}.", "layers/{i}/", [*_TUNIX_GEMMA, *_TUNIX_MLP]),
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


def outline_tree(adapter: Adapter, names: NameMap, head_dim: int | None = None) -> Tree:
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
        first = next(iter(layers.values()))
        shapes = {i: _shapes(rule, i, lora, rank, head_dim) for i, lora in layers.items()}
        if names.scan_axis is not None:
            shapes = {"": _stacked(rule, shapes, names.scan_axis)}
        for i, pair in shapes.items():
            for factor, shape in zip("ab", pair, strict=True):
                key = rule.key.format(i=i, factor=factor)
                dtype = getattr(first, factor).dtype
                leaves[*key.split("/"), "value"] = jax.ShapeDtypeStruct(shape, dtype)
    return flax.traverse_util.unflatten_dict(leaves)


def _shapes(
    rule: Rule, layer: str, lora: LoRA, rank: int, head_dim: int | None
) -> tuple[Shape, Shape]:
    """Returns the stored shapes of one layer's factors."""
    m, n = lora.shape
    parts = len(rule.theirs)
    sizes: dict[str, Shape] = {"a": (n,), "b": (m,) if parts == 1 else (parts, m // parts)}
    if rule.heads is not None:
        path = rule.ours.format(i=layer)
        *rest, size = sizes[rule.heads]
        if head_dim is None:
            raise UnsupportedError(
                f"module {path!r}: attention heads have an axis of their own there; give head_dim "
                "(--head-dim)"
            )
        if size % head_dim:
            raise UnsupportedError(
                f"module {path!r} has {size} values in all heads; head_dim={head_dim} does not fit"
            )
        sizes[rule.heads] = (*rest, size // head_dim, head_dim)
    return (*sizes["a"], rank), (rank, *sizes["b"])


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
