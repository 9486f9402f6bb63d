"""Losses of predictions: with labels, without, and against the predictions of another model."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from coremerge_jax.errors import RecipeError, unknown
from coremerge_jax.lora import widest
from coremerge_jax.merging.checks import check_number
from coremerge_jax.text import short

# Of predictions and a teacher's, ``(..., classes)`` both, to one number for each position.
Likeness = Callable[[jax.Array, jax.Array], jax.Array]


def entropy(logits: jax.Array) -> jax.Array:
    """Returns the mean entropy of predictions, without labels (AdaMerging, arXiv 2310.02575).

    It measures certainty, right or wrong. Where the merge is poor to begin with, coefficients that
    minimize it make the model certain of few classes, and accuracy collapses: that of `tsv` fell
    from 76 to 49 % on the demo (benchmarks/fit.py). `distill` needs the same inputs.

    Args:
        logits: ``(..., classes)``.

    Returns:
        A scalar, in nats.
    """
    log_probabilities = jax.nn.log_softmax(logits)
    possible = log_probabilities > -jnp.inf  # of classes that are ruled out, 0 · log 0 is 0
    log_probabilities = jnp.where(possible, log_probabilities, 0)
    terms = jnp.where(possible, jnp.exp(log_probabilities) * log_probabilities, 0)
    return -jnp.mean(jnp.sum(terms, axis=-1))


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy of the predictions.

    Args:
        logits: ``(..., classes)``.
        labels: ``(...)``, integers.

    Returns:
        A scalar, in nats.
    """
    return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels))


def divergence(logits: jax.Array, teacher: jax.Array, temperature: float = 1.0) -> jax.Array:
    """Returns KL(teacher ‖ predictions) of each position.

    Args:
        logits: ``(..., classes)``.
        teacher: ``(..., classes)``, logits too.
        temperature: divides both.

    Returns:
        ``(...)``, in nats.
    """
    wide = widest(logits.dtype, np.dtype(np.float32))
    own, expected = (
        jax.nn.log_softmax(x.astype(wide) / jnp.asarray(temperature, wide))
        for x in (logits, teacher)
    )
    # Logits may be -inf, of classes or tokens that are ruled out: those count for nothing.
    apart = jnp.where(jnp.isneginf(expected), jnp.zeros((), wide), expected - own)
    return jnp.sum(jnp.exp(expected) * apart, axis=-1)


def cosine(embeddings: jax.Array, teacher: jax.Array) -> jax.Array:
    """Returns 1 - the cosine of the angle between embeddings, at each position.

    Args:
        embeddings: ``(..., features)``.
        teacher: ``(..., features)``.

    Returns:
        ``(...)``, from 0 to 2; 1 where one of the two is 0.
    """
    wide = widest(embeddings.dtype, np.dtype(np.float32))
    x, y = embeddings.astype(wide), teacher.astype(wide)
    squares = jnp.sum(x**2, axis=-1) * jnp.sum(y**2, axis=-1)
    return 1 - jnp.sum(x * y, axis=-1) * jax.lax.rsqrt(jnp.where(squares > 0, squares, 1))


LIKENESS: Mapping[str, Likeness] = {"kl": divergence, "cosine": cosine}


def likeness(loss: str | Likeness, temperature: float) -> Likeness:
    """Returns a loss by its name, or a user's own.

    Raises:
        RecipeError: there is no such loss, or the temperature is not above 0 or not for it.
    """
    check_number("temperature", temperature)
    if temperature <= 0:
        raise RecipeError(f"temperature={short(temperature)}: expected a number above 0")
    if loss == "kl":
        return partial(divergence, temperature=temperature)
    if temperature != 1:
        raise RecipeError(f"temperature={short(temperature)}: only loss='kl' has one; leave it out")
    if isinstance(loss, str):
        if loss not in LIKENESS:
            raise unknown("loss", loss, LIKENESS)
        return LIKENESS[loss]
    if not callable(loss):
        raise RecipeError(f"loss: expected 'kl', 'cosine' or a function, got {short(loss)}")
    return loss


def weighted_sums(values: jax.Array, weights: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Returns the sum of values times weights, and that of the weights.

    Args:
        values: ``(...)``.
        weights: of the same shape, or with fewer axes at the end; None for 1.

    Raises:
        RecipeError: the shapes do not fit.
    """
    if weights is None:
        return jnp.sum(values), jnp.asarray(values.size, values.dtype)
    if weights.shape != values.shape[: weights.ndim]:
        raise RecipeError(
            f"mask: gave shape {weights.shape} for predictions of {values.shape} positions; "
            "expected the same, or its first axes"
        )
    weights = weights.astype(values.dtype).reshape(
        *weights.shape, *(1,) * (values.ndim - weights.ndim)
    )
    spread = jnp.broadcast_to(weights, values.shape)
    # Padding may have given values that are not finite.
    return jnp.sum(jnp.where(spread != 0, values, 0) * spread), jnp.sum(spread)


def ratio(total: jax.Array, count: jax.Array) -> jax.Array:
    """Returns ``total / count``, and 0 for a count of 0."""
    return total / jnp.where(count > 0, count, jnp.ones_like(count))


def check_scalar(found: Any) -> jax.Array:
    """Returns a user's loss as it is.

    Raises:
        RecipeError: it is no scalar array of JAX.
    """
    if not isinstance(found, jax.Array) or found.shape != ():
        shape = f"shape {found.shape}" if isinstance(found, jax.Array) else short(found)
        raise RecipeError(f"the loss gave {shape}; expected a scalar array of JAX")
    return found
