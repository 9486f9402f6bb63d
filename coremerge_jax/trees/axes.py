"""Axes of factors and kernels in trees of parameters."""

import dataclasses
import math
import re
from collections.abc import Collection

import jax.numpy as jnp
import numpy as np

from coremerge_jax.errors import FormatError
from coremerge_jax.lora import Array

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Axes:
    """The axes of the factors of one kernel, a letter each.

    ``i`` is an input of the module (contracted by it), ``o`` an output, ``r`` the rank, and ``l`` a
    batch of kernels that have updates of their own: scanned layers, or else experts, which are
    ``e`` beside ``l``. Several axes of one letter are one index, in the order in which they stand.
    PEFT's linear layers are ``Axes("ri", "or")``, those of most JAX stacks ``Axes("ir", "ro")``.

    Attributes:
        a: of the factor that acts on the inputs.
        b: of the factor that gives the outputs.
    """

    a: str
    b: str

    def checked(self, module: str, a: Shape, b: Shape) -> "Axes":
        """Returns the axes themselves if they fit the shapes of a module's factors.

        Raises:
            FormatError: it does not.
        """
        for name, letters, shape, others in (("a", self.a, a, "leri"), ("b", self.b, b, "lero")):
            if len(letters) != len(shape) or letters.count("r") != 1 or set(letters) - set(others):
                raise FormatError(
                    f"{module}: axes {letters!r} for {name} of shape {shape}; expected one letter "
                    f"an axis of {', '.join(others)}, with r once"
                )
        return self

    def rank(self, a: Shape, b: Shape) -> tuple[int, int]:
        """Returns the length of the rank axis in both shapes."""
        return a[self.a.index("r")], b[self.b.index("r")]

    def batch(self, a: Shape) -> Shape:
        """Returns the lengths of the batch axes, layers first."""
        return tuple(a[axis] for axis in _order(self.a, "leri") if self.a[axis] in "le")

    def matrices(self, a: Array, b: Array) -> tuple[Array, Array]:
        """Turns stored factors into ``(L, r, n)`` and ``(L, m, r)``, with L = 1 without a batch."""
        return _to_matrices(a, self.a, "leri"), _to_matrices(b, self.b, "leor")

    def stored(self, a: Array, b: Array, like_a: Shape, like_b: Shape) -> tuple[Array, Array]:
        """Inverts `matrices`.

        Args:
            a: ``(L, r, n)``.
            b: ``(L, m, r)``.
            like_a: the stored shape of ``a``, of any rank.
            like_b: the stored shape of ``b``, of any rank.
        """
        return (
            _from_matrices(a, self.a, "leri", like_a),
            _from_matrices(b, self.b, "leor", like_b),
        )


def _order(letters: str, wanted: str) -> list[int]:
    """Axes sorted by where their letter is in ``wanted``; those of one letter stay in order."""
    return sorted(range(len(letters)), key=lambda axis: wanted.index(letters[axis]))


def _to_matrices(x: Array, letters: str, wanted: str) -> Array:
    layers, experts, *sizes = (
        math.prod(n for letter, n in zip(letters, x.shape, strict=True) if letter == w)
        for w in wanted
    )
    x = x.transpose(_order(letters, wanted))
    if not set(letters) & set("le"):
        return x.reshape(sizes)[None]  # of typed shardings, JAX can join axes, or add one
    return x.reshape(layers * experts, *sizes)


def _from_matrices(x: Array, letters: str, wanted: str, like: Shape) -> Array:
    order = _order(letters, wanted)
    rank = x.shape[wanted.index("r") - 1]
    sizes = [rank if letters[axis] == "r" else like[axis] for axis in order]
    if not set(letters) & set("le"):
        x = x[0]
    return x.reshape(sizes).transpose(np.argsort(order).tolist())


def pad_rank(x: Array, axis: int, rank: int) -> Array:
    """Pads ``x`` with zeros along ``axis``, up to ``rank``."""
    widths = [(0, rank - n if k == axis % x.ndim else 0) for k, n in enumerate(x.shape)]
    if not any(after for _, after in widths):
        return x
    return np.pad(x, widths) if isinstance(x, np.ndarray) else jnp.pad(x, widths)


# Parts of a path below which layers lie: numbered, or scanned if no number follows. Both may be
# there: MaxText scans over blocks of a few layers (decoder/layers/layers_0).
_CONTAINERS = "(?:[a-z]+_)*(?:layers|blocks)|layer|block|h"

