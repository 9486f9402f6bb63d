"""Answers of the model to all tasks, with an adapter or alone."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common.scores import Correct
from flax import nnx

import coremerge_jax as cm
from smollm.decoding import decode, prompts, until
from smollm.encoding import Encoded, batches, likelihoods
from smollm.model import Base, SmolLM, load

BATCH = 64


@dataclasses.dataclass(frozen=True)
class Answers:
    """Answers of a model, by task.

    Attributes:
        correct: where decoding greedily gives the answer and the token at the end, and no more.
        likelihood: the mean log-likelihood of the tokens of each right answer, ``(N,)``.
        in_form: where the likeliest first token is one that right answers to the task begin with.
    """

    correct: Correct
    likelihood: dict[str, np.ndarray]
    in_form: Correct


class Exam:
    """The base model, and the examples of all tasks.

    Attributes:
        base: the base model.
        examples: by task and split.
        dtype: of products.
    """

    def __init__(
        self,
        base: Base,
        examples: Mapping[str, Mapping[str, Sequence[Encoded]]],
        dtype: Any = jnp.float32,
    ) -> None:
        self.base, self.examples, self.dtype = base, examples, dtype
        self._likelihoods = jax.jit(lambda state, batch: likelihoods(self.model(state), batch))
        self._decode = jax.jit(lambda state, *x: decode(self.model(state), *x, base.end))

    @cached_property
    def _split(self) -> tuple[nnx.GraphDef, nnx.State]:
        """Returns the base model in parts; it is read when it is needed."""
        return nnx.split(load(self.base))

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Returns names of the tasks' examples, which change as these do."""
        return {name: _fingerprint(parts.values()) for name, parts in self.examples.items()}

    @cached_property
    def _starts(self) -> dict[str, np.ndarray]:
        """Returns the tokens that right answers begin with, in any split, by task."""
        return {
            name: np.unique([x.answer[0] for part in parts.values() for x in part])
            for name, parts in self.examples.items()
        }

    @property
    def state(self) -> nnx.State:
        """Returns the parameters of the base model, in float32."""
        return self._split[1]

    def model(self, state: nnx.State, adapter: cm.Adapter | None = None) -> SmolLM:
        """Returns the model with some parameters and an adapter; JAX can differentiate it."""
        return nnx.merge(self._split[0], self._rounded(state, adapter))

    def _rounded(self, state: nnx.State, adapter: cm.Adapter | None) -> nnx.State:
        folded = state if adapter is None else cm.fold_tree(state, adapter)
        return jax.tree.map(lambda x: x.astype(self.dtype) if x.ndim > 1 else x, folded)

    def decode(self, adapter: cm.Adapter | None, examples: Sequence[Encoded]) -> list[np.ndarray]:
        """Returns the base model's answers to prompts of one task, with an adapter or alone."""
        state, found = self._rounded(self.state, adapter), []
        tokens, lengths, prefix = prompts(examples, examples[0].shared)
        for start in range(0, len(examples), BATCH):
            rows = np.arange(start, start + BATCH) % len(examples)  # of one shape
            said = np.asarray(self._decode(state, tokens[rows], lengths[rows], prefix))
            found += [until(self.base.end, x) for x in said]
        return found[: len(examples)]

    def answer(
        self,
        adapter: cm.Adapter | None,
        split: str,
        names: Sequence[str],
        progress: Callable[[int, int], Any] = lambda *_: None,
    ) -> Answers:
        """Returns the answers of the base model, with an adapter or alone.

        One pass over prompts and right answers is enough: as long as greedy decoding has given the
        right tokens, it reads the same as this pass does.

        Args:
            adapter: any.
            split: which examples.
            names: of the tasks.
            progress: called with the number of examples done, and of all.
        """
        parts = [self.examples[name][split] for name in names]
        every = [example for part in parts for example in part]
        state = self._rounded(self.state, adapter)
        correct, likelihood = np.zeros(len(every), bool), np.zeros(len(every))
        first = np.zeros(len(every), np.int32)
        done = 0
        for places, batch in batches(every, BATCH):
            found, said = (np.asarray(x) for x in self._likelihoods(state, batch))
            rows = slice(0, len(places))
            correct[places] = ((said == batch.answers) | ~batch.mask)[rows].all(axis=1)
            first[places] = said[rows, 0]
            likelihood[places] = found[rows].sum(axis=1) / batch.mask[rows].sum(axis=1)
            done += len(places)
            progress(done, len(every))
        ends = np.cumsum([len(part) for part in parts])[:-1]
        by_task = (np.split(x, ends) for x in (correct, likelihood, first))
        right, nats, begun = (dict(zip(names, x, strict=True)) for x in by_task)
        in_form = {name: np.isin(begun[name], self._starts[name]) for name in names}
        return Answers(right, nats, in_form)


def _fingerprint(parts: Iterable[Sequence[Encoded]]) -> str:
    tokens = [[x.prompt.tolist(), x.answer.tolist()] for part in parts for x in part]
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()
