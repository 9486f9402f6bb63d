"""Gram matrices of the inputs that one product of a program multiplies with a weight."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from coremerge_jax.collecting.follow import Track, along, varies
from coremerge_jax.errors import MismatchError, UnsupportedError
from coremerge_jax.lora import Array, widest
from coremerge_jax.merging.mesh import with_automatic_axes
from coremerge_jax.trees.axes import Shape

# Gram matrices (L, k, k) and numbers of inputs (L,) of a weight's layers.
Sums = tuple[jax.Array, jax.Array]

_HIGHEST = jax.lax.Precision.HIGHEST

# Products of rows with rows, summed up by group.
_RAGGED = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())


@dataclasses.dataclass(frozen=True)
class Weight:
    """A leaf of a model's parameters that multiplies the inputs of modules.

    Attributes:
        key: of the leaf in its tree.
        letters: of its axes: i input, l layer, e expert.
        paths: of the module of each layer; None of those that no adapter has.
        full: True if sums are of x xᵀ, and not of z zᵀ, where z = A x.
    """

    key: str
    letters: str
    paths: tuple[str | None, ...]
    full: bool

    @property
    def name(self) -> str:
        """The first module, for messages."""
        return next(path for path in self.paths if path is not None)


@dataclasses.dataclass(frozen=True)
class _Product:
    """Axes of one product of inputs x with a weight.

    Attributes:
        groups: axes of x along which the layer, or the part of the inputs, changes.
        inputs: axes of x that are contracted.
        rows: all other axes of x.
        layers: ``(G, F)``, layer of each group and each of the weight's own layers.
        index: ``(G, K)``, index of the input at each place along the contracted axes.
    """

    groups: tuple[int, ...]
    inputs: tuple[int, ...]
    rows: tuple[int, ...]
    layers: Array
    index: np.ndarray


def add_product(
    sums: Sums,
    weight: Weight,
    a: jax.Array,
    track: Track,
    x: jax.Array,
    axes: Sequence[tuple[int, int]],
    batch: int,
    mask: jax.Array | None,
) -> Sums:
    """Adds the inputs of one product to the sums of a weight.

    Args:
        sums: so far.
        weight: the weight.
        a: ``(L, R, n)``, the A factors of all adapters below each other, of each layer.
        track: the entries of the weight in the product.
        x: the other operand.
        axes: pairs of an axis of the weight and the axis of ``x`` that it is multiplied with.
        batch: the number of pairs, the first ones, along which nothing is summed.
        mask: weights of inputs; see `row_weights`.
    """
    product = _read(weight, track, x, axes, batch)
    add = functools.partial(_add, weight, product, track.repeated)
    traced = None if isinstance(product.layers, np.ndarray) else product.layers
    return with_automatic_axes(add, sums, a, x, mask, traced)


def _add(
    weight: Weight,
    product: _Product,
    repeated: bool,
    sums: Sums,
    a: jax.Array,
    x: jax.Array,
    mask: jax.Array | None,
    layers: jax.Array | None,
) -> Sums:
    if layers is not None:
        product = dataclasses.replace(product, layers=layers)
    matrices, counts = sums
    x = x.astype(matrices.dtype)
    shape = tuple(x.shape[axis] for axis in product.rows)
    rows = None
    if mask is not None:
        rows = row_weights(weight.name, mask, shape, repeated=repeated).astype(x.dtype)
        # Padding can be anything, also not a number.
        x = jnp.where(_expand(rows != 0, product.rows, x.ndim), x, jnp.zeros((), x.dtype))
    grams = _full(product, x, rows, a.shape[-1]) if weight.full else _core(product, x, rows, a)
    found = jnp.broadcast_to(_count(product, x, rows), product.layers.shape)
    return _put(matrices, product.layers, grams), _put(counts, product.layers, found)


def _read(
    weight: Weight, track: Track, x: jax.Array, axes: Sequence[tuple[int, int]], batch: int
) -> _Product:
    """Finds the meaning of the axes of a product.

    Raises:
        UnsupportedError: the weight is not multiplied along its inputs.
    """
    paired = [ours for ours, _ in axes]
    free = [axis for axis in range(track.layers.ndim) if axis not in paired]
    if track.inputs is None or any(varies(track.inputs, axis) for axis in free):
        raise UnsupportedError(
            f"module {weight.name!r}: its weight {weight.key!r} is multiplied along other axes "
            "than its inputs (with another weight, transposed, or in parts); compute (x A) B, give "
            "a model without LoRA factors, or say what its axes are with axes"
        )
    groups = [i for i, (ours, _) in enumerate(axes) if i < batch or varies(track.layers, ours)]
    # In the order of x, in which products of x with itself have them.
    inner = sorted(set(range(len(axes))) - set(groups), key=lambda i: axes[i][1])
    ours = [axes[i][0] for i in groups], [axes[i][0] for i in inner]
    stacked = [axis for axis in free if varies(track.layers, axis)]
    size = math.prod(track.layers.shape[axis] for axis in ours[0])
    theirs = [theirs for _, theirs in axes]
    return _Product(
        groups=tuple(axes[i][1] for i in groups),
        inputs=tuple(axes[i][1] for i in inner),
        rows=tuple(axis for axis in range(x.ndim) if axis not in theirs),
        layers=track.look_up(along(track.layers, [*ours[0], *stacked]).reshape(size, -1)),
        index=along(track.inputs, [*ours[0], *ours[1]]).reshape(size, -1),
    )


def _core(product: _Product, x: jax.Array, rows: jax.Array | None, a: jax.Array) -> jax.Array:
    """Returns ``(G, F, R, R)``, Σ z zᵀ of z = A x."""
    groups, inputs = ([x.shape[i] for i in axes] for axes in (product.groups, product.inputs))
    a = _columns(_layers(a.astype(x.dtype), product.layers), product.index)
    a = a.reshape(*groups, *a.shape[1:3], *inputs)  # (groups, F, R, inputs)
    many = len(groups)
    pairs = (product.inputs, tuple(range(many + 2, a.ndim))), (product.groups, tuple(range(many)))
    z = jax.lax.dot_general(x, a, pairs, precision=_HIGHEST)  # (groups, rows, F, R)
    weighted = z
    if rows is not None:
        weighted = z * _expand(rows, range(many, z.ndim - 2), z.ndim)
    batch = (*range(many), z.ndim - 2)
    summed = tuple(range(many, z.ndim - 2))
    pairs = (summed, summed), (batch, batch)
    grams = jax.lax.dot_general(weighted, z, pairs, precision=_HIGHEST)
    return grams.reshape(*product.layers.shape, *grams.shape[-2:])


def add_ragged(
    sums: Sums,
    weight: Weight,
    a: jax.Array,
    track: Track,
    x: jax.Array,
    axis: int,
    sizes: jax.Array,
    mask: jax.Array | None,
) -> Sums:
    """Adds the inputs of one `jax.lax.ragged_dot` to the sums of a weight.

    Args:
        sums: so far.
        weight: the weight.
        a: ``(L, R, n)``, the A factors of all adapters below each other, of each layer.
        track: the entries of the weight in the product, ``(groups, n, m)``, or ``(groups, m, n)``.
        x: ``(rows, n)``, sorted by group.
        axis: of the inputs in the weight.
        sizes: ``(groups,)``, the number of rows of each group.
        mask: weights of inputs, which cannot be told apart here.

    Raises:
        MismatchError: there is a mask.
        UnsupportedError: the weight is not multiplied along its inputs.
    """
    if mask is not None:
        raise MismatchError(
            f"module {weight.name!r} has inputs that are sorted by expert, so those of padding are "
            "not known; give batches without padding, and no mask"
        )
    groups, n = _read(weight, track, x, [(0, 0), (axis, 1)], 1), a.shape[-1]
    matrices, counts = sums
    z = x.astype(matrices.dtype)
    if not weight.full:
        rows = _columns(_layers(a.astype(z.dtype), groups.layers), groups.index)[:, 0]
        z = jax.lax.ragged_dot(z, rows.swapaxes(1, 2), sizes, precision=_HIGHEST)
    grams = jax.lax.ragged_dot_general(z, z, sizes, _RAGGED, precision=_HIGHEST)[:, None]
    if weight.full:
        grams = _reordered(grams[:, 0], groups.index, n)[:, None]
    found = sizes.astype(counts.dtype)[:, None]
    return _put(matrices, groups.layers, grams), _put(counts, groups.layers, found)


def _layers(a: jax.Array, layers: Array) -> jax.Array:
    """Returns the A factors ``(G, F, R, n)`` of layers ``(G, F)``."""
    if _is_all(layers, len(a)):
        return a.reshape(*layers.shape, *a.shape[1:])
    return a[layers]


def _columns(a: jax.Array, index: np.ndarray) -> jax.Array:
    """Returns columns ``(G, F, R, K)`` of A factors ``(G, F, R, n)``."""
    if (index != index[:1]).any():
        return jnp.take_along_axis(a, jnp.asarray(index)[:, None, None, :], axis=-1)
    return a if _is_all(index[0], a.shape[-1]) else a[..., index[0]]


def _full(product: _Product, x: jax.Array, rows: jax.Array | None, n: int) -> jax.Array:
    """Returns ``(G, F, n, n)``, Σ x xᵀ."""
    weighted = x if rows is None else x * _expand(rows, product.rows, x.ndim)
    pairs = (product.rows, product.rows), (product.groups, product.groups)
    grams = jax.lax.dot_general(weighted, x, pairs, precision=_HIGHEST)
    groups, size = product.index.shape
    grams = _reordered(grams.reshape(groups, size, size), product.index, n)
    return jnp.broadcast_to(grams[:, None], (*product.layers.shape, n, n))


def _reordered(grams: jax.Array, index: np.ndarray, n: int) -> jax.Array:
    """Puts Gram matrices ``(G, K, K)`` of some inputs ``(G, K)`` among all n."""
    if all(_is_all(row, n) for row in index):
        return grams
    groups = np.arange(len(index))[:, None, None]
    places = groups, index[:, :, None], index[:, None, :]
    return jnp.zeros((len(index), n, n), grams.dtype).at[places].add(grams)


def _is_all(index: Array, size: int) -> bool:
    """Returns True if an index is known to have all places in order."""
    if not isinstance(index, np.ndarray) or index.size != size:
        return False
    return bool((index.reshape(-1) == np.arange(size)).all())


def _count(product: _Product, x: jax.Array, rows: jax.Array | None) -> jax.Array:
    """Returns the number of inputs, ``(G, 1)``.

    Where several layers, such as experts, have inputs in one array, those that are zero are empty
    places.
    """
    count = jnp.asarray(math.prod(x.shape[i] for i in product.rows), x.dtype)
    if len(product.layers) == 1:
        return (count if rows is None else rows.sum()).reshape(1, 1)
    there = (x != 0).any(product.inputs, keepdims=True).astype(x.dtype)
    if rows is not None:
        there = there * _expand(rows, product.rows, x.ndim)
    return there.sum((*product.rows, *product.inputs)).reshape(-1, 1)


def _expand(x: jax.Array, axes: Sequence[int], ndim: int) -> jax.Array:
    """Reshapes an array so that its axes, in order, are some axes of a larger one."""
    shape = [1] * ndim
    for axis, n in zip(axes, x.shape, strict=True):
        shape[axis] = n
    return x.reshape(shape)


def _put(sums: jax.Array, layers: Array, values: jax.Array) -> jax.Array:
    """Adds values ``(G, F, ...)`` to the sums of their layers."""
    values = values.reshape(-1, *sums.shape[1:])
    if _is_all(layers, len(sums)):
        return sums + values
    return sums.at[layers.reshape(-1)].add(values)


def row_weights(module: str, mask: jax.Array, rows: Shape, *, repeated: bool = False) -> jax.Array:
    """Returns the weights of a module's inputs, in the shape of these.

    The axes of the mask are the first ones of the inputs, or are one axis of these. Inputs of fewer
    axes, as after pooling, count if any of theirs do.

    Args:
        module: its path, for messages.
        mask: weights, such as ``(N, L)``.
        rows: the shape of the module's inputs, without the features.
        repeated: True if a loop has the module in all of its steps, which may be those of time or
            of examples. Then all axes of the mask have to be there.

    Raises:
        MismatchError: the axes of the inputs are others.
    """
    lead = mask.shape
    whole = len(lead) > 1 and (rows[: len(lead)] == lead or rows[:1] == (mask.size,))
    if repeated and not whole:
        raise MismatchError(
            f"module {module!r} is in a loop whose steps have inputs of shape {rows}, so the mask "
            f"{lead} does not tell which are padding; give batches without padding, and no mask"
        )
    if rows[:1] == (mask.size,) and rows[: len(lead)] != lead:
        mask = mask.reshape(-1)
    elif len(rows) < len(lead):
        mask = mask.max(tuple(range(len(rows), len(lead))))
    pooled = [axis for axis, n in enumerate(rows[: mask.ndim]) if n == 1]
    mask = mask.max(tuple(pooled), keepdims=True)
    if rows[: mask.ndim] != mask.shape:
        raise MismatchError(
            f"module {module!r} has inputs of shape {rows}, which the mask {lead} does not fit; "
            "give batches without padding, and no mask"
        )
    return jnp.broadcast_to(mask.reshape(mask.shape + (1,) * (len(rows) - mask.ndim)), rows)


def sum_dtype(*arrays: Array) -> np.dtype:
    """Returns the dtype of sums: float32, or wider if an array is."""
    return jax.dtypes.canonicalize_dtype(widest(np.dtype(np.float32), *(x.dtype for x in arrays)))
