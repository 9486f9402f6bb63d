"""LoHa and LoKr as low-rank updates: the algebra, on shapes and on NumPy arrays.

A LoHa update is an entrywise (Hadamard) product of two matrices, and a LoKr update a Kronecker
product; each matrix is whole, or a product of two factors, or (of a convolution) of two factors
and a core. All of them are products ``B A`` of a rank that shapes alone tell: nothing is cut.

Names and shapes are those of LyCORIS (``lycoris/modules/loha.py`` and ``lokr.py``), which peft and
ComfyUI share. Scales are left out here; `Size.divisor` is what alpha is divided by.
"""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from coremerge_jax.errors import FormatError

Shape = tuple[int, ...]
Factors = tuple[np.ndarray, np.ndarray]

_LOHA = ("hada_w1", "hada_w2")
_LOKR = ("lokr_w1", "lokr_w2")
_CORES = {"hada_w1": "hada_t1", "hada_w2": "hada_t2", "lokr_w1": "", "lokr_w2": "lokr_t2"}

# Values of a factor. Above those of any layer; a Kronecker product of small files may have more.
_LARGEST = 2**31

PARTS = frozenset(
    [f"{matrix}{end}" for matrix in (*_LOHA, *_LOKR) for end in ("_a", "_b")]
    + [*_LOKR, *filter(None, _CORES.values())]
)


class Size(NamedTuple):
    """Sizes of an update, as far as the shapes of its parts tell them.

    Attributes:
        rank: rank r of the factors: B has the shape (m, r), A the shape (r, n).
        m: outputs.
        n: inputs, times the size of the kernel for a convolution.
        kernel: ``(inputs, height, width)`` of a convolution whose parts show it, else ().
        divisor: the rank that alpha is divided by; None if both matrices of a LoKr are whole,
            where alpha counts for nothing in LyCORIS and ComfyUI (in peft, it does).
    """

    rank: int
    m: int
    n: int
    kernel: Shape
    divisor: int | None


class _Matrix(NamedTuple):
    """Sizes of one of the two matrices: ``(m, n * area)``, as a product of an inner size."""

    m: int
    n: int
    window: Shape
    inner: int | None

    @property
    def columns(self) -> int:
        return self.n * math.prod(self.window)

    @property
    def rank(self) -> int:
        """The rank that shapes allow: of a whole matrix, its smaller side."""
        side = min(self.m, self.columns)
        return side if self.inner is None else min(self.inner, side)


def method(names: Iterable[str]) -> str | None:
    """Returns ``"LoHa"`` or ``"LoKr"``, the method that names of parts belong to; else None."""
    names = set(names)
    if not names or names - PARTS:
        return None
    methods = {"LoHa" if name.startswith("hada") else "LoKr" for name in names}
    return methods.pop() if len(methods) == 1 else None


def size(shapes: Mapping[str, Shape]) -> Size:
    """Returns the sizes of an update, from the shapes of its parts by name.

    Raises:
        FormatError: a part is missing, or the shapes do not fit each other. The message does not
            say which module it is about.
    """
    found = _size(shapes)
    if found.rank * max(found.m, found.n) > _LARGEST:
        raise FormatError(
            f"is a product of rank {found.rank} and shape ({found.m}, {found.n}), which no layer "
            "of a model has"
        )
    return found


def _size(shapes: Mapping[str, Shape]) -> Size:
    if method(shapes) == "LoHa":
        first, second = (_measure(shapes, matrix) for matrix in _LOHA)
        if (first.m, first.columns) != (second.m, second.columns):
            raise _misfit(shapes)
        rank = min((first.inner or 0) * (second.inner or 0), first.m, first.columns)
        return Size(rank, first.m, first.columns, _kernel(first.n, first.window), second.inner)
    first, second = (_measure(shapes, matrix) for matrix in _LOKR)
    return Size(
        rank=first.rank * second.rank,
        m=first.m * second.m,
        n=first.columns * second.columns,
        kernel=_kernel(first.n * second.n, second.window),
        divisor=second.inner or first.inner,
    )


