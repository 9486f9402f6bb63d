"""Orthonormal bases, functions of the singular values, and order statistics.

All functions take one matrix and are differentiable, also where singular values coincide or
vanish; `jax.vmap` batches them. The numerical rank counts as constant: null directions stay null.
Matrix products are in full precision.

In float64, decompositions go through Gram matrices, which are a few times faster than singular
value decompositions and as exact while the condition number κ is moderate: the error is of the
order of κ² times 1e-16. Each function measures κ, and takes the slower way where it is above 1e4.
In float32, where κ² would cost too much, the slower way is the only one.
"""

from coremerge_jax import pytrees as pytrees
from coremerge_jax.linalg import lapack
from coremerge_jax.linalg.basis import Basis, basis, orthonormal_factors, pad_rows
from coremerge_jax.linalg.definite import inverse_definite
from coremerge_jax.linalg.numerics import (
    accumulate,
    in_loop,
    in_range,
    inverse,
    matmul,
    pytree,
    root,
    rounding,
    roundoff,
)
from coremerge_jax.linalg.order import kth_largest, kth_smallest
from coremerge_jax.linalg.singular import (
    Factored,
    cut_factors,
    flattened,
    isotropic,
    numerical_ranks,
    polar,
    spectral_map,
    truncate,
)

__all__ = [
    "Basis",
    "Factored",
    "accumulate",
    "basis",
    "cut_factors",
    "flattened",
    "in_loop",
    "in_range",
    "inverse",
    "inverse_definite",
    "isotropic",
    "kth_largest",
    "kth_smallest",
    "lapack",
    "matmul",
    "numerical_ranks",
    "orthonormal_factors",
    "pad_rows",
    "polar",
    "pytree",
    "root",
    "rounding",
    "roundoff",
    "spectral_map",
    "truncate",
]
