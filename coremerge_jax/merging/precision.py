"""Precision of computations, without touching JAX's global x64 switch."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from coremerge_jax.errors import RecipeError
from coremerge_jax.lora import Array, widest


@contextlib.contextmanager
def computing(precision: str | None, *inputs: Array) -> Iterator[np.dtype]:
    """Enters a scope with JAX's x64 mode as the precision needs it, and yields the dtype.

    Unless inputs are traced, the scope also lifts `jax.transfer_guard`, which guards against
    accidental transfers: here arrays are moved to the devices on purpose. Inside of a user's `jit`,
    what is not traced is computed at once, as outside.

    Args:
        precision: ``"float32"``, ``"float64"``, or None: float64, except on TPU and for traced
            inputs, which keep their own precision (at least float32).
        *inputs: arrays that take part in the computation.

    Raises:
        RecipeError: the precision has another name, or is not available for traced inputs.
    """
    traced = are_traced(inputs)
    if precision not in (None, "float32", "float64"):
        raise RecipeError(f"precision={precision!r}: expected 'float32', 'float64' or None")
    if traced and precision == "float64" and not is_available(np.dtype(np.float64)):
        raise RecipeError(
            "precision='float64' with traced factors needs JAX's x64 mode; "
            "enable it around the traced function, or leave precision unset"
        )
    if traced and precision is None:
        numbers = (x.dtype for x in inputs if jnp.issubdtype(x.dtype, jnp.floating))
        yield widest(np.dtype(np.float32), *numbers)
        return
    if precision is None:
        precision = "float32" if jax.default_backend() == "tpu" else "float64"
    wide = jax.enable_x64(True) if precision == "float64" else contextlib.nullcontext()
    with contextlib.ExitStack() as stack:
        stack.enter_context(wide)
        if not traced:
            stack.enter_context(jax.transfer_guard("allow"))
            if _is_tracing():
                stack.enter_context(jax.ensure_compile_time_eval())
        yield np.dtype(precision)


def are_traced(values: Any) -> bool:
    """Returns True if any leaf of a pytree is traced."""
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(values))


def is_available(dtype: np.dtype) -> bool:
    """Returns False for float64 outside of JAX's x64 mode."""
    return jax.dtypes.canonicalize_dtype(dtype) == dtype


def _is_tracing() -> bool:
    """Returns True inside of a function that JAX traces, where each operation gives a tracer."""
    return isinstance(jax.device_put(np.int8(0)), jax.core.Tracer)
