"""Examples as tokens, padded to batches, and the log-likelihood of their answers."""

import dataclasses
from collections import defaultdict
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
        shared: tokens at the beginning that all prompts of the task have.
    """

    prompt: np.ndarray
    answer: np.ndarray
    shared: int = 0

    @property
    def tokens(self) -> np.ndarray:
        """Returns all tokens that the model reads: all but the last."""
        return np.concatenate([self.prompt, self.answer[:-1]])

    @property
    def prefix(self) -> np.ndarray:
        """Returns the tokens that all prompts of the task begin with."""
        return self.prompt[: self.shared]


class Batch(NamedTuple):
    """Padded examples.

    Attributes:
        tokens: ``(N, L)``, int32.
        places: ``(N, A)``, positions from which the tokens of the answer are predicted.
        answers: ``(N, A)``, int32.
        mask: ``(N, A)``, False for padding.
        prefix: ``(P,)``, int32, tokens before those of every row.
    """

    tokens: np.ndarray
    places: np.ndarray
    answers: np.ndarray
    mask: np.ndarray
    prefix: np.ndarray


def encode(tokenizer: Tokenizer, prompt: tuple[str, str], answer: str, end: int) -> Encoded:
    """Returns an example as tokens; the first part of the prompt is that of all of its task."""
    first, second, said = (tokenizer.encode(x).ids for x in (*prompt, answer))
    tokens = (np.asarray(x, np.int32) for x in (first + second, [*said, end]))
    return Encoded(*tokens, shared=len(first))


def pad(examples: Sequence[Encoded], length: int, answer: int, shared: int = 0) -> Batch:
    """Returns examples as arrays.

    Args:
        examples: of any tasks, or of one if tokens are shared.
        length: of the longest example, or more.
        answer: number of tokens of the longest answer, or more.
        shared: number of tokens at the beginning of all prompts that are read once for all.
    """
    n = len(examples)
    tokens = np.zeros((n, length - shared), np.int32)
    places, answers = np.zeros((2, n, answer), np.int32)
    mask = np.zeros((n, answer), bool)
    for row, example in enumerate(examples):
        read, said = example.tokens[shared:], example.answer
        tokens[row, : len(read)] = read
        places[row, : len(said)] = len(example.prompt) - shared - 1 + np.arange(len(said))
        answers[row, : len(said)], mask[row, : len(said)] = said, True
    return Batch(tokens, places, answers, mask, examples[0].prompt[:shared])


def _length(examples: Sequence[Encoded], shared: int) -> int:
    """Returns a length for examples, for few compiled programs."""
    longest = max(len(x.tokens) for x in examples) - shared
    return shared + -(-longest // STEP) * STEP


def batches(examples: Sequence[Encoded], size: int) -> Iterator[tuple[np.ndarray, Batch]]:
    """Yields examples of one task and like lengths together: their places, and the batch.

    Batches of a task are equal in size. The last is filled up with its own examples.

    Args:
        examples: of any tasks.
        size: of a batch, at most.
    """
    groups = defaultdict(list)
    for i, example in enumerate(examples):
        groups[_room(example), example.prefix.tobytes()].append(i)
    for (room, _), group in groups.items():
        order = sorted(group, key=lambda i: len(examples[i].tokens))
        even = -(-len(order) // -(-len(order) // size))
        for start in range(0, len(order), even):
            places = np.asarray(order[start : start + even])
            filled = [examples[i] for i in np.resize(places, even)]
            shared = filled[0].shared
            yield places, pad(filled, _length(filled, shared), room, shared)


def _room(example: Encoded) -> int:
    return next(room for room in ANSWERS if len(example.answer) <= room)


def uniform(examples: Sequence[Encoded], size: int, shared: int = 0) -> list[Batch]:
    """Returns examples in their order in batches of one shape; those that fill none are left out.

    Args:
        examples: of one task.
        size: of a batch.
        shared: see `pad`.
    """
    length, room = _length(examples, shared), max(map(_room, examples))
    starts = range(0, len(examples) - size + 1, size)
    return [pad(examples[i : i + size], length, room, shared) for i in starts]


def read_mask(batch: Batch) -> jax.Array:
    """Returns which tokens of a batch without a prefix are no padding, ``(N, L)``."""
    last = jnp.max(jnp.where(batch.mask, batch.places, 0), axis=1)
    return jnp.arange(batch.tokens.shape[1]) <= last[:, None]


def predict(model: SmolLM, batch: Batch) -> jax.Array:
    """Returns the logits of the tokens of answers, ``(N, A, V)``."""
    return model(*map(jnp.asarray, (batch.tokens, batch.places, batch.prefix)))


def likelihoods(model: SmolLM, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Returns log-likelihoods of the tokens of answers, and the likeliest tokens, ``(N, A)``.

    Padding counts as a token of likelihood 1.
    """
    logits = predict(model, batch)
    chosen = jnp.take_along_axis(logits, jnp.asarray(batch.answers)[:, :, None], axis=-1)[:, :, 0]
    found = chosen - jax.nn.logsumexp(logits, axis=-1)
    return jnp.where(batch.mask, found, 0.0), jnp.argmax(logits, axis=-1)


def answer_loss(model: SmolLM, batch: Batch) -> jax.Array:
    """Returns the mean negative log-likelihood of the tokens of answers."""
    return -jnp.sum(likelihoods(model, batch)[0]) / jnp.sum(batch.mask)