_CONTAINER = re.compile(_CONTAINERS)

_NUMBERED = re.compile(rf"(^|/)({_CONTAINERS})[_/](\d+)(?=/|$)")


def find_axes(
    module: str,
    a: Shape,
    b: Shape,
    batch_axis: int | str | None,
    told: Collection[int | None] = (),
) -> Axes:
    """Returns the axes of two factors, from their shapes and the path of their module.

    Args:
        module: path, parts joined by ``/``.
        a: shape of the factor of the inputs.
        b: shape of the factor of the outputs.
        batch_axis: 0 or 1, where layers (or experts) are stacked if both factors have more than
            two axes; None for no such axis; ``"auto"`` where the shapes show it.
        told: with ``"auto"``, what ``batch_axis`` may be where the shapes fit several ways.

    Raises:
        FormatError: the shapes are not those of two factors, or could be so in several ways.
    """
    if isinstance(batch_axis, int) and min(len(a), len(b)) < 3:
        batch_axis = None
    every = (_axes(a, b, at, batch) for at, batch in _BATCHES)
    fitting = [axes for axes in every if axes and _fit(axes, a, b)]
    if batch_axis != "auto":
        fitting = [axes for axes in fitting if _batch_axis(axes) == batch_axis]
    elif len(fitting) > 1:
        fitting = [axes for axes in fitting if _batch_axis(axes) in told] or fitting
        fitting = _likely(module, fitting)
    if len(fitting) == 1:
        return fitting[0]
    problem = f"{module}: factors of shapes a {a} and b {b}"
    if not fitting:
        where = "" if batch_axis == "auto" else f", stacked along axis {batch_axis}"
        raise FormatError(
            f"{problem}: expected (inputs, r) and (r, outputs) of one rank r{where}; "
            "say how they are stored with axes (coremerge convert --axes)"
        )
    ways = " or ".join(f"{axes.a},{axes.b}" for axes in fitting)
    raise FormatError(
        f"{problem} can be read in several ways ({ways}: i input, o output, r rank, l stacked "
        "layers, e experts); say which with scan_axis (coremerge convert --scan-axis) or axes "
        "(--axes)"
    )


# Where batch axes can be in both factors: at a place, letters. The last two are scanned layers of
# experts, which some libraries put behind each other in either order.
_BATCHES = ((0, ""), (0, "l"), (1, "l"), (0, "le"), (0, "el"))


def _axes(a: Shape, b: Shape, at: int, batch: str) -> Axes | None:
    """Axes with a batch at a place, None if there are too few."""
    inputs, outputs = (len(shape) - 1 - len(batch) for shape in (a, b))
    if min(inputs, outputs) < 1:
        return None
    first, second = "i" * inputs + "r", "r" + "o" * outputs
    return Axes(first[:at] + batch + first[at:], second[:at] + batch + second[at:])


def _batch_axis(axes: Axes) -> int | None:
    """Returns the axis along which layers are stacked; None if there is none."""
    return axes.a.index("l") if "l" in axes.a else None


def _fit(axes: Axes, a: Shape, b: Shape) -> bool:
    rank_a, rank_b = axes.rank(a, b)
    return rank_a == rank_b and all(
        a[axes.a.index(letter)] == b[axes.b.index(letter)] for letter in "le" if letter in axes.a
    )


def _likely(module: str, fitting: list[Axes]) -> list[Axes]:
    """Tells whether a module is stacked: it is below a container of layers without a number."""
    if container(module) is None:
        return [axes for axes in fitting if not axes.a.startswith("el")] or fitting
    return [axes for axes in fitting if "l" in axes.a] or fitting


def is_numbered(module: str) -> bool:
    """Returns True if a path names one layer, as ``layers/0`` or ``layers_0``."""
    return _NUMBERED.search(module) is not None


def separate_numbers(module: str) -> str:
    """Returns a path with ``layers/0`` in place of ``layers_0``."""
    return _NUMBERED.sub(r"\1\2/\3", module)


def container(module: str) -> int | None:
    """Returns the place of the last part below which layers lie that have no numbers in the path.

    It is the place in the path as `separate_numbers` gives it.
    """
    parts = separate_numbers(module).split("/")
    pairs = zip(parts, [*parts[1:], ""], strict=True)
    places = [
        i
        for i, (part, following) in enumerate(pairs)
        if _CONTAINER.fullmatch(part) and not following.isdigit()
    ]
    return places[-1] if places else None
