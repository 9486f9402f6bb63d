"""The sections of the results, as rows of numbers."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from common import scores
from common.progress import Progress
from common.scores import Correct
from common.steps import MissingError, reading

import coremerge_jax as cm
from coremerge_jax.demo.evaluation import parse_chain
from coremerge_jax.recipe import parse_space
from evidence.base import Study
from evidence.methods import Method
from evidence.unlabelled import Unlabelled

Row = dict[str, Any]
Sections = Mapping[str, Sequence[Callable[[], Row]]]
"""By name of a section, functions that return its rows. They do what is not done yet."""
Found = Sequence[Mapping[str, Any]]
"""Results as `Study.tested` returns them, one of each training."""


def work(title: str, sections: Sections, say: Callable[[str], object]) -> None:
    """Does what is not done yet, and tells the time that is left."""
    left = _left(job for jobs in sections.values() for job in jobs)
    progress, done = Progress(title, say, every=0), 0
    while left:
        left[0]()
        left, done = _left(left[1:]), done + 1  # rows share what they compare
        progress(done, done + len(left))


def _left(jobs: Iterable[Callable[[], Row]]) -> list[Callable[[], Row]]:
    with reading():
        return [job for job in jobs if not any(_available([job]))]


def collect(sections: Sections) -> dict[str, list[Row]]:
    """Returns the rows of all sections; while `reading`, without those that are not done yet."""
    return {name: list(_available(jobs)) for name, jobs in sections.items()}


def _available(jobs: Iterable[Callable[[], Row]]) -> Iterator[Row]:
    for job in jobs:
        with contextlib.suppress(MissingError):
            yield job()


# --- Sections ----------------------------------------------------------------------------------
# Studies are of the same tasks, each with a training of its own. Figures are means over them.


def tasks(studies: Sequence[Study]) -> Sections:
    """Describes the tasks, with the accuracy of the base model and of their own adapters."""

    def row(name: str) -> Row:
        own = [study.alone([name], "test") for study in studies]
        return {
            "task": name,
            **studies[0].describe(name),
            "base": scores.accuracy(studies[0].base())[name],
            "own adapter": _mean([scores.accuracy(x)[name] for x in own]),
        }

    return {"tasks": [partial(row, name) for name in studies[0].names]}


def merges(studies: Sequence[Study]) -> Sections:
    """Compares rules and spaces, and learned coefficients, with the sum."""
    plan = studies[0].plan
    compare = Compare(studies, plan.total)
    return {
        "paper": compare.rows(plan.paper),
        "differences": compare.differences(plan.paper),
        "learned": [partial(compare.learned, *pair) for pair in plan.learned],
        "more": compare.rows(plan.more),
        "small": compare.rows(plan.small),
        "spaces": [partial(_distance, studies, *pair) for pair in plan.same],
    }


def _distance(studies: Sequence[Study], rules: str, space: str) -> Row:
    off = max(study.distance(rules, space)["off"] for study in studies)
    return {"rule": rules, "space": space, "off": off}


def mixed(studies: Sequence[Study]) -> Sections:
    """Compares merges of adapters of mixed ranks with their sum."""
    others = [study.mixed() for study in studies]
    plan = others[0].plan
    return {"mixed": Compare(others, plan.total).rows(plan.mixed)}


def counts(studies: Sequence[Study]) -> Sections:
    """Compares merges of more and more tasks with their sum."""
    plan = studies[0].plan

    def row(count: int, order: int, compare: "Compare", method: Method) -> Row:
        return {"order": order, "count": count, **compare.measured(method)}

    return {
        "curve": [
            partial(row, count, order, compare, method)
            for count, order, names in _choices(studies[0], plan.counts)
            for compare in [Compare(studies, plan.total, names)]
            for method in plan.curve
        ]
    }


def scales(studies: Sequence[Study]) -> Sections:
    """Compares the automatic scale with the one that is best on validation texts."""
    plan = studies[0].plan

    def row(count: int, order: int, names: Sequence[str], method: Method) -> Row:
        compare = Compare(studies, method, names)
        found = [study.automatic(method, names) for study in studies]
        tuned = [x["parameters"]["scale"] for x in compare.other]
        scale = _mean([x["scale"] for x in found])
        more = {"count": count, "order": order, "scales": tuned, "automatic": scale}
        return {"rule": method.rules, **more, **compare.row(found)}

    return {
        "scales": [
            partial(row, count, order, names, method)
            for count, order, names in _choices(studies[0], plan.few)
            for method in plan.scaled
        ]
    }


def retrained(studies: Sequence[Study]) -> Sections:
    """Compares merges of a few tasks' adapters, training by training, if there are several."""
    if len(studies) == 1:
        return {}
    plan = studies[0].plan
    compare = Compare(studies, plan.total, plan.retrained)

    def own() -> Row:
        each = [scores.accuracy(x) for x in compare.alone]
        means = [_mean([*x.values()]) for x in each]
        return {"tasks": _joined(_mean, each), "test": _mean(means), "trainings": means}

    measure = _with_inputs(studies, plan.retrained)

    def with_inputs(name: str) -> Row:
        row = compare.row(measure("unlabelled", name))
        return {"rule": name, "space": "core, unlabelled inputs", **row}

    rows = compare.rows(plan.curve)
    rows += [partial(with_inputs, name) for name in plan.retrained_with_inputs]
    return {"own adapters": [own], "retrained": rows}


def _choices(study: Study, numbers: Iterable[int]) -> Iterator[tuple[int, int, list[str]]]:
    """Yields numbers of tasks, the number of a random order, and the first tasks of that."""
    every = study.names
    for count in numbers:
        for order in range(study.plan.orders if count < len(every) else 1):
            drawn = np.random.default_rng(order).permutation(every)[:count]
            yield count, order, [name for name in every if name in drawn]


