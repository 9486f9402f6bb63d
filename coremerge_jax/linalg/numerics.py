"""Common parts of numerical programs: products, roundoff, safe functions, loops, fallbacks."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

_Class = TypeVar("_Class", bound=type)

matmul = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

# Up to this condition number, what a Gram matrix in float64 loses is below 1e-8.
GRAM_CONDITION = 1e4

# Up to this size, decompositions of the matrix itself are about as fast.
GRAM_SIZE = 64


def pytree(cls: _Class) -> _Class:
    """Registers a frozen dataclass as a pytree.

    All fields are children, but for those with ``metadata={"static": True}``.
    """
    # Checks of types at run time would refuse what JAX puts in the place of arrays when it maps
    # over axes, or compares structures.
    cls.__no_type_check__ = True  # type: ignore[attr-defined]  # typing.no_type_check sets it too
    return jax.tree_util.register_dataclass(cls)


def in_range(s: Float[Array, "*k"], rtol: ArrayLike) -> Bool[Array, "*k"]:
    """Marks the singular values ``s`` that are above ``rtol`` times the largest."""
    return s > rtol * jnp.max(s)


def roundoff(x: Float[Array, "*T p q"]) -> float:
    """Returns the relative size below which a singular value of ``x`` is rounding noise.

    The usual ``max(p, q) * eps``, as in `numpy.linalg.matrix_rank`.
    """
    return max(x.shape[-2:]) * float(jnp.finfo(x.dtype).eps)


def rounding(x: Float[Array, "p q"]) -> Float[Array, ""]:
    """Returns the size below which a singular value of ``x - y`` is noise, for any part y of x."""
    least = 64 * float(jnp.finfo(x.dtype).eps)  # parts of small matrices are less exact
    return max(roundoff(x), least) * jnp.linalg.norm(jax.lax.stop_gradient(x))


# The inner `where` of these two keeps zeros out of the function: its derivative there is infinite
# or NaN, and would stay so when the outer one multiplies it by zero.
def inverse(s: Float[Array, "*k"], cutoff: ArrayLike = 0) -> Float[Array, "*k"]:
    """Returns ``1 / s`` where ``s`` is above the cutoff, else 0; with derivative 0 there."""
    return jnp.where(s > cutoff, 1 / jnp.where(s > cutoff, s, 1), 0)


def root(s: Float[Array, "*k"]) -> Float[Array, "*k"]:
    """Returns ``sqrt(s)`` where ``s`` is positive, else 0; with derivative 0 there."""
    return jnp.where(s > 0, jnp.sqrt(jnp.where(s > 0, s, 1)), 0)


def complement(q: Float[Array, "m p"], x: Float[Array, "m k"]) -> Float[Array, "m k"]:
    """Returns the part of ``x`` orthogonal to the columns of ``q``."""
    return x - matmul(q, matmul(q.T, x))


def gram_pays(x: Float[Array, "p q"]) -> bool:
    """Returns True if a Gram matrix of ``x`` can be precise enough, and saves time."""
    return x.dtype == jnp.float64 and max(x.shape) > GRAM_SIZE


def in_loop(fn: Callable) -> Callable:
    """Returns the function as the body of a loop (`jax.lax.scan`) that is differentiated twice.

    Loops of JAX 0.9 forget custom derivatives once they are differentiated backwards, and then
    differentiate decompositions. Nothing is forgotten of what a checkpoint holds: this has one for
    each derivative, and they keep all that the function computes.
    """
    keep = partial(
        jax.checkpoint, policy=jax.checkpoint_policies.everything_saveable, prevent_cse=False
    )
    return keep(keep(fn))


def accumulate(fn: Callable, *rows: Any, combine: Callable = jnp.add) -> Any:
    """Sums ``fn(*row)`` over the rows of arrays in a loop, which holds one result at a time.

    Args:
        fn: maps one row of each of ``rows`` to arrays.
        *rows: pytrees of arrays with equal leading axes.
        combine: adds one result to the total, which starts from zeros.
    """

    def step(total: Any, row: tuple) -> tuple[Any, None]:
        return jax.tree.map(combine, total, fn(*row)), None

    shapes = jax.eval_shape(fn, *jax.tree.map(lambda x: x[0], rows))
    return jax.lax.scan(in_loop(step), jax.tree.map(jnp.zeros_like, shapes), rows)[0]


def fast_or_robust(fast: Callable, robust: Callable) -> Callable:
    """Returns a function of arrays: ``fast``, or ``robust`` where the fast result is not exact.

    Under `jax.vmap`, ``robust`` runs only if some matrix of the whole batch needs it. A plain
    `jax.lax.cond` would become a `select` there, which computes both for every matrix.

    Args:
        fast: returns a result, and True if it is exact.
        robust: returns a result of the same structure.
    """

    @jax.custom_batching.custom_vmap
    def chosen(*args: Any) -> Any:
        result, exact = fast(*args)

        def pick(x: Array, y: Array) -> Array:
            return jnp.where(exact.reshape(exact.shape + (1,) * (x.ndim - exact.ndim)), x, y)

        # Both ways by `pick`, so that under `jax.shard_map` both differ by device.
        return jax.lax.cond(
            jnp.all(exact),
            lambda: jax.tree.map(pick, result, result),
            lambda: jax.tree.map(pick, result, robust(*args)),
        )

    @chosen.def_vmap
    def batched(size: int, in_batched: list, *args: Any) -> tuple[Any, Any]:
        result = fast_or_robust(jax.vmap(fast), jax.vmap(robust))(*_repeat(size, in_batched, args))
        return result, jax.tree.map(lambda _: True, result)

    return chosen


def _repeat(size: int, in_batched: Any, args: Any) -> Any:
    """Repeats arguments without a batch axis, for the rules of `custom_vmap`."""

    def one(x: Array, is_batched: bool) -> Array:
        return x if is_batched else jnp.broadcast_to(x, (size, *x.shape))

    return jax.tree.map(one, args, tuple(in_batched))
