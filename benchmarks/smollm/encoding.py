"""Examples as tokens, padded to batches, and the log-likelihood of their answers."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from smollm.model import SmolLM

STEP = 8
"""Lengths of prompts and answers are padded to multiples of this, for few compiled programs."""
ANSWERS = (4, 12)
"""Lengths of answers are padded to one of these."""


@dataclasses.dataclass(frozen=True)
class Encoded:
    """An example.

    Attributes:
        prompt: its tokens, int32.
        answer: its tokens, with the token at the end.
    """

    prompt: np.ndarray
    answer: np.ndarray

    @property
    def tokens(self) -> np.ndarray:
        """Returns all tokens that the model reads: all but the last."""
        return np.concatenate([self.prompt, self.answer[:-1]])


class Batch(NamedTuple):
    """Padded examples.

    Attributes:
        tokens: ``(N, L)``, int32.
        places: ``(N, A)``, positions from which the tokens of the answer are predicted.
        answers: ``(N, A)``, int32.
        mask: ``(N, A)``, False for padding.
    """

    tokens: np.ndarray
    places: np.ndarray
    answers: np.ndarray
    mask: np.ndarray


def encode(tokenizer: Tokenizer, prompt: str, answer: str, end: int) -> Encoded:
    """Returns an example as tokens."""
    parts = (tokenizer.encode(x).ids for x in (prompt, answer))
    first, second = (np.asarray(x, np.int32) for x in parts)
    return Encoded(first, np.append(second, np.int32(end)))


def pad(examples: Sequence[Encoded], length: int, answer: int) -> Batch:
    """Returns examples as arrays, for so many tokens and so many tokens of an answer."""
    n = len(examples)
    tokens = np.zeros((n, length), np.int32)
    places, answers = np.zeros((2, n, answer), np.int32)
    mask = np.zeros((n, answer), bool)
    for row, example in enumerate(examples):
        read, said = example.tokens, example.answer
        tokens[row, : len(read)] = read
        places[row, : len(said)] = len(example.prompt) - 1 + np.arange(len(said))
        answers[row, : len(said)], mask[row, : len(said)] = said, True
    return Batch(tokens, places, answers, mask)


def batches(examples: Sequence[Encoded], size: int) -> Iterator[tuple[np.ndarray, Batch]]:
    """Yields examples of like lengths together: their places, and what `pad` makes of them.

    Batches are filled up with their own examples, so that shapes are few.
    """
    for answer in ANSWERS:
        order = sorted(
            (i for i, x in enumerate(examples) if _room(x) == answer),
            key=lambda i: len(examples[i].tokens),
        )
        for start in range(0, len(order), size):
            places = np.asarray(order[start : start + size])
            length = -(-len(examples[places[-1]].tokens) // STEP) * STEP
            filled = np.resize(places, size)
            yield places, pad([examples[i] for i in filled], length, answer)


def _room(example: Encoded) -> int:
    return next(room for room in ANSWERS if len(example.answer) <= room)


def uniform(examples: Sequence[Encoded], size: int) -> list[Batch]:
    """Returns examples in their order in batches of one shape; those that fill none are left out.

    Args:
        examples: of one task.
        size: of a batch.
    """
    length = -(-max(len(x.tokens) for x in examples) // STEP) * STEP
    room = max(map(_room, examples))
    starts = range(0, len(examples) - size + 1, size)
    return [pad(examples[i : i + size], length, room) for i in starts]


def read_mask(batch: Batch) -> jax.Array:
    """Returns which tokens of a batch are no padding, ``(N, L)``."""
    last = jnp.max(jnp.where(batch.mask, batch.places, 0), axis=1)
    return jnp.arange(batch.tokens.shape[1]) <= last[:, None]


def predict(model: SmolLM, batch: Batch) -> jax.Array:
    """Returns the logits of the tokens of answers, ``(N, A, V)``."""
    return model(jnp.asarray(batch.tokens), jnp.asarray(batch.places))


def likelihoods(model: SmolLM, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Returns log-likelihoods of the tokens of answers, and if they are the likeliest, ``(N, A)``.

    Padding counts as a token of likelihood 1.
    """
    logits = predict(model, batch)
    chosen = jnp.take_along_axis(logits, jnp.asarray(batch.answers)[:, :, None], axis=-1)[:, :, 0]
    found = chosen - jax.nn.logsumexp(logits, axis=-1)
    best = jnp.argmax(logits, axis=-1) == batch.answers
    return jnp.where(batch.mask, found, 0.0), best | ~batch.mask


def answer_loss(model: SmolLM, batch: Batch) -> jax.Array:
    """Returns the mean negative log-likelihood of the tokens of answers."""
    return -jnp.sum(likelihoods(model, batch)[0]) / jnp.sum(batch.mask)
