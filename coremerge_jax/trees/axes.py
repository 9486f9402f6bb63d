"""Axes of factors and kernels: which are inputs, outputs, the rank, layers and experts."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np

from coremerge_jax.errors import FormatError, MismatchError
from coremerge_jax.lora import Array
from coremerge_jax.trees.paths import container

Shape = tuple[int, ...]

_Way = TypeVar("_Way")


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
            FormatError: they do not fit.
        """
        for name, letters, shape, others in (("a", self.a, a, "leri"), ("b", self.b, b, "lero")):
            if len(letters) != len(shape) or letters.count("r") != 1 or set(letters) - set(others):
                raise FormatError(
                    f"{module}: axes {letters!r} for {name} of shape {shape}; expected one letter "
                    f"an axis of {', '.join(others)}, with r once"
                )
        batches = [(lengths(x, s, "l"), lengths(x, s, "e")) for x, s in ((self.a, a), (self.b, b))]
        if batches[1] not in (batches[0], ((), ())):
            raise FormatError(
                f"{module}: axes {self.a!r} for a of shape {a} and {self.b!r} for b of shape {b}; "
                "expected equal layers (l) and experts (e) in both, or none in b, which is then "
                "that of all"
            )
        return self

    def rank(self, a: Shape, b: Shape) -> tuple[int, int]:
        """Returns the length of the rank axis in both shapes."""
        return a[self.a.index("r")], b[self.b.index("r")]

    def batch(self, a: Shape) -> Shape:
        """Returns the lengths of the batch axes, layers first."""
        return lengths(self.a, a, "l") + lengths(self.a, a, "e")

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


def lengths(letters: str, shape: Shape, wanted: str) -> Shape:
    """Returns the lengths of the axes that have one of the wanted letters."""
    return tuple(n for n, letter in zip(shape, letters, strict=True) if letter in wanted)


def _order(letters: str, wanted: str) -> list[int]:
    """Sorts axes by the place of their letter in ``wanted``; those of one letter stay in order."""
    return sorted(range(len(letters)), key=lambda axis: wanted.index(letters[axis]))


def _to_matrices(x: Array, letters: str, wanted: str) -> Array:
    layers, experts, *sizes = (math.prod(lengths(letters, x.shape, letter)) for letter in wanted)
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


def find_axes(
    module: str,
    a: Shape,
    b: Shape,
    scan_axis: int | str | None,
    recorded: Collection[int | None] = (),
) -> Axes:
    """Returns the axes of two factors, from their shapes and the path of their module.

    Args:
        module: path, parts joined by ``/``.
        a: shape of the factor of the inputs.
        b: shape of the factor of the outputs.
        scan_axis: 0 or 1, where layers (or experts) are stacked if both factors have more than
            two axes; None for no such axis; ``"auto"`` to find it from the shapes.
        recorded: with ``"auto"``, the values of ``scan_axis`` to prefer where several fit.

    Raises:
        FormatError: the shapes are not those of two factors, or could be so in several ways.
    """
    if isinstance(scan_axis, int) and min(len(a), len(b)) < 3:
        scan_axis = None
    ways = [axes for axes in _axes_of_factors(len(a), len(b)) if _fits((axes.a, axes.b), (a, b))]
    if scan_axis == "auto":
        ways = _narrow(
            ways,
            lambda axes: _layer_axis(axes.a) in recorded,
            lambda axes: _is_likely(module, axes.a),
        )
    else:
        ways = [axes for axes in ways if _layer_axis(axes.a) == scan_axis]
    if len(ways) == 1:
        return ways[0]
    problem = f"{module}: factors of shapes a {a} and b {b}"
    if not ways:
        where = "" if scan_axis == "auto" else f", stacked along axis {scan_axis}"
        raise FormatError(
            f"{problem}: expected (inputs, r) and (r, outputs) of one rank r{where}; "
            "say how they are stored with axes (coremerge convert --axes)"
        )
    shown = " or ".join(f"{axes.a},{axes.b}" for axes in ways)
    raise FormatError(
        f"{problem} can be read in several ways ({shown}: i input, o output, r rank, l stacked "
        "layers, e experts); say which with scan_axis (coremerge convert --scan-axis) or axes "
        "(--axes)"
    )