def unlabelled(studies: Sequence[Study]) -> Sections:
    """Compares merges with unlabelled inputs with one whose scale is best on labelled texts."""
    plan, names = studies[0].plan, studies[0].names
    compare = Compare(studies, plan.tuned)
    measure = _with_inputs(studies, names)

    def row(section: str, name: str) -> Row:
        return {"merge": name, **compare.row(measure(section, name))}

    def tuned() -> Row:
        return {"merge": f"{plan.tuned.rules}, scale by labels", **compare.row(compare.other)}

    rows = {
        section: [partial(row, section, name) for name in made]
        for section, made in Unlabelled(studies[0], names).rows().items()
    }
    return {**rows, "unlabelled": [tuned, *rows["unlabelled"]]}


def _with_inputs(studies: Sequence[Study], names: Sequence[str]) -> Callable[[str, str], Found]:
    """Returns a function that measures merges with unlabelled inputs, by section and name."""
    ways = [Unlabelled(study, names) for study in studies]
    return lambda section, name: [x.measure(name, x.rows()[section][name]) for x in ways]


# --- Rows --------------------------------------------------------------------------------------
class Compare:
    """Rows of merges of some tasks' adapters, each against another merge of them.

    Args:
        studies: one for each training.
        method: the other merge.
        names: of the tasks, by default all.
    """

    def __init__(
        self, studies: Sequence[Study], method: Method, names: Sequence[str] | None = None
    ) -> None:
        self._studies, self._method = studies, method
        self._names = list(names or studies[0].names)

    @cached_property
    def alone(self) -> list[Correct]:
        """Returns, of each training, the answers of the tasks' own adapters."""
        return [study.alone(self._names, "test") for study in self._studies]

    @cached_property
    def other(self) -> Found:
        """Returns the results of the other merge."""
        return self._measure(self._method)

    def _measure(self, method: Method) -> Found:
        return [study.measure(method, self._names) for study in self._studies]

    def row(self, found: Found) -> Row:
        """Returns the row of a merge."""
        shares = [_shares(x["correct"], own) for x, own in zip(found, self.alone, strict=True)]
        row = {"tasks": _joined(_mean, shares), **self._against(found, self.other)}
        if "rank" in found[0]:
            row["rank"] = found[0]["rank"]
        for name in ("form", "nats"):
            if name in found[0]:
                row[name] = _mean([_mean([*x[name].values()]) for x in found])
        if "validation" in found[0]:
            row["validation"] = _mean([x["validation"] for x in found])
        row["parameters"] = _joined(list, [x.get("parameters", {}) for x in found])
        row["seconds"] = _joined(min, [x.get("seconds", {}) for x in found])
        return row

    def _against(self, found: Found, other: Found) -> Row:
        """Compares merges with others, training by training."""
        results = [
            [scores.normalized(x["correct"], own) for x, own in zip(y, self.alone, strict=True)]
            for y in (found, other)
        ]
        drawn, others = (
            np.mean(
                [scores.resampled(x["correct"], own) for x, own in zip(y, self.alone, strict=True)],
                axis=0,
            )
            for y in (found, other)
        )
        differences = np.subtract(*results)
        return {
            "test": _mean(results[0]),
            "interval": scores.interval(drawn),
            "trainings": results[0],
            "difference": _mean(differences),
            "gain": scores.interval(drawn - others),
            "differences": differences.tolist(),
        }

    def measured(self, method: Method) -> Row:
        """Returns the row of a method."""
        space = method.space + (f", cut to {method.cut}" if method.cut else "")
        return {"rule": method.rules, "space": space, **self.row(self._measure(method))}

    def rows(self, methods: Iterable[Method]) -> list[Callable[[], Row]]:
        """Returns functions that return the rows of methods."""
        return [partial(self.measured, method) for method in methods]

    def learned(self, method: Method, per: str) -> Row:
        """Returns the row of a rule with learned coefficients."""
        found = [study.learn(method, per, self._names) for study in self._studies]
        return {"rule": method.rules, "space": f"a coefficient per {per}", **self.row(found)}

    def differences(self, methods: Iterable[Method]) -> list[Callable[[], Row]]:
        """Returns functions that compare core space with the other spaces, rule by rule."""

        def row(method: Method) -> Row:
            core = self._measure(dataclasses.replace(method, space="core"))
            pair = {"rule": method.rules, "space": method.space}
            return {**pair, **self._against(core, self._measure(method))}

        return [partial(row, method) for method in methods if method.space != "core"]


def _shares(correct: Correct, alone: Correct) -> dict[str, float]:
    """Returns the accuracy over that of the task's own adapter, by task."""
    return {name: _mean(x) / _mean(alone[name]) for name, x in correct.items()}


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _joined(join: Callable, found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns joint values for each key of mappings with the same keys."""
    return {name: join([x[name] for x in found]) for name in found[0]}


def explain(study: Study, rows: Sequence[Row], path: Path) -> None:
    """Writes the report of the merge that was best on validation texts."""
    best = max(rows, key=lambda row: row["validation"])
    values = {name: value for name, (value,) in best["parameters"].items()}
    adapters = study.adapters(study.names)
    rule = cm.search.configure(parse_chain(best["rule"]), values)
    merged = cm.merge(
        adapters,
        rule,
        space=parse_space(best["space"]),
        scale=values["scale"],
        key=jax.random.key(0),
    )
    named = merged.replace(metadata=dataclasses.replace(merged.metadata, name=best["rule"]))
    cm.diagnose(adapters, named).to_html(path)
