"""The steps of the benchmark. Each keeps its result in a file, and is not done twice."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from common import steps
from common.progress import Progress
from tokenizers import Tokenizer

import coremerge_jax as cm
from smollm import tasks
from smollm.encoding import Encoded, encode
from smollm.model import ATTENTION, LINEAR, Config, load
from smollm.scoring import Answers, Exam
from smollm.tasks import Task, splits
from smollm.training import RATE, STEPS, train


class Base(Protocol):
    """A base model, such as a `model.File`."""

    config: Config
    end: int

    def tensors(self) -> Any:
        """Yields names and values of tensors."""

    def tokenizer(self) -> Tokenizer:
        """Returns the tokenizer."""


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


@dataclasses.dataclass
class Study:
    """All steps of the study, with their results kept in a folder.

    Attributes:
        folder: keeps adapters and results.
        base: the base model.
        tasks: each with the folder of its package.
        variant: of adapters.
        sizes: of the splits, by default those of `tasks.SIZES`.
        steps: of training.
        rate: of learning.
        training: number of the training of all adapters; each has seeds of its own.
        dtype: of products.
        say: called with a message after each step.
    """

    folder: Path
    base: Base
    tasks: Sequence[tuple[Task, Path]]
    variant: Variant = VARIANTS["attention"]
    sizes: dict[str, int] | None = None
    steps: int = STEPS
    rate: float = RATE
    training: int = 0
    dtype: Any = jnp.bfloat16
    say: Callable[[str], object] = print

    @cached_property
    def examples(self) -> dict[str, dict[str, list[Encoded]]]:
        """Returns all examples, by task and split."""
        tokenizer, end = self.base.tokenizer(), self.base.end

        def encoded(prompt: str, answer: str) -> Encoded:
            return encode(tokenizer, prompt, f" {answer}", end)

        def length(prompt: str, answer: str) -> int:
            return len(encoded(prompt, answer).tokens)

        return {
            task.name: {
                name: [encoded(task.prompt(text), answer) for text, answer in found]
                for name, found in splits(task, folder, length, self.sizes).items()
            }
            for task, folder in self.tasks
        }

    @cached_property
    def exam(self) -> Exam:
        """Returns the base model and all examples."""
        return Exam(load(self.base), self.examples, self.dtype)

    @property
    def names(self) -> list[str]:
        """Returns the names of the tasks."""
        return [task.name for task, _ in self.tasks]

    def rank(self, name: str) -> int:
        """Returns the rank of a task's adapter."""
        ranks = self.variant.ranks
        return ranks[self.names.index(name) % len(ranks)]

    def adapter(self, name: str) -> Path:
        """Returns the PEFT folder of a task's adapter, which is trained if it is not there."""
        path = self.folder / "adapters" / f"training-{self.training}" / self.variant.name / name
        if not path.exists():
            seed = self.names.index(name) + len(self.names) * self.training
            rank = self.rank(name)
            model = load(self.base, rank, self.variant.adapted, seed, self.dtype)
            progress = Progress(f"{path.relative_to(self.folder / 'adapters')}", self.say)
            adapter = train(
                model,
                self.examples[name]["train"],
                seed,
                self.steps,
                self.rate,
                lambda done, loss: progress(done, self.steps, f", loss {loss:.3f}"),
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            cm.save_peft(adapter, path)
            self.say(f"trained {name}, {self.variant.name}, training {self.training}")
        return path

    def plain(self, names: Sequence[str], split: str = "test") -> Answers:
        """Returns the base model's answers."""
        return self._each(names, split, "base", lambda _: None)

    def alone(self, names: Sequence[str], split: str = "test") -> Answers:
        """Returns the answers of each task's own adapter."""
        return self._each(names, split, "alone", self.adapter)

    def _each(
        self, names: Sequence[str], split: str, what: str, find: Callable[[str], Path | None]
    ) -> Answers:
        """Returns answers to tasks, each by the adapter that is found for it, if there is one."""
        found = []
        for name in names:
            path = find(name)
            adapter = path and cm.load_peft(path)
            key = self.key([path] if path else [], [name], split)
            found.append(
                self.answers(
                    f"{what}-{split}-{name}-{key}",
                    lambda a=adapter, n=name: self.answer(f"{what}, {n}", a, split, [n]),
                )
            )
        return Answers(
            {name: x for part in found for name, x in part.correct.items()},
            {name: x for part in found for name, x in part.likelihood.items()},
        )

    def key(self, adapters: Sequence[Path], names: Sequence[str], split: str) -> str:
        """Returns a name that changes with adapters and with the examples of a split."""
        examples = [x for name in names for x in self.examples[name][split]]
        tokens = [[x.prompt.tolist(), x.answer.tolist()] for x in examples]
        return steps.digest(adapters, tokens)

    def answer(
        self, what: str, adapter: cm.Adapter | None, split: str, names: Sequence[str] | None = None
    ) -> Answers:
        """Returns `Exam.answer`, and reports progress under a name."""
        return self.exam.answer(adapter, split, names, Progress(f"{what}, {split}", self.say))

    def answers(self, name: str, make: Callable[[], Answers]) -> Answers:
        """Returns answers kept under a name, or makes and keeps them."""
        kept = steps.kept(self.folder / "results", name, lambda: _for_json(make()))
        return Answers(
            {task: steps.from_bits(x) for task, x in kept["correct"].items()},
            {task: np.asarray(x) for task, x in kept["likelihood"].items()},
        )


def _for_json(answers: Answers) -> Mapping[str, Any]:
    return {
        "correct": {task: steps.bits(x) for task, x in answers.correct.items()},
        "likelihood": {task: np.round(x, 4).tolist() for task, x in answers.likelihood.items()},
    }


def describe(study: Study, names: Sequence[str]) -> list[dict[str, Any]]:
    """Describes tasks, with the answers of the base model and of their own adapters."""
    plain, own = study.plain(names), study.alone(names)
    licences = tasks.licences()
    return [
        {
            "task": task.name,
            "examples": {x: len(y) for x, y in study.examples[task.name].items()},
            "tokens": float(np.median([len(x.tokens) for x in study.examples[task.name]["test"]])),
            "base": float(np.mean(plain.correct[task.name])),
            "own adapter": float(np.mean(own.correct[task.name])),
            "base, log-likelihood": float(np.mean(plain.likelihood[task.name])),
            "own, log-likelihood": float(np.mean(own.likelihood[task.name])),
            "from": task.cite,
            "licence": licences[task.source],
        }
        for task, _ in study.tasks
        if task.name in names
    ]