def factors(parts: Mapping[str, np.ndarray]) -> Factors:
    """Returns A ``(r, n)`` and B ``(m, r)`` in float64, from the parts by name.

    The parts are those that `size` accepts; r, m and n are what it returns. Overflow gives values
    that are not finite, for the caller to refuse.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        parts = {name: value.astype(np.float64) for name, value in parts.items()}
        if method(parts) == "LoHa":
            return _hadamard(*(_product(parts, matrix) for matrix in _LOHA))
        (a1, b1), (a2, b2) = (_shortest(*_product(parts, matrix)) for matrix in _LOKR)
        # (B₁ A₁) ⊗ (B₂ A₂) = (B₁ ⊗ B₂) (A₁ ⊗ A₂)
        return np.kron(a1, a2), np.kron(b1, b2)


def named_factors(names: tuple[str, ...], *tensors: np.ndarray) -> Factors:
    """Returns `factors` of the parts with these names."""
    return factors(dict(zip(names, tensors, strict=True)))


def _hadamard(first: Factors, second: Factors) -> Factors:
    """Returns factors of an entrywise product: products of all pairs of rows, and of columns."""
    (a1, b1), (a2, b2) = first, second
    if len(a1) * len(a2) > min(len(b1), a1.shape[1]):
        return _whole((b1 @ a1) * (b2 @ a2))
    a = a1[:, None, :] * a2[None, :, :]
    b = b1[:, :, None] * b2[:, None, :]
    return a.reshape(-1, a1.shape[1]), b.reshape(len(b1), -1)


def _shortest(a: np.ndarray, b: np.ndarray) -> Factors:
    """Returns the factors, or those of their product if they are longer than its sides."""
    return _whole(b @ a) if len(a) > min(len(b), a.shape[1]) else (a, b)


def _whole(matrix: np.ndarray) -> Factors:
    """Returns factors of a whole matrix: itself, and an identity on its smaller side."""
    m, n = matrix.shape
    return (matrix, np.eye(m)) if m <= n else (np.eye(n), matrix)


def _product(parts: Mapping[str, np.ndarray], name: str) -> Factors:
    """Returns A and B of one matrix; convolutions are flat."""
    if name in parts:
        return _whole(parts[name].reshape(len(parts[name]), -1))
    up, down = parts[f"{name}_a"], parts[f"{name}_b"]
    core = parts.get(_CORES[name])
    if core is None:
        return down.reshape(len(down), -1), up
    # W[p, q, ...] = Σᵢ up[i, p] Σⱼ core[i, j, ...] down[j, q]
    inner = np.einsum("ij...,jq->iq...", core, down)
    return inner.reshape(len(inner), -1), up.T


def _measure(shapes: Mapping[str, Shape], name: str) -> _Matrix:
    """Returns the sizes of one matrix.

    Raises:
        FormatError: a part is missing, empty, or does not fit.
    """
    names = {part for part in shapes if part in (name, f"{name}_a", f"{name}_b", _CORES[name])}
    if name in names:
        whole = shapes[name]
        if names == {name} and len(whole) >= 2 and 0 not in whole:
            return _Matrix(whole[0], whole[1], whole[2:], None)
        raise _misfit(shapes)
    if not {f"{name}_a", f"{name}_b"} <= names:
        raise FormatError(
            f"has {' and '.join(sorted(shapes))} only; expected {name}_a and {name}_b"
            + (f", or {name}" if name in _LOKR else "")
        )
    up, down = shapes[f"{name}_a"], shapes[f"{name}_b"]
    core = shapes.get(_CORES[name])
    if (
        core is not None
        and len(up) == len(down) == 2
        and core[:2] == (up[0], up[0]) == (down[0],) * 2
    ):
        found = _Matrix(up[1], down[1], core[2:], up[0])
    elif core is None and len(up) == 2 and len(down) >= 2 and up[1] == down[0]:
        found = _Matrix(up[0], down[1], down[2:], up[1])
    else:
        raise _misfit(shapes)
    if 0 in (found.m, found.columns, found.inner):
        raise _misfit(shapes)
    return found


def _kernel(inputs: int, window: Shape) -> Shape:
    if window and len(window) != 2:
        raise FormatError(
            f"is a convolution over {len(window)} axes; only linear layers and two-dimensional "
            "convolutions are supported"
        )
    return (inputs, *window) if window else ()


def _misfit(shapes: Mapping[str, Shape]) -> FormatError:
    listed = ", ".join(f"{name} {shape}" for name, shape in sorted(shapes.items()))
    return FormatError(f"has parts of shapes that do not fit each other: {listed}")
