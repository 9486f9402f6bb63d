"""Distances of two updates, and the distances that rounding explains.

On the host, in float64. No update is formed: updates are small matrices in orthonormal bases of
all their columns and rows. (From Gram matrices alone, a distance would have half the digits.)
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from coremerge_jax.lora import Array, LoRA, product_norm

# Narrower dtypes that values of a dtype may have gone through unnoticed, the coarsest first.
_NARROWER = {"float32": ("bfloat16", "float16"), "float16": ("bfloat16",)}

_EPS = float(np.finfo(np.float64).eps)


@dataclasses.dataclass(frozen=True)
class Expected:
    """Expected update of a module of a merge.

    Attributes:
        whole: the result of the rule.
        cut: the same, cut to a rank or a share of its energy; ``whole`` itself if nothing is cut.
    """

    whole: LoRA
    cut: LoRA

    @property
    def is_cut(self) -> bool:
        """True if the update was cut."""
        return self.cut is not self.whole


@dataclasses.dataclass(frozen=True)
class Distance:
    """Distance of a found update F from an expected one E, in Frobenius norms.

    Attributes:
        norm: ‖F‖.
        expected: ‖E‖.
        error: ‖F - E‖. If E was cut to a rank, the distance to the nearest of the best cuts, of
            which there are several where singular values coincide.
        factor: the number c for which F may be c E.
        residual: ‖F - c E‖, like ``error``.
    """

    norm: float
    expected: float
    error: float
    factor: float
    residual: float

    @property
    def size(self) -> float:
        """The norm that errors are relative to: ‖E‖, or ‖F‖ if E is zero."""
        return self.expected or self.norm or 1.0

    @property
    def relative(self) -> float:
        """The error, relative to the size."""
        return self.error / self.size


def distance(found: LoRA, expected: Expected) -> Distance:
    """Returns the distance of a module from its expected update."""
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
    """Returns updates of a module as small matrices, in orthonormal bases that hold all of them."""
    ranks = np.cumsum([lora.rank for lora in loras])[:-1]
    b = np.linalg.qr(np.concatenate([wide(lora.b) for lora in loras], axis=1), mode="r")
    a = np.linalg.qr(np.concatenate([wide(lora.a) for lora in loras], axis=0).T, mode="r")
    pairs = zip(np.split(b, ranks, axis=1), np.split(a, ranks, axis=1), strict=True)
    return [left @ right.T for left, right in pairs]


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """Largest errors that rounding explains, as norms.

    Attributes:
        found: the part from rounding the found update.
        expected: the part from rounding the expected one, in both merges.
    """

    found: float
    expected: float

    def at(self, factor: float = 1.0) -> float:
        """Returns the tolerance of a distance from a multiple of the expected update."""
        return self.found + abs(factor) * self.expected

    def fits(self, apart: Distance) -> bool:
        """Returns True if an update is a multiple of the expected one."""
        return apart.residual <= self.at(apart.factor)


def tolerance(found: LoRA, expected: Expected, dtype: str, noise: float = 0.0) -> Tolerance:
    """Returns a bound of ``error`` for a merge that is right.

    The factors of the file were rounded to its dtype. Before, both merges rounded their factors to
    the dtype of merges (float32, for files).

    Args:
        found: the module.
        expected: its expected update.
        dtype: dtype of the file.
        noise: largest change by rounding inside the merge, as a norm.
    """
    whole, cut = expected.whole, expected.cut
    bound = negligible(whole) + noise
    if expected.is_cut:  # then the error is known from a difference of squares
        bound += negligible(cut) + 4 * _EPS**0.5 * norm(whole)
    lost = (rounding_loss(cut, dtype) or 0.0) * norm(cut)
    return Tolerance(min(roundoff(found, dtype), max(4 * spread(found, dtype), 2 * lost)), bound)


def negligible(lora: LoRA) -> float:
    """Returns the norm up to which an update may be rounding noise of two merges."""
    return 2 * roundoff(lora, coarser("float32", str(lora.dtype)))


def roundoff(lora: LoRA, dtype: str, *, underflow: bool = True) -> float:
    """Returns a bound of the change by rounding the factors to a dtype, as a norm.

    An entry x moves by at most u max(|x|, t), u the unit roundoff and t the smallest normal number.
    So ΔW moves by at most 2 u |B||A| in each entry (and u² of it, which (1 + 2 u) covers).

    Args:
        lora: the update.
        dtype: dtype that its factors are rounded to.
        underflow: True if entries may be below t.
    """
    twice = float(jnp.finfo(dtype).eps)
    return twice * (1 + twice) * product_norm(*_sizes(lora, dtype if underflow else None))


def spread(lora: LoRA, dtype: str) -> float:
    """Estimates the change by rounding the factors to a dtype, as a norm.

    The errors of entries x are taken as uniform up to u |x| and independent: squares add up.
    """
    b, a = _sizes(lora, dtype)
    squares = np.sum(np.sum(b**2, axis=0) * np.sum(a**2, axis=1))
    return float(jnp.finfo(dtype).eps) / 2 * float(2 / 3 * squares) ** 0.5


def _sizes(lora: LoRA, dtype: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Returns |B| and |A|, with the smallest normal number of a dtype as least magnitude."""
    tiny = float(jnp.finfo(dtype).tiny) if dtype else 0.0
    return np.maximum(np.abs(wide(lora.b)), tiny), np.maximum(np.abs(wide(lora.a)), tiny)


def coarser(*dtypes: str) -> str:
    """Returns the dtype with the fewest digits."""
    return max(dtypes, key=lambda dtype: float(jnp.finfo(dtype).eps))


def rounding_loss(lora: LoRA, dtype: str) -> float | None:
    """Returns ‖ΔW' - ΔW‖ / ‖ΔW‖ for factors rounded to a dtype; None if they overflow."""
    b, a = wide(lora.b), wide(lora.a)
    new_b, new_a = _rounded(b, dtype), _rounded(a, dtype)
    if not (np.isfinite(new_b).all() and np.isfinite(new_a).all()):
        return None
    # B'A' - BA, as a product whose terms are as small as it is.
    change = product_norm(np.hstack([new_b - b, new_b]), np.vstack([a, new_a - a]))
    size = product_norm(b, a)
    return change / size if size else 0.0


def went_through(found: LoRA, expected: LoRA, dtype: str) -> str | None:
    """Returns a narrower dtype that a factor was rounded to, and its expected values were not."""
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
    """Returns the number of rank-one terms that are not zero."""
    used = np.any(np.asarray(lora.b) != 0, axis=0) & np.any(np.asarray(lora.a) != 0, axis=1)
    return int(used.sum())


def norm(lora: LoRA) -> float:
    """Returns ‖ΔW‖."""
    return product_norm(wide(lora.b), wide(lora.a))


def wide(x: Array) -> np.ndarray:
    """Returns an array on the host, in float64."""
    return np.asarray(x).astype(np.float64)


def _inner(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.vdot(x, y))
