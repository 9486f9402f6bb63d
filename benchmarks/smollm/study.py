"""The study of six generative tasks: its adapters, and what merges of them are measured with."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import steps
from common.progress import Progress
from common.scores import Correct
from evidence import base
from evidence.base import Learning
from evidence.methods import Plan

import coremerge_jax as cm
from smollm.decoding import LONGEST
from smollm.encoding import (
    STEP,
    Batch,
    Encoded,
    encode,
    likelihoods,
    pad,
    predict,
    read_mask,
    uniform,
)
from smollm.model import ATTENTION, LINEAR, Base, load
from smollm.plan import LEARNING, PLAN
from smollm.scoring import Answers, Exam
from smollm.tasks import Task, licences, splits
from smollm.training import RATE, STEPS, train

BATCH = 16
"""Examples that the model reads at once for statistics."""
SHARE = 8
"""Examples of each task in a step that distils."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """A kind of adapters.

    Attributes:
        name: of the kind.
        adapted: names of the modules with factors.
        ranks: of the tasks, in turn.
    """

    name: str
    adapted: tuple[str, ...]
    ranks: tuple[int, ...]


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("attention", ATTENTION, (16,)),
        Variant("linear", LINEAR, (16, 4)),
    )
}


@dataclasses.dataclass(kw_only=True)
class Study(base.Study):
    """The steps of the study.

    Attributes:
        tasks: all tasks.
        exam: the base model and all examples.
        variant: of adapters.
        steps: of training.
        rate: of learning.
    """

    tasks: Sequence[Task]
    exam: Exam
    variant: Variant = VARIANTS["attention"]
    steps: int = STEPS
    rate: float = RATE
    plan: Plan = PLAN
    learning: Learning = LEARNING

    @property
    def names(self) -> list[str]:
        """Returns the names of the tasks."""
        return [task.name for task in self.tasks]

    @property
    def state(self) -> Any:
        """Returns the parameters of the base model."""
        return self.exam.state

    def rank(self, name: str) -> int:
        """Returns the rank of a task's adapter."""
        ranks = self.variant.ranks
        return ranks[self.names.index(name) % len(ranks)]

    def home(self, name: str) -> str:
        """Returns the path of a task's adapter, by its variant."""
        return f"{self.variant.name}/{name}"

    def train(self, name: str, rank: int, seed: int) -> cm.Adapter:
        """Trains a task's adapter."""
        progress = Progress(f"training-{self.training}/{self.home(name)}", self.say)
        return train(
            load(self.exam.base, rank, self.variant.adapted, seed, self.exam.dtype),
            self.exam.examples[name]["train"],
            seed,
            self.steps,
            self.rate,
            lambda done, loss: progress(done, self.steps, f", loss {loss:.3f}"),
        )

    def correct(self, adapter: cm.Adapter | None, split: str, names: Sequence[str]) -> Correct:
        """Returns the answers of the base model, with an adapter or alone."""
        return self.exam.answer(adapter, split, names).correct

    def tests(self, adapter: cm.Adapter, names: Sequence[str]) -> dict[str, Any]:
        """Also returns ``"form"``, the share of answers that begin as answers to the task do.

        And ``"nats"``, the mean log-likelihood of a token of right answers.
        """
        answers = self.exam.answer(adapter, "test", names)
        return {
            "correct": {name: steps.bits(x) for name, x in answers.correct.items()},
            "nats": {name: float(np.mean(x)) for name, x in answers.likelihood.items()},
            "form": {name: float(np.mean(x)) for name, x in answers.in_form.items()},
        }

    def describe(self, name: str) -> dict[str, Any]:
        """Describes a task, with the median of the number of tokens."""
        (task,) = (task for task in self.tasks if task.name == name)
        examples = self.exam.examples[name]
        return {
            "from": task.cite,
            "licence": licences()[task.source],
            "tokens": int(np.median([len(x.tokens) for x in examples["test"]])),
            "examples": {x: len(y) for x, y in examples.items()},
        }

    def mixed(self) -> "Study":
        """Returns the study of adapters of mixed ranks, on all linear modules."""
        return dataclasses.replace(self, variant=VARIANTS["linear"])

    # --- Answers and their likelihoods ---------------------------------------------------------
    def base(self) -> Correct:
        """Returns the base model's test answers."""
        return self.plain(self.names).correct

    def alone(self, names: Sequence[str], split: str) -> Correct:
        """Returns the answers of each task's own adapter."""
        return self.own(names, split).correct

    def plain(self, names: Sequence[str], split: str = "test") -> Answers:
        """Returns the base model's answers to some tasks, with their likelihoods."""
        keys = {name: steps.digest([], self.exam.fingerprints[name]) for name in names}
        return self._each("base", keys, split, lambda _: None)

    def own(self, names: Sequence[str], split: str = "test") -> Answers:
        """Returns the answers of each task's own adapter, with their likelihoods."""
        keys = {name: self.digest([name]) for name in names}
        return self._each("alone", keys, split, lambda name: cm.load_peft(self.adapter(name)))

    def _each(
        self,
        what: str,
        keys: Mapping[str, str],
        split: str,
        find: Callable[[str], cm.Adapter | None],
    ) -> Answers:
        """Returns answers to tasks, each by the adapter that is found for it, if there is one."""
        found = Answers({}, {}, {})
        for name, key in keys.items():
            progress = Progress(f"{what}, {name}, {split}", self.say)

            def make(name: str = name, progress: Progress = progress) -> dict[str, Any]:
                return _for_json(self.exam.answer(find(name), split, [name], progress))

            kept = self.kept(f"{what}-{split}-{name}-{key}", make)
            found.correct[name] = steps.from_bits(kept["correct"])
            found.likelihood[name] = np.asarray(kept["likelihood"])
            found.in_form[name] = steps.from_bits(kept["form"])
        return found

    def digest(self, names: Sequence[str], values: Any = None) -> str:
        """Returns a name that changes with adapters, with values, and with the tasks' examples."""
        return super().digest(names, [values, *(self.exam.fingerprints[name] for name in names)])

    # --- Unlabelled training prompts, with the answers of the task's own adapter ---------------
    def said(self, name: str, count: int) -> list[Encoded]:
        """Returns the first training prompts of a task, with its own adapter's answers."""
        prompts = self.exam.examples[name]["train"][: self.plan.most]

        def make() -> dict[str, Any]:
            answers = self.exam.decode(cm.load_peft(self.adapter(name)), prompts)
            self.say(f"answers of its own adapter to {len(prompts)} prompts of {name}")
            return {"answers": [x.tolist() for x in answers]}

        key = self.digest([name], self.plan.most)
        answers = self.kept(f"said-{name}-{key}", make)["answers"]
        return [
            Encoded(x.prompt, np.asarray(answer, np.int32), x.shared)
            for x, answer in zip(prompts, answers, strict=True)
        ][:count]

    def inputs(self, name: str, count: int) -> list[Batch]:
        """Returns the first training prompts of a task and its own adapter's answers."""
        return uniform(self.said(name, count), min(BATCH, count))

    def read(self, state: Any, batch: Batch) -> jax.Array:
        """Returns the logits of the model with some parameters."""
        return predict(self.exam.model(state), batch)

    def mask(self, batch: Batch) -> jax.Array:
        """Returns the weights of tokens."""
        return read_mask(batch).astype(jnp.float32)

    def lessons(self, names: Sequence[str], count: int) -> list[list[Batch]]:
        """Returns batches of each task, as `inputs` has them."""
        said = [self.said(name, count) for name in names]
        return [uniform(examples, SHARE, examples[0].shared) for examples in said]

    def predict(self, state: Any, adapter: cm.Adapter, batch: Batch) -> jax.Array:
        """Returns the logits of the tokens of answers."""
        return predict(self.exam.model(state, adapter), batch)

    def positions(self, batch: Batch) -> jax.Array:
        """Returns the weights of the tokens of answers, 0 for padding."""
        return jnp.asarray(batch.mask, jnp.float32)

    # --- Labelled validation examples ----------------------------------------------------------
    def count(self, name: str) -> int:
        """Returns the number of validation examples of a task."""
        return len(self.exam.examples[name]["validation"])

    def batch(self, places: Mapping[str, np.ndarray]) -> tuple:
        """Returns validation examples: state of the base model, and a batch, task by task."""
        parts = {name: self.exam.examples[name]["validation"] for name in places}
        longest = max(len(x.tokens) for part in parts.values() for x in part)
        chosen = [parts[name][i] for name, at in places.items() for i in at]
        return self.state, pad(chosen, -(-longest // STEP) * STEP, LONGEST)

    def loss(self, names: Sequence[str]) -> Callable[[cm.Adapter, tuple], jax.Array]:
        """Returns the mean over tasks of the negative log-likelihood of a token of the answers."""

        def loss(merged: cm.Adapter, batch: tuple) -> jax.Array:
            state, examples = batch
            found, _ = likelihoods(self.exam.model(state, merged), examples)
            sums, counts = (x.reshape(len(names), -1).sum(1) for x in (found, examples.mask))
            return -jnp.mean(sums / counts)

        return loss


def _for_json(answers: Answers) -> dict[str, Any]:
    """Returns the answers to one task."""
    parts = (answers.correct, answers.likelihood, answers.in_form)
    right, nats, form = (next(iter(part.values())) for part in parts)
    nats = np.round(nats, 4).tolist()
    return {"correct": steps.bits(right), "likelihood": nats, "form": steps.bits(form)}


def encoded(
    base: Base, tasks: Sequence[tuple[Task, Path]], sizes: dict[str, int] | None = None
) -> dict[str, dict[str, list[Encoded]]]:
    """Returns all examples, by task and split.

    Args:
        base: has the tokenizer.
        tasks: each with the folder of its package.
        sizes: of the splits, by default those of `tasks.SIZES`.
    """
    tokenizer = base.tokenizer()

    def length(text: str) -> int:
        return len(tokenizer.encode(text).ids)

    return {
        task.name: {
            name: [encode(tokenizer, task.prompt(x), answer, base.end) for x, answer in found]
            for name, found in splits(task, folder, length, sizes).items()
        }
        for task, folder in tasks
    }


def evaluate(study: Study, names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the answers to tasks by the base model and by their own adapters, as rows."""
    answers = {"base": study.plain(names), "own": study.own(names)}
    return [
        {
            "task": name,
            "tokens": study.describe(name)["tokens"],
            **{x: float(np.mean(y.correct[name])) for x, y in answers.items()},
            **{f"{x}, form": float(np.mean(y.in_form[name])) for x, y in answers.items()},
            **{f"{x}, nats": float(np.mean(y.likelihood[name])) for x, y in answers.items()},
        }
        for name in names
    ]
