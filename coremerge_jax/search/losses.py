"""Losses of logits, for `fit`."""

import jax
import jax.numpy as jnp
import optax


def entropy(logits: jax.Array) -> jax.Array:
    """Returns the mean entropy of predictions: needs no labels (AdaMerging, arXiv 2310.02575).

    Args:
        logits: ``(..., classes)``.

    Returns:
        A scalar, in nats.
    """
    log_probabilities = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.sum(jnp.exp(log_probabilities) * log_probabilities, axis=-1))


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy of the predictions.

    Args:
        logits: ``(..., classes)``.
        labels: ``(...)``, integers.

    Returns:
        A scalar, in nats.
    """
    return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels))
