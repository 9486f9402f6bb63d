"""The model's own answers, one likeliest token after the other."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from smollm.encoding import ANSWERS, STEP, Encoded
from smollm.model import SmolLM

LONGEST = ANSWERS[-1]
"""Tokens that an answer has at most."""


def prompts(
    examples: Sequence[Encoded], shared: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns prompts with room for answers, without the tokens that all begin with.

    Args:
        examples: of any tasks, or of one if tokens are shared.
        shared: see `pad`.

    Returns:
        Tokens ``(N, L)``, their numbers ``(N,)``, and the shared tokens ``(P,)``.
    """
    lengths = np.asarray([len(x.prompt) - shared for x in examples], np.int32)
    tokens = np.zeros((len(examples), -(-(lengths.max() + LONGEST) // STEP) * STEP), np.int32)
    for row, length, example in zip(tokens, lengths, examples, strict=True):
        row[:length] = example.prompt[shared:]
    return tokens, lengths, examples[0].prompt[:shared]


def decode(
    model: SmolLM, tokens: jax.Array, lengths: jax.Array, prefix: jax.Array, end: int
) -> jax.Array:
    """Decodes greedily, until all answers have ended or are of the greatest length.

    Args:
        model: reads everything again for each token, as answers are short.
        tokens: see `prompts`.
        lengths: see `prompts`.
        prefix: see `prompts`.
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
        logits = model(tokens, (lengths + i - 1)[:, None], prefix)[:, 0]
        said = jnp.argmax(logits, axis=-1).astype(tokens.dtype)
        return i + 1, tokens.at[rows, lengths + i].set(said), ended | (said == end)

    start = (jnp.int32(0), jnp.asarray(tokens), jnp.zeros(len(tokens), bool))
    _, tokens, _ = jax.lax.while_loop(goes_on, step, start)
    return tokens[rows[:, None], lengths[:, None] + jnp.arange(LONGEST)]


def until(end: int, said: np.ndarray) -> np.ndarray:
    """Returns an answer with the token at its end, or all of it if there is none."""
    places = np.flatnonzero(said == end)
    return said[: places[0] + 1] if len(places) else said
