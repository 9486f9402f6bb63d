"""Core-space merges by singular value decompositions, one after another, in NumPy's float64."""

import dataclasses
import math

import numpy as np
import scipy.linalg

from common import paper

Array = np.ndarray
Factors = list[tuple[Array, Array]]  # A (r, n) and B (m, r) of each task


def in_range(x: Array, rtol: float) -> tuple[Array, Array, Array]:
    """Returns singular triplets ``u (p, k)``, ``s``, ``v (q, k)``; ``s`` above ``rtol * s[0]``."""
    # LAPACK's gesdd, NumPy's, has been seen not to converge on a matrix of deficient rank.
    u, s, vt = scipy.linalg.svd(x, full_matrices=False, lapack_driver="gesvd")
    live = s > rtol * s[0]
    return u[:, live], s[live], vt[live].T


@dataclasses.dataclass(frozen=True)
class Reference:
    """Core-space merges (arXiv 2509.17786, section 4) as equations.

    Attributes:
        eps: of the precision that is to be compared; what is below its rounding errors is zero.
    """

    eps: float

    def merge(self, rule: str, factors: Factors) -> Array:
        """Returns the dense update ``(m, n)``."""
        if rule == "mean":
            return sum(b @ a for a, b in factors) / len(factors)
        a = np.concatenate([a for a, _ in factors])
        b = np.concatenate([b for _, b in factors], axis=1)
        side, rtol = min(len(a), len(b), a.shape[1]), 9 * math.sqrt(len(a)) * self.eps
        u, v = in_range(b, rtol)[0], in_range(a, rtol)[2]
        cores = np.stack([(u.T @ b) @ (a @ v) for a, b in factors])
        merged = {
            "ties": lambda: paper.ties(np, cores, 0),
            "tsv": lambda: self.tsv(cores, side),
            "cart": lambda: self.cart(cores),
            "iso-c": lambda: self.isotropize(cores.sum(axis=0)),
            "tsv+iso-c": lambda: self.isotropize(self.tsv(cores, side)),
        }[rule]()
        return u @ merged @ v.T

    def triplets(self, x: Array) -> tuple[Array, Array, Array]:
        """Returns the nonzero singular triplets."""
        return in_range(x, max(x.shape) * self.eps)

    def polar(self, x: Array) -> Array:
        """Sets nonzero singular values to one."""
        u, _, v = self.triplets(x)
        return u @ v.T

    def isotropize(self, x: Array) -> Array:
        """Sets nonzero singular values to their mean."""
        return self.triplets(x)[1].mean() * self.polar(x)

    def tsv(self, cores: Array, side: int) -> Array:
        """Merges with singular vectors made orthogonal across tasks.

        Args:
            cores: those of all tasks.
            side: of core space before empty directions are dropped, min(m, n, R).
        """
        found = [self.triplets(core) for core in cores]
        if sum(len(s) for _, s, _ in found) > side:
            k = side // len(found)
            found = [(u[:, :k], s[:k], v[:, :k]) for u, s, v in found]
        u, v = (self.polar(np.concatenate([f[i] for f in found], axis=1)) for i in (0, 2))
        return u * np.concatenate([s for _, s, _ in found]) @ v.T

    def cart(self, cores: Array) -> Array:
        """Adds low-rank deviations to the mean."""
        mean, k = cores.mean(axis=0), math.ceil(paper.SHARE * min(cores.shape[1:]))
        parts = [in_range(core - mean, 0) for core in cores]
        return mean + sum((u[:, :k] * s[:k]) @ v[:, :k].T for u, s, v in parts)
