"""Answers of the model to all tasks, with an adapter or alone."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common.scores import Correct
from flax import nnx

import coremerge_jax as cm
from smollm.encoding import Batch, Encoded, batches, likelihoods
from smollm.model import SmolLM

BATCH = 64


@dataclasses.dataclass(frozen=True)
class Answers:
    """Answers of a model, by task.

    Attributes:
        correct: where decoding greedily gives the answer and the token at the end, and no more.
        likelihood: the mean log-likelihood of the tokens of each right answer, ``(N,)``.
    """

    correct: Correct
    likelihood: dict[str, np.ndarray]


class Exam:
    """The base model, and the examples of all tasks.

    Attributes:
        state: the parameters of the base model.
        examples: by task and split.

    Args:
        model: the base model, in float32, without factors.
        examples: see the attribute.
        dtype: of products.
    """

    def __init__(
        self,
        model: SmolLM,
        examples: Mapping[str, Mapping[str, Sequence[Encoded]]],
        dtype: Any = jnp.bfloat16,
    ) -> None:
        self._graph, self.state = nnx.split(model)
        self.examples, self._dtype = examples, dtype
        self._likelihoods = jax.jit(self.likelihoods)

    def likelihoods(self, state: nnx.State, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Returns `encoding.likelihoods` of the model with these parameters."""
        return likelihoods(nnx.merge(self._graph, state), batch)

    def parameters(self, adapter: cm.Adapter | None) -> nnx.State:
        """Returns the parameters of the base model with an adapter, in the dtype of products."""
        state = self.state if adapter is None else cm.fold_tree(self.state, adapter)
        return jax.tree.map(lambda x: x.astype(self._dtype) if x.ndim > 1 else x, state)

    def answer(
        self,
        adapter: cm.Adapter | None,
        split: str,
        tasks: Sequence[str] | None = None,
        progress: Callable[[int, int], Any] = lambda *_: None,
    ) -> Answers:
        """Returns the answers of the base model, with an adapter or alone.

        One pass over prompts and right answers is enough: as long as greedy decoding has given the
        right tokens, it reads the same as this pass does.

        Args:
            adapter: any.
            split: which examples.
            tasks: of which tasks; by default of all.
            progress: called with the number of examples done, and of all.
        """
        names = list(tasks or self.examples)
        parts = [self.examples[name][split] for name in names]
        every = [example for part in parts for example in part]
        state = self.parameters(adapter)
        correct, likelihood = np.zeros(len(every), bool), np.zeros(len(every))
        done = 0
        for places, batch in batches(every, BATCH):
            found, best = (np.asarray(x) for x in self._likelihoods(state, batch))
            rows = slice(0, len(places))
            correct[places] = best[rows].all(axis=1)
            likelihood[places] = found[rows].sum(axis=1) / batch.mask[rows].sum(axis=1)
            done += len(places)
            progress(done, len(every))
        ends = np.cumsum([len(part) for part in parts])[:-1]
        return Answers(
            dict(zip(names, np.split(correct, ends), strict=True)),
            dict(zip(names, np.split(likelihood, ends), strict=True)),
        )
