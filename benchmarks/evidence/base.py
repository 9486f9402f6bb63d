"""The steps of a study of merges. Each keeps its result in a file, and is not done twice."""

import abc
import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import optax
from common import scores, steps
from common.progress import Progress
from common.scores import Correct

import coremerge_jax as cm
from coremerge_jax.demo.evaluation import parse_chain
from coremerge_jax.recipe import parse_space
from evidence.methods import TEXTS, Method, Plan

Batch = Any
"""A pytree of arrays, which one of the study's functions takes."""


@dataclasses.dataclass(frozen=True)
class Learning:
    """Settings of coefficients that are learned on validation examples.

    Attributes:
        rate: of learning.
        steps: at most.
        share: examples of each task in a step.
        decide: examples of each task that decide when to stop; the others are learned from.
    """

    rate: float = 0.03
    steps: int = 120
    share: int = 4
    decide: int = 48


LEARNING = Learning()


@dataclasses.dataclass(kw_only=True)
class Study(abc.ABC):
    """All steps of a study, with their results kept in a folder.

    Attributes:
        folder: keeps adapters, logs and results.
        plan: the merges.
        learning: of coefficients.
        training: number of the training of all adapters; each has seeds of its own.
        say: called with a message after each step.
    """

    folder: Path
    plan: Plan = TEXTS
    learning: Learning = LEARNING
    training: int = 0
    say: Callable[[str], object] = print

    # --- The model and the tasks ---------------------------------------------------------------
    @property
    @abc.abstractmethod
    def names(self) -> list[str]:
        """Returns the names of the tasks."""

    @property
    @abc.abstractmethod
    def state(self) -> Any:
        """Returns the parameters of the base model."""

    @abc.abstractmethod
    def rank(self, name: str) -> int:
        """Returns the rank of a task's adapter."""

    @abc.abstractmethod
    def home(self, name: str) -> str:
        """Returns the path of a task's adapter, in the folder of those of one training."""

    @abc.abstractmethod
    def train(self, name: str, rank: int, seed: int) -> cm.Adapter:
        """Trains a task's adapter."""

    @abc.abstractmethod
    def correct(self, adapter: cm.Adapter | None, split: str, names: Sequence[str]) -> Correct:
        """Returns the answers of the base model, with an adapter or alone, to some tasks."""

    def tests(self, adapter: cm.Adapter, names: Sequence[str]) -> dict[str, Any]:
        """Returns test results of a merge, for JSON: ``"correct"``, as bits, and maybe others."""
        return {"correct": self._bits(adapter, "test", names)}

    @abc.abstractmethod
    def describe(self, name: str) -> dict[str, Any]:
        """Describes a task: its source as ``"from"``, ``"licence"`` and ``"examples"`` by split."""

    @abc.abstractmethod
    def mixed(self) -> "Study":
        """Returns the study of adapters of mixed ranks."""

    # --- Unlabelled training inputs ------------------------------------------------------------
    @abc.abstractmethod
    def inputs(self, name: str, count: int) -> list[Batch]:
        """Returns the first inputs of a task, in batches for `read`."""

    @abc.abstractmethod
    def read(self, state: Any, batch: Batch) -> jax.Array:
        """Runs the model with some parameters, all of whose modules see the inputs."""

    @abc.abstractmethod
    def mask(self, batch: Batch) -> jax.Array:
        """Returns the weights of the tokens of a batch for `read`, 0 for padding."""

    @abc.abstractmethod
    def lessons(self, names: Sequence[str], count: int) -> list[list[Batch]]:
        """Returns the first inputs of some tasks, in batches for `predict`."""

    @abc.abstractmethod
    def predict(self, state: Any, adapter: cm.Adapter, batch: Batch) -> jax.Array:
        """Returns the logits of the base model with an adapter, ``(..., classes)``."""

    @abc.abstractmethod
    def positions(self, batch: Batch) -> jax.Array:
        """Returns the weights of the positions that `predict` gives logits of, ``(...)``."""

    # --- Labelled validation examples ----------------------------------------------------------
    @abc.abstractmethod
    def count(self, name: str) -> int:
        """Returns the number of validation examples of a task."""

    @abc.abstractmethod
    def batch(self, places: Mapping[str, np.ndarray]) -> Batch:
        """Returns validation examples by the names of tasks, as many of each, for `loss`."""

    @abc.abstractmethod
    def loss(self, names: Sequence[str]) -> Callable[[cm.Adapter, Batch], jax.Array]:
        """Returns the loss of an adapter on a batch of some tasks."""

    # --- Adapters and answers ------------------------------------------------------------------
    def of_training(self, number: int) -> Self:
        """Returns the same study of another training, with the same model and examples."""
        other = copy.copy(self)
        other.training = number
        return other

    def adapter(self, name: str) -> Path:
        """Returns the PEFT folder of a task's adapter, which is trained if it is not there."""
        home, number = self.home(name), self.training
        path = self.folder / "adapters" / f"training-{number}" / home

        def make() -> None:
            seed = self.names.index(name) + len(self.names) * number
            cm.save_peft(self.train(name, self.rank(name), seed), path)
            self.say(f"trained {home}, training {number}")

        return steps.once(path, make)

    def adapters(self, names: Sequence[str]) -> list[cm.Adapter]:
        """Returns the adapters of some tasks."""
        return [cm.load_peft(self.adapter(name)) for name in names]

    def base(self) -> Correct:
        """Returns the base model's test answers."""
        return self._answers("base", None, "test", self.names)

    def alone(self, names: Sequence[str], split: str) -> Correct:
        """Returns the answers of each task's own adapter."""
        found = {}
        for name in names:
            kept = f"alone-{split}-{name}-{self.digest([name])}"
            found |= self._answers(kept, self.adapter(name), split, [name])
        return found

    def _answers(self, kept: str, path: Path | None, split: str, names: Sequence[str]) -> Correct:
        def make() -> dict[str, str]:
            return self._bits(path and cm.load_peft(path), split, names)

        return _from_bits(self.kept(kept, make))

    def _bits(self, adapter: cm.Adapter | None, split: str, names: Sequence[str]) -> dict[str, str]:
        answers = self.correct(adapter, split, names)
        return {task: steps.bits(x) for task, x in answers.items()}

    def kept(self, name: str, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Returns the result kept under a name, or makes and keeps it."""
        return steps.kept(self.folder / "results", name, make)

    def digest(self, names: Sequence[str], values: Any = None) -> str:
        """Returns a name that changes with the files of some tasks' adapters, and with values."""
        return steps.digest([self.adapter(name) for name in names], values)

    # --- Merges --------------------------------------------------------------------------------
    def tested(
        self,
        name: str,
        tasks: Sequence[str],
        make: Callable[[], tuple[cm.Adapter, Mapping[str, Any]]],
    ) -> dict[str, Any]:
        """Returns a result kept under a name, or makes and keeps it; with its test answers.

        Args:
            name: of the result.
            tasks: to test.
            make: returns a merge and what else to keep.

        Returns:
            That, the rank of the merge as ``"rank"``, and its `tests`.
        """

        def tested() -> dict[str, Any]:
            merged, more = make()
            rank = max(lora.rank for lora in merged.values())
            return {**more, "rank": rank, **self.tests(merged, tasks)}

        found = self.kept(name, tested)
        return found | {"correct": _from_bits(found["correct"])}

    def measure(self, method: Method, names: Sequence[str]) -> dict[str, Any]:
        """Merges the adapters of some tasks, with the parameters that are best on validation texts.

        Returns:
            As `tested`, with the ``"parameters"`` and the ``"validation"`` score.
        """
        name = f"{method.slug}-{self.digest(names, method.tried)}"
        return self.tested(name, names, lambda: self._search(method, names, name))

    def _search(
        self, method: Method, names: Sequence[str], name: str
    ) -> tuple[cm.Adapter, dict[str, Any]]:
        projected = self._projected(method, names)
        alone = self.alone(names, "validation")
        key, title = jax.random.key(0), f"{method.rules} in {method.space}"
        progress, done = Progress(title, self.say), itertools.count(1)
        candidates = sum(map(len, method.values.values()))

        def evaluate(merged: cm.Adapter) -> float:
            answers = self.correct(_cut(merged, method), "validation", names)
            progress(next(done), candidates)
            return scores.normalized(answers, alone)

        log = self.folder / "logs" / f"{name}.jsonl"
        log.parent.mkdir(parents=True, exist_ok=True)
        swept = cm.search.sweep(
            projected,
            parse_chain(method.rules),
            evaluate,
            method.values,
            method=cm.search.line(),
            key=key,
            log=log,
        )
        best = swept.best
        merged = _cut(projected.merge(best.rule, scale=best.scale, key=key), method)
        (score,) = best.metrics.values()
        self.say(f"{title}: {swept.summary()}")
        return merged, {
            "parameters": dict(best.parameters),
            "candidates": len(swept.records),
            "validation": score,
        }

    def _projected(self, method: Method, names: Sequence[str]) -> Any:
        needs = parse_chain(method.rules).needs_inputs
        statistics = self.statistics(names, self.plan.inputs) if needs else None
        space = parse_space(method.space)
        return cm.project(self.adapters(names), space=space, statistics=statistics)

    def statistics(
        self,
        names: Sequence[str],
        count: int,
        source: str | cm.Adapter = "own",
        shift: int = 0,
    ) -> cm.Statistics:
        """Returns statistics of the unlabelled inputs of some tasks.

        Args:
            names: of the tasks.
            count: inputs of each task.
            source: see `coremerge_jax.collect`.
            shift: task t gets the inputs of task t + shift, for a control.
        """
        return cm.collect(
            self.state,
            self.adapters(names),
            [self.inputs(name, count) for name in (*names[shift:], *names[:shift])],
            self.read,
            source=source,
            mask=self.mask,
        )

    def automatic(self, method: Method, names: Sequence[str]) -> dict[str, Any]:
        """Merges at the automatic scale; returns it and the test answers."""

        def make() -> tuple[cm.Adapter, dict[str, Any]]:
            rule, space = parse_chain(method.rules), parse_space(method.space)
            stream = cm.merge_stream(self.adapters(names), rule, space=space)
            (scale,) = set(stream.scales.values())
            return stream.collect(), {"scale": scale}

        return self.tested(f"automatic-{method.slug}-{self.digest(names)}", names, make)

    def learn(self, method: Method, per: str, names: Sequence[str]) -> dict[str, Any]:
        """Learns coefficients on validation texts, from the best scale on; as `measure`.

        Args:
            method: the rule.
            per: ``"adapter"`` or ``"module"``.
            names: of the tasks.
        """
        start = self.measure(method, names)["parameters"]["scale"]
        title = f"{method.rules}, a coefficient per {per}"

        def make() -> tuple[cm.Adapter, dict[str, Any]]:
            fitted = cm.search.fit(
                self.loss(names),
                self._projected(method, names),
                parse_chain(method.rules),
                self._drawn(names, Progress(title, self.say)),
                validation=self._deciding(names),
                per=per,
                initial=start,
                optimizer=optax.adam(self.learning.rate),
                every=10,
                patience=4,
            )
            self.say(f"{title}: step {fitted.step}")
            return fitted.adapter, {"parameters": {"start": start, "steps": fitted.step}}

        name = f"learned-{per}-{method.slug}-{self.digest(names, method.tried)}"
        return self.tested(name, names, make)

    def _drawn(self, names: Sequence[str], progress: Progress) -> Iterator[Batch]:
        rng, settings = np.random.default_rng(0), self.learning
        for step in range(settings.steps):
            progress(step, settings.steps)
            places = {name: np.arange(settings.decide, self.count(name)) for name in names}
            yield self.batch({name: rng.choice(x, settings.share) for name, x in places.items()})

    def _deciding(self, names: Sequence[str]) -> list[Batch]:
        share = self.learning.share
        starts = range(0, self.learning.decide, share)
        return [self.batch(dict.fromkeys(names, np.arange(i, i + share))) for i in starts]

    def distance(self, rules: str, space: str) -> dict[str, Any]:
        """Measures the relative distance of a merge in a space from that in core space."""

        def make() -> dict[str, float]:
            adapters, rule, key = self.adapters(self.names), parse_chain(rules), jax.random.key(0)
            first, second = (
                cm.merge(adapters, rule, space=parse_space(x), scale=1.0, key=key)
                for x in ("core", space)
            )
            off = whole = 0.0
            for path, lora in first.items():  # one at a time, for they are large
                x, y = (np.asarray(x.dense()) for x in (lora, second[path]))
                off, whole = off + np.sum((x - y) ** 2), whole + np.sum(x**2)
            return {"off": float(np.sqrt(off / whole))}

        method = Method(rules, space)
        return self.kept(f"distance-{method.slug}-{self.digest(self.names)}", make)


def _from_bits(kept: Mapping[str, str]) -> Correct:
    return {task: steps.from_bits(x) for task, x in kept.items()}


def _cut(merged: cm.Adapter, method: Method) -> cm.Adapter:
    return cm.truncate(merged, rank=method.cut)[0] if method.cut else merged
