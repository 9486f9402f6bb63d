"""Inverses of symmetric positive definite matrices."""

import jax
from jaxtyping import Array, Float

from coremerge_jax.linalg import lapack
from coremerge_jax.linalg.numerics import matmul


@jax.custom_jvp
def inverse_definite(x: Float[Array, "q q"]) -> Float[Array, "q q"]:
    """Returns the inverse of a symmetric positive definite matrix; NaN if it is not definite."""
    inverted = lapack.inverse_lower(lapack.cholesky(x))
    return matmul(inverted.T, inverted)


@inverse_definite.defjvp
def _inverse_definite_jvp(primals: tuple, tangents: tuple) -> tuple:
    (x,), (dx,) = primals, tangents
    inverted = inverse_definite(x)
    return inverted, -matmul(inverted, matmul(dx, inverted))
