"""Merges with unlabelled inputs: statistics, distilled coefficients, and choices by agreement."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import coremerge_jax as cm
from coremerge_jax.demo.evaluation import parse_chain
from text8.methods import SCALES
from text8.minilm import pad
from text8.study import Study, digest
from text8.training import logits

BATCH = 16
"""Texts that the model reads at once for statistics."""
SHARE = 8
"""Texts of each task in a step that learns coefficients."""
INPUTS, LEARNED = 64, 80
"""Texts of each task for statistics, and for coefficients."""
COUNTS = (8, 16, 32, 64, 128, 256)
REGMEAN = "regmean"
PLAIN = "regmean:orthogonalize=false"
CUT = 16
"""Rank of cut merges, and mean rank of those with a budget."""

Made = tuple[cm.Adapter, Mapping[str, float]]
"""A merge, and the seconds of its steps."""
Make = Callable[[], Made]


@dataclasses.dataclass
class Unlabelled:
    """Merges of some adapters with unlabelled training texts of their tasks.

    No label, validation text or test text decides anything here.

    Attributes:
        study: has the adapters and texts.
        ranks: the tasks, and the rank of the adapter of each.
    """

    study: Study
    ranks: Mapping[str, int]

    @functools.cached_property
    def adapters(self) -> list[cm.Adapter]:
        """Returns the adapters."""
        return [cm.load_peft(self.study.adapter(name, rank)) for name, rank in self.ranks.items()]

    def texts(self, name: str, count: int) -> list[np.ndarray]:
        """Returns the tokens of the first training texts of a task."""
        return self.study.exam.tokens[name]["train"][:count]

    def statistics(
        self, count: int, source: str | cm.Adapter = "own", shift: int = 0
    ) -> cm.Statistics:
        """Returns statistics of so many texts a task.

        Args:
            count: texts of each task.
            source: see `coremerge_jax.collect`.
            shift: task t gets the texts of task t + shift, for a control.
        """
        names = list(self.ranks)
        read = [names[(t + shift) % len(names)] for t in range(len(names))]
        return cm.collect(
            self.study.exam.state,
            self.adapters,
            [self._batches(name, count) for name in read],
            lambda state, batch: self.study.exam.embed(state, *batch),
            source=source,
            mask=lambda batch: batch[1],
        )

    def _batches(self, name: str, count: int) -> list[tuple]:
        tokens = self.texts(name, count)
        starts = range(0, len(tokens), BATCH)
        return [pad(tokens[i : i + BATCH], full=True) for i in starts]

    # --- Ways to merge -------------------------------------------------------------------------
    def merge(
        self, rules: str, count: int = INPUTS, source: str | cm.Adapter = "own", shift: int = 0
    ) -> tuple[cm.Adapter, dict[str, float]]:
        """Merges at the automatic scale; returns the merge and the seconds of each step."""
        seconds: dict[str, float] = {}
        with _timed(seconds, "statistics"):
            statistics = self.statistics(count, source, shift)
        with _timed(seconds, "merge"):
            merged = cm.merge(self.adapters, parse_chain(rules), statistics=statistics)
        return merged, seconds

    def again(self, rules: str, passes: int) -> tuple[cm.Adapter, dict[str, float]]:
        """Merges, and again with the inputs that the merge itself reads."""
        merged, seconds = self.merge(rules)
        for _ in range(passes):
            merged, more = self.merge(rules, source=merged)
            seconds = {name: value + more[name] for name, value in seconds.items()}
        return merged, seconds

    def distill(self, rules: str, per: str = "module") -> tuple[cm.Adapter, dict[str, float]]:
        """Learns coefficients from the adapters' own predictions on `LEARNED` texts a task."""
        seconds: dict[str, float] = {}
        with _timed(seconds, "statistics"):
            needs = parse_chain(rules).needs_inputs
            statistics = self.statistics(LEARNED) if needs else None
        with _timed(seconds, "learn"):
            fitted = cm.search.distill(
                self._predict,
                cm.project(self.adapters, statistics=statistics),
                parse_chain(rules),
                self._lessons(LEARNED),
                params=self.study.exam.state,
                per=per,
            )
        return fitted.adapter, seconds

    def choose(self, rules: str) -> tuple[cm.Adapter, dict[str, float]]:
        """Chooses the scale by agreement with the adapters' own predictions."""
        seconds: dict[str, float] = {}
        with _timed(seconds, "choose"):
            judge = cm.search.agreement(
                self._predict,
                self.adapters,
                self._lessons(INPUTS),
                params=self.study.exam.state,
            )
            swept = cm.search.sweep(
                self.adapters,
                parse_chain(rules),
                judge,
                {"scale": SCALES},
                method=cm.search.line(),
            )
        best = swept.best
        return cm.merge(self.adapters, best.rule, scale=best.scale), seconds

    def _predict(self, state: Any, adapter: cm.Adapter, batch: tuple) -> jax.Array:
        """Returns the logits of a batch; labels that only fill up the head get none."""
        tokens, mask, head, used = batch
        found = logits(self.study.exam.forward(state, adapter, tokens, mask), head)
        return jnp.where(used[None, :], found, -1e9)

    def _lessons(self, count: int) -> list[list[tuple]]:
        """Returns batches of each task, all of one shape: tokens, mask, head and its labels."""
        heads = [self.study.exam.heads[name] for name in self.ranks]
        size = max(map(len, heads))
        found = []
        for name, head in zip(self.ranks, heads, strict=True):
            tokens = self.texts(name, count)
            used = np.arange(size) < len(head)
            full = np.pad(head, ((0, size - len(head)), (0, 0)))
            starts = range(0, len(tokens) - SHARE + 1, SHARE)
            found.append([(*pad(tokens[i : i + SHARE], full=True), full, used) for i in starts])
        return found

    def cut(
        self, merged: cm.Adapter, metric: bool, **limit: int
    ) -> tuple[cm.Adapter, dict[str, float]]:
        """Cuts a merge to a rank or a budget, plainly or in the metric of the inputs."""
        seconds: dict[str, float] = {}
        inputs: dict[str, Any] = {}
        if metric:
            inputs = {"statistics": self.statistics(INPUTS), "sources": self.adapters}
        with _timed(seconds, "cut"):
            small, _ = cm.truncate(merged, **inputs, **limit)
        return small, seconds

    # --- Results -------------------------------------------------------------------------------
    def measure(self, name: str, make: Make) -> dict[str, Any]:
        """Returns the test answers of a merge and the seconds of its steps; kept under a name."""
        paths = [self.study.adapter(task, rank) for task, rank in self.ranks.items()]

        def found() -> dict[str, Any]:
            merged, seconds = make()
            self.study.say(f"{name}: {', '.join(f'{x} {s:.1f} s' for x, s in seconds.items())}")
            return {
                "seconds": dict(seconds),
                "rank": max(lora.rank for lora in merged.values()),
                "correct": self.study.test(merged, list(self.ranks)),
            }

        return self.study.tested(f"unlabelled-{_slug(name)}-{digest(paths)}", found)

    def rows(self) -> dict[str, dict[str, Make]]:
        """Returns the merges to measure, by section and name."""
        return {
            "merges": {
                "tsv, automatic scale": lambda: (cm.merge(self.adapters, cm.tsv()), {}),
                "tsv, scale by agreement": lambda: self.choose("tsv"),
                "regmean": lambda: self.merge(REGMEAN),
                "regmean, not orthogonalized": lambda: self.merge(PLAIN),
                "task_arithmetic, distilled": lambda: self.distill("task_arithmetic"),
                "tsv, distilled": lambda: self.distill("tsv"),
                "regmean, distilled": lambda: self.distill(REGMEAN),
            },
            "variants": {
                "inputs weighted by their trace": lambda: self.merge(f"{REGMEAN}:weighting=trace"),
                "inputs of the base model": lambda: self.merge(REGMEAN, source="base"),
                "inputs of the merge, in a second pass": lambda: self.again(REGMEAN, 1),
                "inputs of another task": lambda: self.merge(REGMEAN, shift=1),
            },
            "curve": {f"{n} inputs": functools.partial(self.merge, REGMEAN, n) for n in COUNTS},
            "cuts": {
                f"{name}, {words}": functools.partial(self._cut, rules, metric, limit)
                for name, rules in (("tsv", "tsv"), ("regmean", REGMEAN))
                for words, metric, limit in (
                    (f"rank {CUT}", False, {"rank": CUT}),
                    (f"rank {CUT}, in the metric of inputs", True, {"rank": CUT}),
                    (f"budget {CUT}", False, {"budget": CUT}),
                    (f"budget {CUT}, in the metric of inputs", True, {"budget": CUT}),
                )
            },
        }

    def _cut(self, rules: str, metric: bool, limit: Mapping[str, int]) -> Made:
        merged, _ = self.merge(rules)
        return self.cut(merged, metric, **limit)


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Adds the seconds that it takes to a mapping, under a name."""
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start
