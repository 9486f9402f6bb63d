"""The paper's equations, one module at a time, in any array library.

``xp`` is `numpy`, `torch` or `jax.numpy`. Definitions are those of the docstrings in
`coremerge_jax.rules` and `coremerge_jax.spaces`, for factors in general position: no rank is
determined, as none is deficient.
"""

import math
from collections.abc import Callable
from typing import Any

Array = Any  # of the library `xp`

DENSITY = 0.2  # of TIES
SHARE = 0.08  # of CART: the rank as a share of the space's


def svd(xp: Any, x: Array) -> tuple[Array, Array, Array]:
    """Returns thin singular value decompositions, over leading axes."""
    return xp.linalg.svd(x, full_matrices=False)


def polar(xp: Any, x: Array) -> Array:
    """Returns the nearest matrix with orthonormal rows or columns."""
    u, _, vh = svd(xp, x)
    return u @ vh


def total(xp: Any, cores: Array, rank: int) -> Array:
    """Adds the cores: task arithmetic."""
    del rank
    return xp.sum(cores, axis=0)


def ties(xp: Any, cores: Array, rank: int) -> Array:
    """Trims, elects signs, averages the entries that agree."""
    del rank
    magnitude = abs(cores)
    flat = magnitude.reshape(len(cores), -1)
    k = flat.shape[1] - int(flat.shape[1] * DENSITY)
    if hasattr(xp, "kthvalue"):
        threshold = xp.kthvalue(flat, k, dim=1).values
    else:
        threshold = xp.sort(flat, axis=1)[:, k - 1]
    kept = xp.where(magnitude >= threshold[:, None, None], cores, 0.0)
    agree = kept * xp.sign(xp.sum(kept, axis=0))[None] > 0
    count = xp.sum(xp.where(agree, 1.0, 0.0), axis=0)
    return xp.sum(xp.where(agree, kept, 0.0), axis=0) / xp.where(count > 0, count, 1.0)


def tsv(xp: Any, cores: Array, rank: int) -> Array:
    """Merges with singular vectors made orthogonal across tasks."""
    tasks, p, q = cores.shape
    k = rank if tasks * rank <= min(p, q) else min(p, q) // tasks
    u, s, vh = svd(xp, cores)
    left = polar(xp, xp.moveaxis(u[:, :, :k], 0, 1).reshape(p, -1))
    right = polar(xp, vh[:, :k].reshape(-1, q))
    return (left * s[:, :k].reshape(1, -1)) @ right


def cart(xp: Any, cores: Array, rank: int) -> Array:
    """Adds low-rank deviations to the mean."""
    del rank
    k = math.ceil(SHARE * min(cores.shape[1:]))
    mean = xp.mean(cores, axis=0)
    u, s, vh = svd(xp, cores - mean[None])
    return mean + xp.sum((u[:, :, :k] * s[:, None, :k]) @ vh[:, :k], axis=0)


def isotropize(xp: Any, merged: Array) -> Array:
    """Makes singular values equal."""
    u, s, vh = svd(xp, merged)
    return xp.mean(s) * (u @ vh)


def keep(xp: Any, merged: Array) -> Array:
    """Leaves the merge unchanged."""
    del xp
    return merged


# The rule that merges, and the step after the merge.
RULES: dict[str, tuple[Callable, Callable]] = {
    "ta": (total, keep),
    "ties": (ties, keep),
    "tsv": (tsv, keep),
    "cart": (cart, keep),
    "iso-c": (total, isotropize),
    "tsv+iso-c": (tsv, isotropize),
}

RULE_TITLES = {
    "ta": "TA",
    "ties": "TIES",
    "tsv": "TSV",
    "cart": "CART",
    "iso-c": "Iso-C",
    "tsv+iso-c": "TSV + Iso-C",
}


def core(xp: Any, rule: str, a: Array, b: Array, tasks: int) -> tuple[Array, Array]:
    """Merges in core space (arXiv 2509.17786, section 4).

    Args:
        xp: the array library.
        rule: one of `RULES`.
        a: ``(R, n)``, the A factors below each other.
        b: ``(m, R)``, the B factors side by side.
        tasks: T, with equal ranks.

    Returns:
        Factors ``(d, n)`` and ``(m, d)`` of the merged update.
    """
    merge, finish = RULES[rule]
    u, s_b, vh_b = svd(xp, b)
    u_a, s_a, vh = svd(xp, a)
    left = (s_b[:, None] * vh_b).reshape(len(s_b), tasks, -1)  # Uᵀ B, by task
    right = (u_a * s_a[None, :]).reshape(tasks, -1, len(s_a))  # A V, by task
    cores = xp.moveaxis(left, 1, 0) @ right
    merged = finish(xp, merge(xp, cores, a.shape[0] // tasks))
    return vh, u @ merged


def _updates(xp: Any, a: Array, b: Array, tasks: int) -> Array:
    left = xp.moveaxis(b.reshape(len(b), tasks, -1), 1, 0)
    return left @ a.reshape(tasks, -1, a.shape[1])


def full(xp: Any, rule: str, a: Array, b: Array, tasks: int) -> Array:
    """Merges dense updates, in full space; arguments as for `core`, returns ``(m, n)``."""
    merge, finish = RULES[rule]
    return finish(xp, merge(xp, _updates(xp, a, b, tasks), a.shape[0] // tasks))


def knots(xp: Any, rule: str, a: Array, b: Array, tasks: int) -> Array:
    """Merges the right factors of [ΔW_1 … ΔW_T], in KnOTS space (arXiv 2410.19735).

    As in the core-space paper's code, singular values up to 1e-5 are dropped, and what comes after
    the merge acts on the update.
    """
    merge, finish = RULES[rule]
    updates = xp.moveaxis(_updates(xp, a, b, tasks), 0, 1).reshape(len(b), -1)
    u, s, vh = svd(xp, updates)
    live = int((s > 1e-5).sum())
    parts = xp.moveaxis(vh[:live].reshape(live, tasks, -1), 1, 0)
    merged = merge(xp, parts, a.shape[0] // tasks)
    return finish(xp, (u[:, :live] * s[None, :live]) @ merged)


SPACES: dict[str, Callable] = {"core": core, "full": full, "knots": knots}
