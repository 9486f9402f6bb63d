"""The trees in which implementations of a model family keep LoRA factors."""

from typing import Any

import flax.traverse_util
import jax

from coremerge_jax.errors import MismatchError, UnsupportedError
from coremerge_jax.layouts.axes import Shape
from coremerge_jax.lora import Adapter, LoRA
from coremerge_jax.names.name_map import NameMap, Rule


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
