"""The sections of the result, as rows of numbers."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from common import scores
from common.scores import Correct

import coremerge_jax as cm
from coremerge_jax.demo.evaluation import parse_chain
from coremerge_jax.recipe import parse_space
from text8 import methods
from text8.methods import Method
from text8.sources import SOURCES
from text8.study import Study, equal
from text8.unlabelled import Unlabelled

RANK, SMALL = 16, 4
"""Ranks of adapters; with mixed ranks, every second task has the small one."""
ORDERS = 2
"""Random orders of the tasks, for the curve."""
SAME = (
    *((rule, "full") for rule in ("task_arithmetic", "tsv", "cart:rank=10", "isotropize")),
    *(("tsv + isotropize", "full"), ("task_arithmetic", "knots"), ("isotropize", "knots")),
)
"""Rules and spaces whose result is that in core space."""
Row = dict[str, Any]


def collect(study: Study) -> dict[str, list[Row]]:
    """Returns all sections by name."""
    ranks = dict.fromkeys(study.names, RANK)
    mixed = {name: (RANK, SMALL)[i % 2] for i, name in enumerate(study.names)}
    compare = Compare(study, ranks)
    return {
        "tasks": describe(study, ranks),
        "paper": compare.rows(methods.PAPER),
        "differences": compare.differences(methods.PAPER),
        "more": compare.rows(methods.MORE),
        "small": compare.rows(methods.SMALL),
        "mixed": Compare(study, mixed).rows(methods.MIXED),
        "spaces": spaces(study, ranks),
        "learned": learned(compare),
        "curve": curve(study),
    }


def collect_unlabelled(studies: Sequence[Study]) -> dict[str, list[Row]]:
    """Returns the sections on merges with unlabelled inputs, and on the automatic scale.

    Args:
        studies: of the same tasks, each with a training of its own. Figures are means over them.
    """
    ranks = dict.fromkeys(studies[0].names, RANK)
    alone = [study.alone(ranks, "test") for study in studies]
    tuned = [study.measure(methods.TUNED, ranks) for study in studies]
    ways = [Unlabelled(study, ranks) for study in studies]

    def row(name: str, found: Sequence[Mapping[str, Any]]) -> Row:
        of_tasks = [_of_tasks(x, own) for x, own in zip(found, alone, strict=True)]
        return {
            "merge": name,
            "rank": found[0]["rank"],
            "seconds": _joined(min, [x.get("seconds", {}) for x in found]),
            "tasks": _joined(np.mean, of_tasks),
            **_against(found, tuned, alone),
        }

    rows = {
        section: [
            row(name, [way.measure(name, way.rows()[section][name]) for way in ways])
            for name in names
        ]
        for section, names in ways[0].rows().items()
    }
    rows["merges"].insert(0, row("tsv, scale by labels", tuned))
    return {**rows, "scales": automatic_scales(studies)}


def _of_tasks(found: Mapping[str, Any], alone: Correct) -> dict[str, float]:
    correct = found["correct"]
    return {name: float(np.mean(correct[name]) / np.mean(alone[name])) for name in correct}


def _joined(join: Callable, found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Returns one number for each key of mappings with the same keys."""
    return {name: float(join([x[name] for x in found])) for name in found[0]}


def _against(
    found: Sequence[Mapping[str, Any]],
    other: Sequence[Mapping[str, Any]],
    alone: Sequence[Correct],
) -> Row:
    """Compares merges with others, training by training.

    Args:
        found: of each training, a result with its answers as ``"correct"``.
        other: those to compare with.
        alone: of each training, the answers of the tasks' own adapters.
    """
    of_both = [
        [scores.normalized(x["correct"], own) for x, own in zip(results, alone, strict=True)]
        for results in (found, other)
    ]
    drawn, drawn_other = (
        np.mean(
            [scores.resampled(x["correct"], own) for x, own in zip(results, alone, strict=True)],
            axis=0,
        )
        for results in (found, other)
    )
    differences = np.subtract(*of_both)
    return {
        "test": float(np.mean(of_both[0])),
        "interval": scores.interval(drawn),
        "trainings": of_both[0],
        "difference": float(np.mean(differences)),
        "gain": scores.interval(drawn - drawn_other),
        "differences": differences.tolist(),
    }


def automatic_scales(studies: Sequence[Study]) -> list[Row]:
    """Compares the automatic scale with the one that is best on validation texts."""
    names = studies[0].names
    rows = []
    for count in (2, 4, 8):
        for order in range(ORDERS if count < len(names) else 1):
            drawn = np.random.default_rng(order).permutation(names)[:count]
            ranks = {name: RANK for name in names if name in drawn}
            alone = [study.alone(ranks, "test") for study in studies]
            for method in methods.SCALED:
                tuned = [study.measure(method, ranks) for study in studies]
                auto = [study.automatic(method, ranks) for study in studies]
                rows.append(
                    {
                        "rule": method.rules,
                        "count": count,
                        "order": order,
                        "scales": [x["parameters"]["scale"] for x in tuned],
                        "automatic": float(np.mean([x["scale"] for x in auto])),
                        **_against(auto, tuned, alone),
                    }
                )
    return rows


