"""Correct answers of a model."""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from common.scores import Correct
from flax import nnx

import coremerge_jax as cm
from text8.minilm import Tokens, batches, load
from text8.tasks import Task, splits

BATCH = 64


class Exam:
    """The base model, the heads and the texts of all tasks.

    Attributes:
        folder: of the base model.
        tasks: all tasks.
        state: the parameters of the base model.
        heads: by task, the embeddings of its prompts, ``(C, d)``.
        tokens: by task and split, the tokens of each text.
        labels: by task and split, ``(N,)``.

    Args:
        folder: of the base model.
        tasks: each with the folder of its package.
        sizes: of the splits, by default those of `tasks.SIZES`.
    """

    def __init__(
        self, folder: Path, tasks: Sequence[tuple[Task, Path]], sizes: dict[str, int] | None = None
    ) -> None:
        self.folder, self.tasks = folder, [task for task, _ in tasks]
        self._graph, self.state = nnx.split(load(folder))
        self._embed = jax.jit(self.embed)
        tokens = Tokens(folder)
        self.heads, self.tokens, self.labels = {}, {}, {}
        for task, package in tasks:
            found = splits(task, package, sizes)
            prompts = tokens(list(task.prompts.values()))
            self.heads[task.name] = self._embeddings(self.state, prompts)
            self.tokens[task.name] = {x: tokens(split.texts) for x, split in found.items()}
            self.labels[task.name] = {x: np.asarray(split.labels) for x, split in found.items()}

    def embed(self, state: nnx.State, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Returns the embeddings ``(N, d)`` of a model with these parameters."""
        return nnx.merge(self._graph, state)(tokens, mask)

    def _embeddings(self, state: nnx.State, tokens: Sequence[np.ndarray]) -> np.ndarray:
        """Returns embeddings, ``(N, d)``."""
        found: list[tuple] = []
        for places, batch in batches(tokens, BATCH):
            found.append((places, self._embed(state, *batch)))
        every = np.concatenate([np.asarray(x)[: len(places)] for places, x in found])
        order = np.concatenate([places for places, _ in found])
        return every[np.argsort(order)]

    def forward(
        self, state: nnx.State, merged: cm.Adapter, tokens: jax.Array, mask: jax.Array
    ) -> jax.Array:
        """Returns embeddings ``(N, d)`` of the model with an adapter; JAX can differentiate it."""
        return self.embed(cm.fold_tree(state, merged), tokens, mask)

    def correct(self, adapter: cm.Adapter | None, split: str, names: Sequence[str]) -> Correct:
        """Returns the answers of the base model, with an adapter or alone.

        Args:
            adapter: any.
            split: which texts.
            names: of the tasks.
        """
        state = self.state if adapter is None else cm.fold_tree(self.state, adapter)
        tokens = [self.tokens[name][split] for name in names]
        embeddings = self._embeddings(state, [text for texts in tokens for text in texts])
        ends = np.cumsum([len(texts) for texts in tokens])[:-1]
        return {
            name: np.argmax(part @ self.heads[name].T, axis=1) == self.labels[name][split]
            for name, part in zip(names, np.split(embeddings, ends), strict=True)
        }
