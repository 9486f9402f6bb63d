"""Entries of weights, followed through the operations that only move them."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from coremerge_jax.lora import Array
from coremerge_jax.trees.axes import Shape, lengths


@dataclasses.dataclass(frozen=True, eq=False)
class Track:
    """Entries of a value that are those of a weight: the input and the layer of each.

    Most axes of the two index arrays have stride 0, so that they take no memory.

    Attributes:
        weight: the number of the weight.
        inputs: of the value's shape, the index of the module's input; None where it was lost, by
            an operation that does not only move entries.
        layers: of the value's shape, a number of a layer or expert.
        table: ``(K,)``, layer of each number, where a loop or an index decides it; None if the
            numbers are the layers themselves.
        repeated: True in a loop all of whose steps use it, so that they may have parts of a batch.
    """

    weight: int
    inputs: np.ndarray | None
    layers: np.ndarray
    table: Array | None = None
    repeated: bool = False

    def look_up(self, numbers: Array) -> Array:
        """Returns the layers that numbers stand for."""
        return numbers if self.table is None else self.table[numbers]

    @property
    def in_loop(self) -> "Track":
        """The same entries in each step of a loop."""
        return dataclasses.replace(self, repeated=True)

    @property
    def lost(self) -> "Track":
        """The same weight, without the places of its entries."""
        return dataclasses.replace(self, inputs=None)


def start(weight: int, letters: str, shape: Shape) -> Track:
    """Returns the track of a whole weight.

    Args:
        weight: its number.
        letters: of its axes: i input, l layer, e expert; others do not matter.
        shape: of the weight.
    """
    return Track(weight, _index(letters, shape, "i"), _index(letters, shape, "le"))


def _index(letters: str, shape: Shape, wanted: str) -> np.ndarray:
    """Returns the joint index of the axes with the wanted letters, by their order in ``wanted``."""
    axes = [axis for x in wanted for axis, letter in enumerate(letters) if letter == x]
    sizes = [shape[axis] for axis in axes]
    index = np.arange(math.prod(sizes), dtype=np.int32).reshape(sizes)
    index = index.transpose(np.argsort(axes)) if axes else index
    ones = [n if letter in wanted else 1 for n, letter in zip(shape, letters, strict=True)]
    return np.broadcast_to(index.reshape(ones), shape)


def layer_count(letters: str, shape: Shape) -> int:
    """Returns the number of layers, or experts of all layers, in a weight."""
    return math.prod(lengths(letters, shape, "le"))


def varies(index: np.ndarray, axis: int) -> bool:
    """Returns True if an index is not the same along an axis."""
    if index.shape[axis] < 2 or index.strides[axis] == 0:
        return False
    return bool((index != index.take([0], axis)).any())


def along(index: np.ndarray, axes: Sequence[int]) -> np.ndarray:
    """Returns the index along some axes, in their order, at the start of all others."""
    rest = [axis for axis in range(index.ndim) if axis not in axes]
    return index.transpose([*axes, *rest])[(slice(None),) * len(axes) + (0,) * len(rest)]


def _broadcast(x: np.ndarray, params: Mapping[str, Any]) -> np.ndarray:
    shape, axes = params["shape"], params["broadcast_dimensions"]
    ones = [1] * len(shape)
    for axis, n in zip(axes, x.shape, strict=True):
        ones[axis] = n
    return np.broadcast_to(x.reshape(ones), shape)


def _slice(x: np.ndarray, params: Mapping[str, Any]) -> np.ndarray:
    strides = params["strides"] or (1,) * x.ndim
    return x[tuple(map(slice, params["start_indices"], params["limit_indices"], strides))]


# Operations that move entries, by name of the primitive.
_MOVES: dict[str, Callable[[np.ndarray, Mapping[str, Any]], np.ndarray]] = {
    "broadcast_in_dim": _broadcast,
    "reshape": lambda x, params: x.reshape(params["new_sizes"]),
    "rev": lambda x, params: np.flip(x, params["dimensions"]),
    "slice": _slice,
    "squeeze": lambda x, params: np.squeeze(x, params["dimensions"]),
    "transpose": lambda x, params: x.transpose(params["permutation"]),
}

# Those that leave all in place. A sign changes no Gram matrix.
_SAME = (
    "convert_element_type",
    "copy",
    "copy_p",
    "device_put",
    "layout_constraint",
    "mesh_cast",
    "name",
    "neg",
    "optimization_barrier",
    "pvary",
    "reduce_precision",
    "reshard",
    "sharding_constraint",
    "stop_gradient",
)

# Those that leave the inputs of a weight as they are, if the other operand is no weight: it is a
# number, or a summand, such as another update of the same weight.
_SUMS = ("add", "add_any", "sub")
_SCALED = (*_SUMS, "mul", "div")


def moved(
    name: str, params: Mapping[str, Any], values: Sequence[Any], tracks: Sequence[Track | None]
) -> list[Track | None] | None:
    """Returns the tracks of an operation's results; None if it does not only move entries.

    Args:
        name: of the primitive.
        params: of the operation.
        values: its operands.
        tracks: of the operands; None for those that are no weights.
    """
    first = tracks[0]
    if name in _SAME:
        return list(tracks)
    if name in _SCALED and sum(track is not None for track in tracks) == 1:
        track, other = (first, values[1]) if first is not None else (tracks[1], values[0])
        scaled = np.ndim(other) == 0 and not (name == "div" and first is None)
        return [track] if scaled or name in _SUMS else None
    if first is None:
        return None
    if name == "dynamic_slice":
        return [_sliced(first, values[1:], params["slice_sizes"])]
    if name == "split":
        return _split(first, params["sizes"], params["axis"])
    if name not in _MOVES:
        return None
    if first.inputs is None:
        return [first]
    inputs, layers = (_MOVES[name](x, params) for x in (first.inputs, first.layers))
    return [dataclasses.replace(first, inputs=inputs, layers=layers)]


def _split(track: Track, sizes: Sequence[int], axis: int) -> list[Track | None]:
    if track.inputs is None:
        return [track] * len(sizes)
    ends = np.cumsum(sizes)[:-1].tolist()
    parts = (np.split(x, ends, axis) for x in (track.inputs, track.layers))
    return [
        dataclasses.replace(track, inputs=inputs, layers=layers)
        for inputs, layers in zip(*parts, strict=True)
    ]


def _sliced(track: Track, starts: Sequence[Any], sizes: Shape) -> Track:
    """Returns the track of a slice whose start the program computes: of layers, or of outputs."""
    if track.inputs is None:
        return track
    shape = track.inputs.shape
    cut = [axis for axis, n in enumerate(sizes) if n < shape[axis]]
    if any(varies(track.inputs, axis) for axis in cut):
        return track.lost
    axes = [axis for axis in range(len(shape)) if varies(track.layers, axis)]
    numbers: Array = along(track.layers, axes)
    wanted = [sizes[axis] for axis in axes]
    if axes:
        numbers = jax.lax.dynamic_slice(numbers, [starts[axis] for axis in axes], wanted)
    inputs = track.inputs[tuple(map(slice, sizes))]
    return _numbered(track, inputs, numbers.reshape(-1), axes, sizes)


def _numbered(
    track: Track, inputs: np.ndarray, numbers: Array, axes: Sequence[int], shape: Shape
) -> Track:
    """Returns a track whose layers along some axes are looked up in a table."""
    ones = [n if axis in axes else 1 for axis, n in enumerate(shape)]
    layers = np.broadcast_to(np.arange(len(numbers)).reshape(ones), shape)
    table = track.look_up(numbers)
    return dataclasses.replace(track, inputs=inputs, layers=layers, table=table)


def unstacked(track: Track) -> tuple[Array, Callable[[Array], Track]]:
    """Takes a value apart along its first axis, as a scan does.

    Returns:
        The table of each part, ``(S, K)``, and a function from one to the part's track.
    """
    count, *shape = track.layers.shape
    if track.inputs is None or varies(track.inputs, 0):
        return np.zeros((count, 1), np.int32), lambda _: track.lost
    axes = [axis for axis in range(1, len(shape) + 1) if varies(track.layers, axis)]
    tables = track.look_up(along(track.layers, [0, *axes]).reshape(count, -1))
    inputs, inner = track.inputs[0], [axis - 1 for axis in axes]
    sizes = tuple(shape)

    def part(table: Array) -> Track:
        numbers = np.arange(table.shape[0], dtype=np.int32)
        of_part = dataclasses.replace(track, inputs=inputs, layers=inputs, table=table)
        return _numbered(of_part, inputs, numbers, inner, sizes)

    return tables, part
