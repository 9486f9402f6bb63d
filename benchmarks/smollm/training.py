"""LoRA adapters of SmolLM2, trained with optax on the tokens of answers."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import coremerge_jax as cm
from smollm.encoding import Encoded, answer_loss, pad
from smollm.model import NAME, SmolLM

BATCH = 16
STEPS = 240
RATE = 6e-4
DECAY = 0.01


def train(
    model: SmolLM,
    examples: Sequence[Encoded],
    seed: int,
    steps: int = STEPS,
    rate: float = RATE,
    progress: Callable[[int, float], Any] = lambda *_: None,
) -> cm.Adapter:
    """Trains the LoRA factors of a model by AdamW, with a warm-up and a cosine schedule.

    Args:
        model: has factors; it is not changed.
        examples: of one task, for training.
        seed: of their order.
        steps: of training, each on `BATCH` examples.
        rate: of learning, at its highest.
        progress: called with the number of steps done and the loss.
    """
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, max(1, steps // 10), steps)
    transform = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=DECAY)
    )
    graph, lora, rest = nnx.split(model, nnx.LoRAParam, ...)
    lora = jax.tree.map(jnp.copy, lora)  # as steps take over its memory
    state = transform.init(lora)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(lora: nnx.State, state: Any, rest: nnx.State, batch: tuple) -> tuple:
        def loss(lora: nnx.State) -> jax.Array:
            return answer_loss(nnx.merge(graph, lora, rest), batch)

        value, gradient = jax.value_and_grad(loss)(lora)
        updates, state = transform.update(gradient, state, lora)
        return optax.apply_updates(lora, updates), state, value

    for done, batch in enumerate(batches(examples, steps, seed), start=1):
        lora, state, value = step(lora, state, rest, batch)
        progress(done, float(value))
    return cm.from_nnx(nnx.merge(graph, lora, rest)).replace(metadata=cm.Metadata(base_model=NAME))


def batches(examples: Sequence[Encoded], steps: int, seed: int) -> Iterator[tuple]:
    """Yields batches of one shape; each example comes once before any comes again."""
    length = max(len(x.tokens) for x in examples)
    answer, shared = max(len(x.answer) for x in examples), examples[0].shared
    rng = np.random.default_rng(seed)
    order = np.concatenate(
        [rng.permutation(len(examples)) for _ in range(-(-steps * BATCH // len(examples)))]
    )
    for start in range(0, steps * BATCH, BATCH):
        yield pad([examples[i] for i in order[start : start + BATCH]], length, answer, shared)
