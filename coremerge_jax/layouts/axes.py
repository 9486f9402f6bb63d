"""Axes of two stored factors: the canonical description of a LoRA pair."""

import dataclasses
import math

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
