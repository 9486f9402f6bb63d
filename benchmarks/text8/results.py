"""The sections of the result, as rows of numbers."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import coremerge_jax as cm
from coremerge_jax.demo.evaluation import parse_chain
from coremerge_jax.recipe import parse_space
from text8 import methods, scoring
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


def collect_unlabelled(study: Study) -> dict[str, list[Row]]:
    """Returns the sections on merges with unlabelled inputs, and on the automatic scale."""
    ranks = dict.fromkeys(study.names, RANK)
    ways = Unlabelled(study, ranks)
    alone = study.alone(ranks, "test")
    tuned = study.measure(methods.TUNED, ranks)
    base = scoring.resampled(tuned["correct"], alone)

    def row(name: str, found: Mapping[str, Any]) -> Row:
        drawn, correct = scoring.resampled(found["correct"], alone), found["correct"]
        return {
            "merge": name,
            "rank": found["rank"],
            "seconds": found.get("seconds", {}),
            "tasks": {x: float(np.mean(y) / np.mean(alone[x])) for x, y in correct.items()},
            "test": scoring.normalized(correct, alone),
            "interval": scoring.interval(drawn),
            "difference": scoring.normalized(correct, alone)
            - scoring.normalized(tuned["correct"], alone),
            "gain": scoring.interval(drawn - base),
        }

    sections = {
        section: [row(name, ways.measure(name, make)) for name, make in made.items()]
        for section, made in ways.rows().items()
    }
    sections["merges"].insert(0, row("tsv, scale by labels", tuned))
    return {**sections, "scales": automatic_scales(study)}


def automatic_scales(study: Study) -> list[Row]:
    """Compares the automatic scale with the one that is best on validation texts."""
    rows = []
    for count in (2, 4, 8):
        for order in range(ORDERS if count < len(study.names) else 1):
            drawn = np.random.default_rng(order).permutation(study.names)[:count]
            ranks = {name: RANK for name in study.names if name in drawn}
            alone = study.alone(ranks, "test")
            for method in methods.SCALED:
                tuned = study.measure(method, ranks)
                auto = study.automatic(method, ranks)
                scores = [scoring.normalized(x["correct"], alone) for x in (tuned, auto)]
                draws = [scoring.resampled(x["correct"], alone) for x in (tuned, auto)]
                rows.append(
                    {
                        "rule": method.rules,
                        "count": count,
                        "order": order,
                        "scale": tuned["parameters"]["scale"],
                        "automatic": auto["scale"],
                        "tuned": scores[0],
                        "test": scores[1],
                        "difference": scores[1] - scores[0],
                        "gain": scoring.interval(draws[1] - draws[0]),
                    }
                )
    return rows


def describe(study: Study, ranks: Mapping[str, int]) -> list[Row]:
    """Describes the tasks, with the accuracy of the base model and of their own adapters."""
    licences = {source.name: source.licence for source in SOURCES}
    base, alone = (scoring.accuracy(x) for x in (study.base(), study.alone(ranks, "test")))
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
        return scoring.resampled(found["correct"], self.alone)

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
            "interval": scoring.interval(drawn),
            "gain": scoring.interval(drawn - self.sum),
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
                core, other = (scoring.normalized(x["correct"], self.alone) for x in found)
                drawn, others = map(self._scores, found)
                rows.append(
                    {
                        "rule": method.rules,
                        "space": method.space,
                        "gain": core - other,
                        "interval": scoring.interval(drawn - others),
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
