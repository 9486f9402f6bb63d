"""The study of eight text tasks: its adapters, and what merges of them are measured with."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common.scores import Correct
from evidence import base

import coremerge_jax as cm
from text8.minilm import load, pad
from text8.scoring import Exam
from text8.sources import SOURCES
from text8.training import EPOCHS, logits, train

MIXED = (16, 4)
"""Ranks of the tasks' adapters, in turn, if they are mixed."""
BATCH = 16
"""Texts that the model reads at once for statistics."""
SHARE = 8
"""Texts of each task in a step that distils."""


@dataclasses.dataclass(kw_only=True)
class Study(base.Study):
    """The steps of the study.

    Attributes:
        exam: the base model and all texts.
        ranks: of the tasks' adapters, in turn.
        epochs: of training.
    """

    exam: Exam
    ranks: tuple[int, ...] = (16,)
    epochs: int = EPOCHS

    @property
    def names(self) -> list[str]:
        """Returns the names of the tasks."""
        return [task.name for task in self.exam.tasks]

    @property
    def state(self) -> Any:
        """Returns the parameters of the base model."""
        return self.exam.state

    def rank(self, name: str) -> int:
        """Returns the rank of a task's adapter."""
        return self.ranks[self.names.index(name) % len(self.ranks)]

    def home(self, name: str) -> str:
        """Returns the path of a task's adapter, by its rank."""
        return f"rank-{self.rank(name)}/{name}"

    def train(self, name: str, rank: int, seed: int) -> cm.Adapter:
        """Trains a task's adapter."""
        tokens, labels = (x[name]["train"] for x in (self.exam.tokens, self.exam.labels))
        model, head = load(self.exam.folder, rank, seed), self.exam.heads[name]
        return train(model, head, list(zip(tokens, labels, strict=True)), seed, self.epochs)

    def correct(self, adapter: cm.Adapter | None, split: str, names: Sequence[str]) -> Correct:
        """Returns the answers of the base model, with an adapter or alone."""
        return self.exam.correct(adapter, split, names)

    def describe(self, name: str) -> dict[str, Any]:
        """Describes a task."""
        (task,) = (task for task in self.exam.tasks if task.name == name)
        return {
            "from": task.cite,
            "licence": {source.name: source.licence for source in SOURCES}[task.source],
            "labels": len(task.prompts),
            "examples": {x: len(y) for x, y in self.exam.labels[name].items()},
        }

    def mixed(self) -> "Study":
        """Returns the study of adapters of mixed ranks."""
        return dataclasses.replace(self, ranks=MIXED)

    # --- Unlabelled training texts -------------------------------------------------------------
    def _texts(self, name: str, count: int, size: int) -> list[tuple]:
        """Returns the first training texts of a task in batches: tokens and mask."""
        tokens = self.exam.tokens[name]["train"][:count]
        return [pad(tokens[i : i + size], full=True) for i in range(0, len(tokens), size)]

    def inputs(self, name: str, count: int) -> list[tuple]:
        """Returns the first training texts of a task, as `read` takes them."""
        return self._texts(name, count, BATCH)

    def read(self, state: Any, batch: tuple) -> jax.Array:
        """Returns the embeddings of the model with some parameters."""
        return self.exam.embed(state, *batch)

    def mask(self, batch: tuple) -> jax.Array:
        """Returns the weights of tokens."""
        return batch[1]

    def lessons(self, names: Sequence[str], count: int) -> list[list[tuple]]:
        """Returns batches of each task, all of one shape: tokens, mask, head and its labels."""
        heads = [self.exam.heads[name] for name in names]
        size = max(map(len, heads))
        found = []
        for name, head in zip(names, heads, strict=True):
            used = np.arange(size) < len(head)
            full = np.pad(head, ((0, size - len(head)), (0, 0)))
            whole = count - count % SHARE
            found.append([(*x, full, used) for x in self._texts(name, whole, SHARE)])
        return found

    def predict(self, state: Any, adapter: cm.Adapter, batch: tuple) -> jax.Array:
        """Returns the logits of a batch; labels that only fill up the head get none."""
        tokens, mask, head, used = batch
        found = logits(self.exam.forward(state, adapter, tokens, mask), head)
        return jnp.where(used[None, :], found, -1e9)

    def positions(self, batch: tuple) -> jax.Array:
        """Returns the weights of texts, which are all 1."""
        return jnp.ones(len(batch[0]))

    # --- Labelled validation texts -------------------------------------------------------------
    def count(self, name: str) -> int:
        """Returns the number of validation texts of a task."""
        return len(self.exam.labels[name]["validation"])

    def batch(self, places: Mapping[str, np.ndarray]) -> tuple:
        """Returns validation texts: state of the base model, tokens, mask, labels ``(T, N)``."""
        texts = [self.exam.tokens[name]["validation"][i] for name, at in places.items() for i in at]
        labels = [self.exam.labels[name]["validation"][at] for name, at in places.items()]
        return self.exam.state, *pad(texts, full=True), np.stack(labels)

    def loss(self, names: Sequence[str]) -> Callable[[cm.Adapter, tuple], jax.Array]:
        """Returns the mean cross-entropy of the labels of some tasks."""
        heads = [jnp.asarray(self.exam.heads[name]) for name in names]

        def loss(merged: cm.Adapter, batch: tuple) -> jax.Array:
            state, tokens, mask, labels = batch
            embeddings = self.exam.forward(state, merged, tokens, mask)
            parts = embeddings.reshape(len(names), -1, embeddings.shape[-1])
            losses = [
                cm.search.cross_entropy(logits(part, head), right)
                for part, head, right in zip(parts, heads, labels, strict=True)
            ]
            return jnp.mean(jnp.stack(losses))

        return loss
