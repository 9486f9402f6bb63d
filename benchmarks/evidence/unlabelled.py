"""Merges with unlabelled inputs: statistics, distilled coefficients, and choices by agreement."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import coremerge_jax as cm
from coremerge_jax.demo.evaluation import parse_chain
from evidence.base import Study

REGMEAN = "regmean"
PLAIN = "regmean:orthogonalize=false"

Made = tuple[cm.Adapter, Mapping[str, float]]
"""A merge, and the seconds of its steps."""
Make = Callable[[], Made]


@dataclasses.dataclass
class Unlabelled:
    """Merges of some adapters with unlabelled training inputs of their tasks.

    No label, validation example or test example decides anything here.

    Attributes:
        study: has the adapters and inputs.
        names: of the tasks.
    """

    study: Study
    names: Sequence[str]

    @functools.cached_property
    def adapters(self) -> list[cm.Adapter]:
        """Returns the adapters."""
        return self.study.adapters(self.names)

    @functools.cached_property
    def _own(self) -> cm.Statistics:
        """Returns the statistics of as many inputs as the plan says."""
        return self._statistics()

    # --- Ways to merge -------------------------------------------------------------------------
    def automatic(self, rules: str) -> Made:
        """Merges at the automatic scale, without any input."""
        return cm.merge(self.adapters, parse_chain(rules)), {}

    def merge(
        self,
        rules: str,
        count: int | None = None,
        source: str | cm.Adapter = "own",
        shift: int = 0,
    ) -> Made:
        """Merges with statistics, at the automatic scale.

        Args:
            rules: that need statistics.
            count: inputs of each task; by default, that of the plan.
            source: see `Study.statistics`.
            shift: see `Study.statistics`.
        """
        seconds: dict[str, float] = {}
        with _timed(seconds, "statistics"):
            statistics = self._statistics(count, source, shift)
        with _timed(seconds, "merge"):
            merged = cm.merge(self.adapters, parse_chain(rules), statistics=statistics)
        return merged, seconds

    def _statistics(self, count: int | None = None, *more: Any) -> cm.Statistics:
        return self.study.statistics(self.names, count or self.study.plan.inputs, *more)

    def again(self, rules: str, passes: int) -> Made:
        """Merges, and again with the inputs that the merge itself reads."""
        merged, seconds = self.merge(rules)
        for _ in range(passes):
            merged, more = self.merge(rules, source=merged)
            seconds = {name: value + more[name] for name, value in seconds.items()}
        return merged, seconds

    def distill(self, rules: str, per: str = "module") -> Made:
        """Learns coefficients from the adapters' own predictions."""
        seconds: dict[str, float] = {}
        count = self.study.plan.taught
        with _timed(seconds, "statistics"):
            needs = parse_chain(rules).needs_inputs
            statistics = self._statistics(count) if needs else None
        with _timed(seconds, "learn"):
            fitted = cm.search.distill(
                self.study.predict,
                cm.project(self.adapters, statistics=statistics),
                parse_chain(rules),
                self.study.lessons(self.names, count),
                params=self.study.state,
                per=per,
                mask=self.study.positions,
            )
        return fitted.adapter, seconds

    def choose(self, rules: str) -> Made:
        """Chooses the scale by agreement with the adapters' own predictions."""
        seconds: dict[str, float] = {}
        plan = self.study.plan
        with _timed(seconds, "choose"):
            judge = cm.search.agreement(
                self.study.predict,
                self.adapters,
                self.study.lessons(self.names, plan.inputs),
                params=self.study.state,
                mask=self.study.positions,
            )
            swept = cm.search.sweep(
                self.adapters,
                parse_chain(rules),
                judge,
                {"scale": plan.scales},
                method=cm.search.line(),
            )
        best = swept.best
        return cm.merge(self.adapters, best.rule, scale=best.scale), seconds

    def cut(self, rules: str, metric: bool, **limit: int) -> Made:
        """Cuts a merge to a rank or a budget, plainly or in the metric of the inputs."""
        rule = parse_chain(rules)
        statistics = self._own if rule.needs_inputs else None
        merged = cm.merge(self.adapters, rule, statistics=statistics)
        seconds: dict[str, float] = {}
        inputs = {"statistics": self._own, "sources": self.adapters} if metric else {}
        with _timed(seconds, "cut"):
            small, _ = cm.truncate(merged, **inputs, **limit)
        return small, seconds

    # --- Results -------------------------------------------------------------------------------
    def measure(self, name: str, make: Make) -> dict[str, Any]:
        """Returns the test answers of a merge and the seconds of its steps; kept under a name."""

        def found() -> tuple[cm.Adapter, dict[str, Any]]:
            merged, seconds = make()
            self.study.say(f"{name}: {', '.join(f'{x} {s:.1f} s' for x, s in seconds.items())}")
            return merged, {"seconds": dict(seconds)}

        slug = "".join(c if c.isalnum() else "-" for c in name)
        kept = f"unlabelled-{slug}-{self.study.digest(self.names)}"
        return self.study.tested(kept, self.names, found)

    def rows(self) -> dict[str, dict[str, Make]]:
        """Returns the merges to measure, by section and name."""
        merge, plan = functools.partial(self.merge, REGMEAN), self.study.plan
        cut = plan.cut
        return {
            "unlabelled": {
                "tsv, automatic scale": lambda: self.automatic("tsv"),
                "tsv, scale by agreement": lambda: self.choose("tsv"),
                "regmean": merge,
                "regmean, not orthogonalized": lambda: self.merge(PLAIN),
                "task_arithmetic, distilled": lambda: self.distill("task_arithmetic"),
                "tsv, distilled": lambda: self.distill("tsv"),
                "regmean, distilled": lambda: self.distill(REGMEAN),
            },
            "variants": {
                "inputs weighted by their trace": lambda: self.merge(f"{REGMEAN}:weighting=trace"),
                "inputs of the base model": lambda: merge(source="base"),
                "inputs of the merge, in a second pass": lambda: self.again(REGMEAN, 1),
                "inputs of another task": lambda: merge(shift=1),
            },
            "inputs": {f"{n} inputs": functools.partial(merge, n) for n in plan.numbers},
            "cuts": {
                f"{rules}, {words}": functools.partial(self.cut, rules, metric, **limit)
                for rules in ("tsv", REGMEAN)
                for words, metric, limit in (
                    (f"rank {cut}", False, {"rank": cut}),
                    (f"rank {cut}, in the metric of inputs", True, {"rank": cut}),
                    (f"budget {cut}", False, {"budget": cut}),
                    (f"budget {cut}, in the metric of inputs", True, {"budget": cut}),
                )
            },
        }


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Adds the seconds that it takes to a mapping, under a name."""
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start
