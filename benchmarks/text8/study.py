"""The steps of the benchmark. Each keeps its result in a file, and is not done twice."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import scores, steps
from common.scores import Correct

import coremerge_jax as cm
from coremerge_jax.demo.evaluation import parse_chain
from coremerge_jax.recipe import parse_space
from text8.methods import Method
from text8.minilm import load, pad
from text8.scoring import Exam
from text8.tasks import Task, splits
from text8.training import EPOCHS, logits, train

RATE = 0.03
STEPS = 120
SHARE = 4
"""Texts of each task in a step that learns coefficients."""
DECIDE = 48
"""Validation texts of each task that decide when this stops; it learns from the others."""


@dataclasses.dataclass
class Study:
    """All steps of the study, with their results kept in a folder.

    Attributes:
        folder: keeps adapters, logs and results.
        model: folder of the base model.
        tasks: each with the folder of its package.
        sizes: of the splits, by default those of `tasks.SIZES`.
        epochs: of training.
        training: number of the training of all adapters; each has seeds of its own.
        say: called with a message after each step.
    """

    folder: Path
    model: Path
    tasks: Sequence[tuple[Task, Path]]
    sizes: dict[str, int] | None = None
    epochs: int = EPOCHS
    training: int = 0
    say: Callable[[str], object] = print

    @cached_property
    def exam(self) -> Exam:
        """Returns all texts."""
        return Exam(
            self.model, [(task, splits(task, folder, self.sizes)) for task, folder in self.tasks]
        )

    @property
    def names(self) -> list[str]:
        """Returns the names of the tasks."""
        return [task.name for task, _ in self.tasks]

    def adapter(self, name: str, rank: int) -> Path:
        """Returns the PEFT folder of a task's adapter, which is trained if it is not there."""
        path = self.folder / "adapters" / f"training-{self.training}" / f"rank-{rank}" / name
        if not path.exists():
            seed = self.names.index(name) + len(self.names) * self.training
            model = load(self.model, rank, seed)
            labels = self.exam.labels[name]["train"]
            examples = list(zip(self.exam.tokens[name]["train"], labels, strict=True))
            adapter = train(model, self.exam.heads[name], examples, seed, self.epochs)
            path.parent.mkdir(parents=True, exist_ok=True)
            cm.save_peft(adapter, path)
            self.say(f"trained {name}, rank {rank}, training {self.training}")
        return path

    def base(self) -> Correct:
        """Returns the base model's test answers."""
        return self._answers("base", lambda: self.exam.correct(None, "test"))

    def alone(self, ranks: Mapping[str, int], split: str) -> Correct:
        """Returns the answers of each task's own adapter."""
        found = {}
        for name, rank in ranks.items():
            path = self.adapter(name, rank)
            adapter = cm.load_peft(path)
            found |= self._answers(
                f"alone-{split}-{name}-{digest([path])}",
                lambda a=adapter, n=name: self.exam.correct(a, split, [n]),
            )
        return found

    def _answers(self, name: str, answer: Callable[[], Correct]) -> Correct:
        kept = self.kept(name, lambda: {task: steps.bits(x) for task, x in answer().items()})
        return {task: steps.from_bits(x) for task, x in kept.items()}

    def kept(self, name: str, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Returns the result kept under a name, or makes and keeps it."""
        return steps.kept(self.folder / "results", name, make)

    def measure(self, method: Method, ranks: Mapping[str, int]) -> dict[str, Any]:
        """Merges the adapters of some tasks, with the parameters that are best on validation texts.

        Args:
            method: how.
            ranks: the tasks, and the rank of the adapter of each.

        Returns:
            ``"parameters"``, ``"rank"``, the ``"validation"`` score and the test answers as
            ``"correct"``.
        """
        paths = [self.adapter(name, rank) for name, rank in ranks.items()]
        name = f"{_slug(method)}-{digest(paths, method)}"
        return self.tested(name, lambda: self._search(method, ranks, paths, name))

    def tested(self, name: str, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Returns a result kept under a name, or makes and keeps it; with its test answers.

        Args:
            name: of the result.
            make: returns the result, with the bits of `test` as ``"correct"``.
        """
        found = self.kept(name, make)
        return found | {
            "correct": {task: steps.from_bits(x) for task, x in found["correct"].items()}
        }

    def _search(
        self, method: Method, ranks: Mapping[str, int], paths: Sequence[Path], name: str
    ) -> dict[str, Any]:
        projected = self._projected(paths, method)
        alone = self.alone(ranks, "validation")
        key = jax.random.key(0)

        def evaluate(merged: cm.Adapter) -> float:
            answers = self.exam.correct(_cut(merged, method), "validation", list(ranks))
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
        self.say(f"{method.rules} in {method.space}: {swept.summary()}")
        return {
            "parameters": dict(best.parameters),
            "candidates": len(swept.records),
            "rank": max(lora.rank for lora in merged.values()),
            "validation": score,
            "correct": self.test(merged, list(ranks)),
        }

    def test(self, merged: cm.Adapter, tasks: Sequence[str]) -> dict[str, str]:
        """Returns the test answers of a merge, as bits by task."""
        answers = self.exam.correct(merged, "test", tasks)
        return {task: steps.bits(x) for task, x in answers.items()}

    def _projected(self, paths: Iterable[Path], method: Method) -> Any:
        adapters = [cm.load_peft(path) for path in paths]
        return cm.project(adapters, space=parse_space(method.space))

    def automatic(self, method: Method, ranks: Mapping[str, int]) -> dict[str, Any]:
        """Merges at the automatic scale; returns it and the test answers."""
        paths = [self.adapter(name, rank) for name, rank in ranks.items()]

        def make() -> dict[str, Any]:
            adapters = [cm.load_peft(path) for path in paths]
            stream = cm.merge_stream(
                adapters, parse_chain(method.rules), space=parse_space(method.space)
            )
            (scale,) = set(stream.scales.values())
            return {"scale": scale, "correct": self.test(stream.collect(), list(ranks))}

        return self.tested(f"automatic-{_slug(method)}-{digest(paths)}", make)

    def learn(self, method: Method, per: str, ranks: Mapping[str, int]) -> dict[str, Any]:
        """Coefficients learned on validation texts, from the best scale on; as `measure`.

        Args:
            method: the rule.
            per: ``"adapter"`` or ``"module"``.
            ranks: see `measure`.
        """
        start = self.measure(method, ranks)["parameters"]["scale"]
        paths = [self.adapter(name, rank) for name, rank in ranks.items()]

        def make() -> dict[str, Any]:
            fitted = cm.search.fit(
                self._loss(list(ranks)),
                self._projected(paths, method),
                parse_chain(method.rules),
                self._drawn(list(ranks)),
                validation=self._deciding(list(ranks)),
                per=per,
                initial=start,
                optimizer=optax.adam(RATE),
                every=10,
                patience=4,
            )
            self.say(f"{method.rules}, a coefficient per {per}: step {fitted.step}")
            return {
                "parameters": {"start": start, "steps": fitted.step},
                "rank": max(lora.rank for lora in fitted.adapter.values()),
                "correct": self.test(fitted.adapter, list(ranks)),
            }

        return self.tested(f"learned-{per}-{_slug(method)}-{digest(paths, method)}", make)

    def _loss(self, tasks: Sequence[str]) -> Callable[[cm.Adapter, Any], jax.Array]:
        heads = [jnp.asarray(self.exam.heads[name]) for name in tasks]

        def loss(merged: cm.Adapter, batch: tuple) -> jax.Array:
            state, tokens, mask, labels = batch
            embeddings = self.exam.forward(state, merged, tokens, mask)
            parts = embeddings.reshape(len(tasks), -1, embeddings.shape[-1])
            losses = [
                cm.search.cross_entropy(logits(part, head), right)
                for part, head, right in zip(parts, heads, labels, strict=True)
            ]
            return jnp.mean(jnp.stack(losses))

        return loss

    def _drawn(self, tasks: Sequence[str]) -> Iterator[tuple]:
        rng = np.random.default_rng(0)
        for _ in range(STEPS):
            places = {
                name: rng.choice(
                    np.arange(DECIDE, len(self.exam.labels[name]["validation"])), SHARE
                )
                for name in tasks
            }
            yield self._batch(places)

    def _deciding(self, tasks: Sequence[str]) -> list[tuple]:
        starts = range(0, DECIDE, SHARE)
        return [self._batch(dict.fromkeys(tasks, np.arange(i, i + SHARE))) for i in starts]

    def _batch(self, places: Mapping[str, np.ndarray]) -> tuple:
        """Returns validation texts: state of the base model, tokens, mask, labels ``(T, N)``."""
        texts = [self.exam.tokens[name]["validation"][i] for name, at in places.items() for i in at]
        labels = [self.exam.labels[name]["validation"][at] for name, at in places.items()]
        return self.exam.state, *pad(texts, full=True), np.stack(labels)


def equal(paths: Sequence[Path], rules: str, space: str) -> float:
    """Returns the relative distance of a merge in a space from that in core space."""
    adapters = [cm.load_peft(path) for path in paths]
    rule = parse_chain(rules)
    first, second = (
        cm.merge(adapters, rule, space=parse_space(x), scale=1.0, key=jax.random.key(0))
        for x in ("core", space)
    )
    pairs = [(np.asarray(first[x].dense()), np.asarray(second[x].dense())) for x in first]
    off = sum(np.sum((x - y) ** 2) for x, y in pairs)
    return float(np.sqrt(off / sum(np.sum(x**2) for x, _ in pairs)))


def _cut(merged: cm.Adapter, method: Method) -> cm.Adapter:
    return cm.truncate(merged, rank=method.cut)[0] if method.cut else merged


def digest(paths: Sequence[Path], method: Method | None = None) -> str:
    """Returns a name that changes with the adapters' files and what is tried."""
    values = method and [method.rules, method.space, method.cut, dict(method.values)]
    return steps.digest(paths, values)


def _slug(method: Method) -> str:
    text = f"{method.rules}-{method.space}" + (f"-cut-{method.cut}" if method.cut else "")
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in text)