def describe(study: Study, ranks: Mapping[str, int]) -> list[Row]:
    """Describes the tasks, with the accuracy of the base model and of their own adapters."""
    licences = {source.name: source.licence for source in SOURCES}
    base, alone = (scores.accuracy(x) for x in (study.base(), study.alone(ranks, "test")))
    return [
        {
            "task": task.name,
            "texts": {x: len(y) for x, y in study.exam.labels[task.name].items()},
            "classes": len(task.prompts),
            "base": base[task.name],
            "own adapter": alone[task.name],
            "from": task.cite,
            "licence": licences[task.source],
        }
        for task, _ in study.tasks
    ]


class Compare:
    """Rows of merges of some adapters, each against their sum.

    Args:
        study: has the adapters.
        ranks: the tasks, and the rank of each adapter.
    """

    def __init__(self, study: Study, ranks: Mapping[str, int]) -> None:
        self.study, self.ranks = study, ranks
        self.alone = study.alone(ranks, "test")
        self.sum = self._scores(study.measure(methods.SUM, ranks))

    def _scores(self, found: Mapping[str, Any]) -> np.ndarray:
        return scores.resampled(found["correct"], self.alone)

    def row(self, method: Method, found: Mapping[str, Any]) -> Row:
        """Returns one row, measured by `Study.measure`."""
        drawn, correct = self._scores(found), found["correct"]
        mean = {x: float(np.mean(y) / np.mean(self.alone[x])) for x, y in correct.items()}
        return {
            "rule": method.rules,
            "space": method.space + (f", cut to {method.cut}" if method.cut else ""),
            "parameters": found["parameters"],
            "rank": found["rank"],
            "validation": found.get("validation"),
            "tasks": mean,
            "test": float(np.mean(list(mean.values()))),
            "interval": scores.interval(drawn),
            "gain": scores.interval(drawn - self.sum),
        }

    def rows(self, chosen: Iterable[Method]) -> list[Row]:
        """Returns the rows of several methods."""
        return [self.row(x, self.study.measure(x, self.ranks)) for x in chosen]

    def differences(self, chosen: Iterable[Method]) -> list[Row]:
        """Returns differences of core space to the other spaces, rule by rule."""
        rows = []
        for method in chosen:
            if method.space != "core":
                pair = (dataclasses.replace(method, space="core"), method)
                found = [self.study.measure(x, self.ranks) for x in pair]
                core, other = (scores.normalized(x["correct"], self.alone) for x in found)
                drawn, others = map(self._scores, found)
                rows.append(
                    {
                        "rule": method.rules,
                        "space": method.space,
                        "gain": core - other,
                        "interval": scores.interval(drawn - others),
                    }
                )
        return rows


def spaces(study: Study, ranks: Mapping[str, int]) -> list[Row]:
    """Returns distances of merges from those in core space that are equal in theory."""
    paths = [study.adapter(name, rank) for name, rank in ranks.items()]
    return [
        {"rule": rule, "space": space, "off": equal(paths, rule, space)} for rule, space in SAME
    ]


def learned(compare: Compare) -> list[Row]:
    """Coefficients learned from validation texts."""
    return [
        compare.row(method, compare.study.learn(method, per, compare.ranks))
        | {"space": f"a coefficient per {per}"}
        for method in methods.LEARNED
        for per in ("adapter", "module")
    ]


def explain(study: Study, rows: Sequence[Row], path: Path) -> None:
    """Writes the report of the merge that was best on validation texts."""
    best = max(rows, key=lambda row: row["validation"])
    adapters = [cm.load_peft(study.adapter(name, RANK)) for name in study.names]
    rule = cm.search.configure(parse_chain(best["rule"]), best["parameters"])
    space = parse_space(best["space"])
    scale = best["parameters"]["scale"]
    merged = cm.merge(adapters, rule, space=space, scale=scale, key=jax.random.key(0))
    named = merged.replace(metadata=dataclasses.replace(merged.metadata, name=best["rule"]))
    cm.diagnose(adapters, named).to_html(path)


def curve(study: Study) -> list[Row]:
    """Measures merges of more and more tasks, in random orders."""
    rows = []
    for order in range(ORDERS):
        names = np.random.default_rng(order).permutation(study.names).tolist()
        for count in range(2, len(names) + 1, 2):
            ranks = {name: RANK for name in study.names if name in names[:count]}
            compare = Compare(study, ranks)
            for row in compare.rows(methods.CURVE):
                rows.append({"order": order, "count": count, **row})
    return rows
