"""Distances of two updates, and those that rounding explains.

On the host, in float64. No update is formed: all of them are brought into orthonormal bases of
their columns and rows together, where they are small matrices. (From Gram matrices alone, a
distance would have half the digits.)
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from coremerge_jax.lora import Array, LoRA

# What the values of a file may have gone through unnoticed, the coarsest first.
_NARROWER = {"float32": ("bfloat16", "float16"), "float16": ("bfloat16",)}

_EPS = float(np.finfo(np.float64).eps)


@dataclasses.dataclass(frozen=True)
class Expected:
    """Expected update of a module of a merge.

    Attributes:
        whole: what the rule gives, in factors of the dtype that merges have.
        cut: that, cut to a rank or a share of its energy; ``whole`` itself where nothing is cut.
    """

    whole: LoRA
    cut: LoRA

    @property
    def is_cut(self) -> bool:
        """True if something was cut off."""
        return self.cut is not self.whole


@dataclasses.dataclass(frozen=True)
class Distance:
    """Distance of a found update F from an expected one E, in Frobenius norms.

    Attributes:
        norm: of F.
        expected: norm of E.
        error: of F - E. Where E was cut to a rank, the distance to the nearest of the equally good
            cuts, of which there are several where singular values coincide.
        factor: the c for which F may be c E.
        residual: of F - c E, like ``error``.
    """

    norm: float
    expected: float
    error: float
    factor: float
    residual: float

    @property
    def size(self) -> float:
        """The norm that others are relative to: that of E, or of F where there is no E."""
        return self.expected or self.norm or 1.0

    @property
    def relative(self) -> float:
        """The error, relative to the size."""
        return self.error / self.size


def distance(found: LoRA, expected: Expected) -> Distance:
    """Returns the distance of a module from what it should be."""
    loras = (found, expected.whole) + (expected.cut,) * expected.is_cut
    f, whole, *rest = cores(*loras)
    cut = rest[0] if rest else whole

    def off(x: np.ndarray) -> float:
        """Returns ‖x - whole‖² - ‖cut - whole‖², without cancellation where x is near the cut."""
        rest = x - cut
        return abs(_inner(rest, rest) - 2 * _inner(rest, whole - cut)) ** 0.5

    size, along = _inner(f, f) ** 0.5, _inner(f, whole)
    factor = size**2 / along if along else 0.0
    residual = abs(factor) * off(f / factor) if factor else size
    return Distance(size, _inner(cut, cut) ** 0.5, off(f), factor, residual)


def cores(*loras: LoRA) -> list[np.ndarray]:
    """Returns a module's updates in orthonormal bases that hold all of them: small matrices."""
    ranks = np.cumsum([lora.rank for lora in loras])[:-1]
    b = np.linalg.qr(np.concatenate([wide(lora.b) for lora in loras], axis=1), mode="r")
    a = np.linalg.qr(np.concatenate([wide(lora.a) for lora in loras], axis=0).T, mode="r")
    pairs = zip(np.split(b, ranks, axis=1), np.split(a, ranks, axis=1), strict=True)
    return [left @ right.T for left, right in pairs]


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """Errors that rounding explains, as norms.

    Attributes:
        found: by rounding of what was found.
        expected: by that of what was expected, then and now.
    """

    found: float
    expected: float

    def at(self, factor: float = 1.0) -> float:
        """Returns the tolerance of a distance from a multiple of what was expected."""
        return self.found + abs(factor) * self.expected

    def fits(self, apart: Distance) -> bool:
        """Returns True if an update is a multiple of what was expected."""
        return apart.residual <= self.at(apart.factor)


def tolerance(found: LoRA, expected: Expected, dtype: str, noise: float = 0.0) -> Tolerance:
    """Returns a bound of ``error`` for a merge that is right.

    The factors of the file have been rounded to its dtype. Those of the merge were, before, to what
    merges have (float32, for files), and so are those that it is compared with.

    Args:
        found: the module.
        expected: what it should be.
        dtype: of the file.
        noise: what rounding inside the merge changes, as a norm.
    """
    whole, cut = expected.whole, expected.cut
    bound = negligible(whole) + noise
    if expected.is_cut:  # and the error is known from a difference of squares
        bound += negligible(cut) + 4 * _EPS**0.5 * norm(whole)
    lost = (rounding_loss(cut, dtype) or 0.0) * norm(cut)
    return Tolerance(min(roundoff(found, dtype), max(4 * spread(found, dtype), 2 * lost)), bound)


