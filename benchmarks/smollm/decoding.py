"""The model's own answers, one likeliest token after the other."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from smollm.encoding import ANSWERS, STEP, Encoded
from smollm.model import SmolLM

LONGEST = ANSWERS[-1]
"""Tokens that an answer has at most."""


def prompts(examples: Sequence[Encoded]) -> tuple[np.ndarray, np.ndarray]:
    """Returns prompts ``(N, L)`` with room for answers, and their lengths ``(N,)``."""
    lengths = np.asarray([len(x.prompt) for x in examples], np.int32)
    tokens = np.zeros((len(examples), -(-(lengths.max() + LONGEST) // STEP) * STEP), np.int32)
    for row, example in zip(tokens, examples, strict=True):
        row[: len(example.prompt)] = example.prompt
    return tokens, lengths


def decode(model: SmolLM, tokens: jax.Array, lengths: jax.Array, end: int) -> jax.Array:
    """Decodes greedily, until all answers have ended or are of the greatest length.

    Args:
        model: reads everything again for each token, as answers are short.
        tokens: see `prompts`.
        lengths: see `prompts`.
        end: the token at the end of an answer.

    Returns:
        ``(N, LONGEST)``; what follows a token at the end means nothing.
    """
    rows = jnp.arange(len(tokens))

    def goes_on(state: tuple) -> jax.Array:
        i, _, ended = state
        return (i < LONGEST) & ~jnp.all(ended)

    def step(state: tuple) -> tuple:
        i, tokens, ended = state
        logits = model(tokens, (lengths + i - 1)[:, None])[:, 0]
        said = jnp.argmax(logits, axis=-1).astype(tokens.dtype)
        return i + 1, tokens.at[rows, lengths + i].set(said), ended | (said == end)

    start = (jnp.int32(0), jnp.asarray(tokens), jnp.zeros(len(tokens), bool))
    _, tokens, _ = jax.lax.while_loop(goes_on, step, start)
    return tokens[rows[:, None], lengths[:, None] + jnp.arange(LONGEST)]


def until(end: int, said: np.ndarray) -> np.ndarray:
    """Returns an answer with the token at its end, or all of it if there is none."""
    places = np.flatnonzero(said == end)
    return said[: places[0] + 1] if len(places) else said