def find_kernel_axes(
    key: str,
    shape: Shape,
    update: tuple[int, int],
    known: Sequence[Shape],
    scan_axes: Collection[int | None],
    recorded: Collection[int | None] = (),
) -> list[str]:
    """Returns the axes of a kernel: a letter each, i, o or l.

    Args:
        key: of the kernel, for messages.
        shape: of the kernel.
        update: outputs and inputs of each of its modules.
        known: the lengths of the axes of inputs, and of those of outputs; empty if not known.
        scan_axes: where layers can be stacked; None in it if the kernel can have no layers.
        recorded: those of ``scan_axes`` to prefer where several fit.

    Returns:
        No axes if the kernel is not of the size of a stack; two if the axis of layers is not clear.

    Raises:
        MismatchError: no axes are of the size of the inputs.
        FormatError: which axes are the inputs is not clear.
    """
    m, n = update
    at = [
        axis
        for axis in scan_axes
        if axis is None or (axis < len(shape) and shape[axis] * m * n == math.prod(shape))
    ]
    if not at:
        return []
    every = (_kernel_axes(shape, axis) for axis in at)
    ways = [way for way in itertools.chain(*every) if _fits((way,), (shape,), {"o": m, "i": n})]
    if not ways:
        raise misfit(key, shape, update)
    # With several ways of the known lengths (as many heads as inputs) none is likelier.
    sizes = [_wide(x) for x in known]
    ways = (
        [way for way in ways if [_wide(lengths(way, shape, x)) for x in "io"] == sizes]
        or [way for way in ways if _is_inputs_first(way, shape)]
        or ways
    )
    if len({way.replace("l", "") for way in ways}) > 1:
        raise FormatError(
            f"{key}: which axes of kernel {shape} are the {n} inputs is not clear; say which with "
            "axes (--axes), such as 'oio' for heads, inputs, head size"
        )
    return _narrow(ways, lambda way: _layer_axis(way) in recorded)


def misfit(key: str, shape: Shape, update: tuple[int, int]) -> MismatchError:
    """Returns the error for a kernel that is not of the size of an update."""
    return MismatchError(
        f"{key}: kernel {shape} does not fit an update of {update[0]} outputs, {update[1]} inputs; "
        "is it the right base? If so, say what its axes are with axes (--axes)"
    )


def _kernel_axes(shape: Shape, at: int | None) -> Iterator[str]:
    """Yields the ways to read a kernel with layers at an axis; axes of length 1 are outputs."""
    letters = ("l" if i == at else "o" if n == 1 else "io" for i, n in enumerate(shape))
    return map("".join, itertools.product(*letters))


def _wide(sizes: Shape) -> Shape:
    """Returns the lengths that are not 1."""
    return tuple(n for n in sizes if n != 1)


def _is_inputs_first(letters: str, shape: Shape) -> bool:
    found = [x for x, n in zip(letters, shape, strict=True) if x in "io" and n != 1]
    return found == sorted(found)


def _fits(
    ways: Sequence[str], shapes: Sequence[Shape], sizes: Mapping[str, int] | None = None
) -> bool:
    """Returns True if each letter has one size in all arrays that have it, and the given one."""
    found = dict(sizes or {})
    return all(
        found.setdefault(letter, size) == size
        for letters, shape in zip(ways, shapes, strict=True)
        for letter in {*letters, *(sizes or {})}
        for size in [math.prod(lengths(letters, shape, letter))]
    )


def _narrow(ways: list[_Way], *hints: Callable[[_Way], bool]) -> list[_Way]:
    """Keeps the ways that agree with a hint, one hint after another; all of them if none does."""
    for hint in hints:
        ways = [way for way in ways if hint(way)] or ways
    return ways


# Places of batch axes in both factors, and their letters. The last two are scanned layers of
# experts, which libraries put behind each other in either order.
_BATCHES = ((0, ""), (0, "l"), (1, "l"), (0, "le"), (0, "el"))


def _axes_of_factors(a: int, b: int) -> Iterator[Axes]:
    """Yields the ways to read two factors with so many axes."""
    for at, batch in _BATCHES:
        inputs, outputs = (count - 1 - len(batch) for count in (a, b))
        if min(inputs, outputs) > 0:
            first, second = "i" * inputs + "r", "r" + "o" * outputs
            yield Axes(_with_batch(first, at, batch), _with_batch(second, at, batch))


def _with_batch(letters: str, at: int, batch: str) -> str:
    return letters[:at] + batch + letters[at:]


def _layer_axis(letters: str) -> int | None:
    """Returns the axis along which layers are stacked; None if there is none."""
    return letters.index("l") if "l" in letters else None


def _is_likely(module: str, letters: str) -> bool:
    """Returns True if a module's path speaks for a way to read its factors.

    Below layers without numbers, the factors have an axis of layers. Elsewhere, experts come after
    what is stacked before them.
    """
    if container(module) is None:
        return not letters.startswith("el")
    return "l" in letters