def negligible(lora: LoRA) -> float:
    """Returns the norm below which an update is rounding noise of two merges."""
    return 2 * roundoff(lora, coarser("float32", str(lora.dtype)))


def roundoff(lora: LoRA, dtype: str, *, underflow: bool = True) -> float:
    """Returns the most that rounding the factors to a dtype changes the update by, as a norm.

    An entry x moves by at most u max(|x|, t), u the unit roundoff and t the smallest normal number.
    So ΔW moves by at most 2 u |B||A| in each entry (and u² of it, which (1 + 2 u) covers).

    Args:
        lora: the update.
        dtype: what its factors are rounded to.
        underflow: whether some may be below t.
    """
    twice = float(jnp.finfo(dtype).eps)
    return twice * (1 + twice) * _product_norm(*_sizes(lora, dtype if underflow else None))


def spread(lora: LoRA, dtype: str) -> float:
    """Estimates by how much rounding the factors to a dtype changes the update, as a norm.

    Errors of entries x are then spread evenly up to u |x|, and independent: squares add up.
    """
    b, a = _sizes(lora, dtype)
    squares = np.sum(np.sum(b**2, axis=0) * np.sum(a**2, axis=1))
    return float(jnp.finfo(dtype).eps) / 2 * float(2 / 3 * squares) ** 0.5


def _sizes(lora: LoRA, dtype: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Magnitudes of B and A, at least those of normal numbers."""
    tiny = float(jnp.finfo(dtype).tiny) if dtype else 0.0
    return np.maximum(np.abs(wide(lora.b)), tiny), np.maximum(np.abs(wide(lora.a)), tiny)


def coarser(*dtypes: str) -> str:
    """Returns the dtype with the fewest digits."""
    return max(dtypes, key=lambda dtype: float(jnp.finfo(dtype).eps))


def rounding_loss(lora: LoRA, dtype: str) -> float | None:
    """Returns ‖ΔW' - ΔW‖ / ‖ΔW‖ for factors rounded to a dtype; None where it cannot hold them."""
    b, a = wide(lora.b), wide(lora.a)
    new_b, new_a = _rounded(b, dtype), _rounded(a, dtype)
    if not (np.isfinite(new_b).all() and np.isfinite(new_a).all()):
        return None
    # B'A' - BA, as a product whose terms are as small as it is.
    change = _product_norm(np.hstack([new_b - b, new_b]), np.vstack([a, new_a - a]))
    size = _product_norm(b, a)
    return change / size if size else 0.0


def went_through(found: LoRA, expected: LoRA, dtype: str) -> str | None:
    """Returns a narrower dtype that holds all values of a factor, not those expected, or None."""
    for narrower in _NARROWER.get(dtype, ()):
        for x, y in ((found.a, expected.a), (found.b, expected.b)):
            if _holds(narrower, wide(x)) and not _holds(narrower, _rounded(wide(y), dtype)):
                return narrower
    return None


def _holds(dtype: str, x: np.ndarray) -> bool:
    return np.array_equal(x, _rounded(x, dtype))


def _rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        return x.astype(jnp.dtype(dtype)).astype(np.float64)


def directions(lora: LoRA) -> int:
    """Counts the columns of B and rows of A that are not zero."""
    used = np.any(np.asarray(lora.b) != 0, axis=0) & np.any(np.asarray(lora.a) != 0, axis=1)
    return int(used.sum())


def norm(lora: LoRA) -> float:
    """Returns ‖ΔW‖."""
    return _product_norm(wide(lora.b), wide(lora.a))


def _product_norm(b: np.ndarray, a: np.ndarray) -> float:
    """Returns ‖b a‖ from Gram matrices: to half the digits where terms cancel, else to all."""
    return float(np.sqrt(max(np.sum((b.T @ b) * (a @ a.T)), 0.0)))


def wide(x: Array) -> np.ndarray:
    """Brings an array to the host, in float64."""
    return np.asarray(x).astype(np.float64)


def _inner(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.vdot(x, y))
