"""LoRA adapters of MiniLM, trained with optax."""

from collections.abc import Iterator, Sequence

import jax
import numpy as np
import optax
from flax import nnx

import coremerge_jax as cm
from text8.minilm import NAME, MiniLM, pad

BATCH = 32
EPOCHS = 3
RATE = 1e-3
DECAY = 0.01
TEMPERATURE = 0.05
"""Logits are cosines divided by this."""

Example = tuple[np.ndarray, int]
"""The tokens of a text, and its label."""


def logits(embeddings: jax.Array, head: jax.Array) -> jax.Array:
    """Returns logits ``(N, C)`` of embeddings ``(N, d)`` and those of the labels, ``(C, d)``."""
    return embeddings @ head.T / TEMPERATURE


def train(
    model: MiniLM, head: jax.Array, examples: Sequence[Example], seed: int, epochs: int = EPOCHS
) -> cm.Adapter:
    """Trains the LoRA factors of a model by AdamW, with a warm-up and a cosine schedule.

    Args:
        model: has factors; these change.
        head: see `logits`; it stays.
        examples: the training texts.
        seed: of their order.
        epochs: how often each is seen.
    """
    steps = epochs * (len(examples) // BATCH)
    schedule = optax.warmup_cosine_decay_schedule(0.0, RATE, steps // 10, steps)
    transform = optax.adamw(schedule, weight_decay=DECAY)
    optimizer = nnx.Optimizer(model, transform, wrt=nnx.LoRAParam)
    for tokens, mask, labels in _batches(examples, epochs, seed):
        _step(model, optimizer, head, tokens, mask, labels)
    return cm.from_nnx(model).replace(metadata=cm.Metadata(base_model=NAME))


def _batches(examples: Sequence[Example], epochs: int, seed: int) -> Iterator[tuple]:
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(len(examples))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            tokens, labels = zip(*(examples[i] for i in order[start : start + BATCH]), strict=True)
            yield *pad(tokens), np.asarray(labels)


@nnx.jit
def _step(
    model: MiniLM,
    optimizer: nnx.Optimizer,
    head: jax.Array,
    tokens: jax.Array,
    mask: jax.Array,
    labels: jax.Array,
) -> None:
    def loss(model: MiniLM) -> jax.Array:
        return cm.search.cross_entropy(logits(model(tokens, mask), head), labels)

    gradient = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    optimizer.update(model, gradient)
