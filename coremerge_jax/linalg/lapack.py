"""Decompositions of one matrix at a time on CPU, so that they cannot wait for each other.

Some releases of JAX (0.9.2 among them) split a *batched* LAPACK call among the threads of XLA's
pool, and block the calling thread until the others are done. In a busy program the calling thread
is one of the pool itself: then all threads can end up waiting, and the process hangs for ever.
Calls on one matrix run on the calling thread. So `jax.vmap` of the functions here is a loop on
CPU, which is as fast, as LAPACK works through a batch one by one anyway. Elsewhere it is a batched
call.

Programs have many decompositions of equal shapes: the functions are jitted, so that JAX traces each
once for a shape. XLA inlines them all the same.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from coremerge_jax.linalg.threads import use_one_thread

use_one_thread()  # here, so that no program can reach decompositions without it


def _one_by_one_on_cpu(fn: Callable) -> Callable:
    wrapped = jax.custom_batching.custom_vmap(fn)

    @wrapped.def_vmap
    def batched(size: int, in_batched: list, x: Float[Array, "..."]) -> tuple[Any, Any]:
        del size
        if not in_batched[0]:  # only tangents are batched
            out = wrapped(x)
            return out, jax.tree.map(lambda _: False, out)
        out = jax.lax.platform_dependent(
            x, cpu=lambda x: jax.lax.map(wrapped, x), default=jax.vmap(fn)
        )
        return out, jax.tree.map(lambda _: True, out)

    return jax.jit(wrapped)


@_one_by_one_on_cpu
def cholesky(x: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """Returns the lower factor of a symmetric positive definite matrix, NaN if it is not."""
    return jnp.linalg.cholesky(x, symmetrize_input=False)


@_one_by_one_on_cpu
def inverse_lower(x: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """Returns the inverse of a lower triangular matrix."""
    eye = jnp.eye(len(x), dtype=x.dtype)
    return jax.scipy.linalg.solve_triangular(x, eye, lower=True)


@_one_by_one_on_cpu
def eigh(x: Float[Array, "n n"]) -> tuple[Float[Array, " n"], Float[Array, "n n"]]:
    """Returns descending eigenvalues, and eigenvectors in columns, of a symmetric matrix."""

    def decompose(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        values, vectors = jnp.linalg.eigh(x, symmetrize_input=False)
        return values[::-1], vectors[:, ::-1]

    return _of_finite(decompose, x)


@_one_by_one_on_cpu
def svd(
    x: Float[Array, "p q"],
) -> tuple[Float[Array, "p k"], Float[Array, " k"], Float[Array, "q k"]]:
    """Returns ``u (p, k)``, descending ``s (k,)`` and ``v (q, k)``, with ``k = min(p, q)``."""
    u, s, vt = _svd(x, compute_uv=True)
    return u, s, vt.T


@_one_by_one_on_cpu
def triangular(x: Float[Array, "p q"]) -> Float[Array, "k q"]:
    """Returns the upper triangular factor of the QR decomposition of a tall matrix."""
    return jnp.linalg.qr(x, mode="r")


@_one_by_one_on_cpu
def singular_values(x: Float[Array, "p q"]) -> Float[Array, " k"]:
    """Returns the singular values ``(k,)``, descending."""
    return _svd(x, compute_uv=False)


def _svd(x: Float[Array, "p q"], compute_uv: bool) -> Any:
    """Decomposes one matrix.

    LAPACK's divide and conquer does not converge on some finite matrices, and returns NaN. Its QR
    iterations are slower, and do.
    """
    svd = partial(jax.lax.linalg.svd, full_matrices=False, compute_uv=compute_uv)

    def on_cpu(x: jax.Array) -> Any:
        found = svd(x)
        converged = jnp.isfinite(jnp.sum(jax.tree.leaves(found)[0]))
        by_qr = partial(svd, x, algorithm=jax.lax.linalg.SvdAlgorithm.QR)
        return jax.lax.cond(converged, lambda: found, by_qr)

    return _of_finite(lambda x: jax.lax.platform_dependent(x, cpu=on_cpu, default=svd), x)


def _of_finite(decompose: Callable, x: Float[Array, "p q"]) -> Any:
    """Returns the decomposition of a matrix; NaN if it has NaN or infinite entries.

    These are kept from LAPACK, which prints complaints, gives up or returns some zeros.
    """
    finite = jnp.all(jnp.isfinite(x))
    found = decompose(jnp.where(finite, x, 0))
    return jax.tree.map(lambda part: jnp.where(finite, part, jnp.nan), found)
