"""Sweeps: what is tried, what it gives, and how it goes on after a kill."""

import csv
import json
import math

import numpy as np
import pytest
import scipy.stats
from helpers import KEY, assert_same, random_adapters, random_inputs, statistics_of
from rich.console import Console

import coremerge_jax as cm
from coremerge_jax import search

SHAPES = {"q": (16, 12), "up": (20, 16)}
RULE = cm.chain(cm.ties(), cm.isotropize())
VALUES = {"scale": [0.5, 1.0, 2.0], "ties.density": [0.3, 0.6]}


@pytest.fixture(scope="module")
def adapters():
    return random_adapters(SHAPES, (2, 4, 3))


def size(adapter):
    return float(sum(np.linalg.norm(lora.dense()) for lora in adapter.values()))


def test_a_grid_evaluates_what_merge_gives(adapters):
    seen = []
    result = search.sweep(adapters, RULE, lambda x: seen.append(x) or size(x), VALUES)
    assert [(x.scale, x.parameters["ties.density"]) for x in result] == [
        (scale, density) for density in (0.3, 0.6) for scale in (0.5, 1.0, 2.0)
    ]
    for record, merged in zip(result, seen, strict=True):
        expected = cm.merge(adapters, record.rule, scale=record.scale)
        assert_same(merged, expected, 1e-12)
        assert record.metrics == {"score": pytest.approx(size(expected))}
    assert result.best.metrics["score"] == max(x.metrics["score"] for x in result)


def test_what_is_not_varied_stays(adapters):
    rule = cm.chain(cm.dare(drop=0.4), cm.ties(density=0.7, elect="count"))
    (record,) = search.sweep(adapters, rule, size, {"ties.density": [0.5]}, key=KEY)
    assert record.rule == cm.chain(cm.dare(drop=0.4), cm.ties(density=0.5, elect="count"))
    assert record.metrics["score"] == pytest.approx(size(cm.merge(adapters, record.rule, key=KEY)))


def test_parameters_that_are_not_numbers(adapters):
    values = {"ties.elect": ["count"], "ties.weights": [None, (1.0, 2.0, 0.5)]}
    for record in search.sweep(adapters, cm.ties(), size, values):
        assert record.metrics["score"] == pytest.approx(size(cm.merge(adapters, record.rule)))


def test_a_rule_that_is_there_twice():
    rule = cm.chain(cm.flatten(), cm.tsv(), cm.flatten(power=0.3))
    assert search.parameters(rule) == {
        "flatten[0].power": 0.5,
        "tsv.rank": None,
        "flatten[1].power": 0.3,
    }
    changed = search.configure(rule, {"flatten[1].power": 0.0, "scale": 2.0})
    assert changed == cm.chain(cm.flatten(), cm.tsv(), cm.flatten(power=0.0))


def test_several_rules_take_the_parameters_that_they_have(adapters):
    rules = {"trimmed": cm.ties(), "tsv": cm.tsv()}
    result = search.sweep(adapters, rules, size, VALUES)
    assert [x.name for x in result] == ["trimmed"] * 6 + ["tsv"] * 3
    assert all(set(x.parameters) == {"scale"} for x in result if x.name == "tsv")
    assert result.columns == ["rule", "scale", "ties.density", "score", "seconds"]


def test_line_search_goes_on_while_it_gets_better(adapters):
    """Scores as of a mountain whose top is at scale 0.4 and density 0.5."""
    tried = []

    def judge(merged):
        tried.append(merged)
        return 0.0

    scores = {0.1: 1, 0.2: 3, 0.3: 2, 0.4: 5, 0.5: 4, 0.6: 3, 0.7: 9}
    proposals = search.line(patience=2).propose({"scale": list(scores), "ties.density": [0.5, 0.9]})
    proposed, score = [], None
    while True:
        try:
            candidate = proposals.send(score)
        except StopIteration:
            break
        proposed.append(candidate)
        score = scores[candidate["scale"]] - candidate.get("ties.density", 0)
    assert [x["scale"] for x in proposed] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.4, 0.4]
    assert [x.get("ties.density") for x in proposed] == [None] * 6 + [0.5, 0.9]
    result = search.sweep(adapters, RULE, judge, VALUES, method=search.line(patience=1))
    assert len(result) == len(tried) == 4  # two scales and two densities, all alike


def test_a_candidate_is_evaluated_once(adapters):
    values = {"scale": [1.0, 1.0], "ties.density": [RULE.reducer.density]}
    assert len(search.sweep(adapters, RULE, size, values, method=search.line())) == 1


def test_random_combinations(adapters):
    drawn = [
        list(search.random(trials=5, seed=seed).propose({"a": range(4), "b": range(3)}))
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len({tuple(x.values()) for x in drawn[0]}) == 5
    assert len(list(search.random(trials=50).propose({"a": range(4), "b": range(3)}))) == 12
    values = {"scale": scipy.stats.loguniform(0.1, 10), "ties.density": [0.3, 0.6]}
    result = search.sweep(adapters, RULE, size, values, method=search.random(trials=8))
    scales = [x.scale for x in result]
    assert len(set(scales)) == 8
    assert all(0.1 <= scale <= 10 for scale in scales)


def test_objective(adapters):
    def judge(merged):
        found = size(merged)
        return {"size": found, "far": abs(found - 20), "odd": math.nan if found > 20 else found}

    scales = {"scale": [0.1, 0.5, 5.0]}
    best = {
        (name, maximize): search.sweep(
            adapters,
            cm.mean(),
            judge,
            scales,
            objective=name,
            maximize=maximize,
        ).best.scale
        for name, maximize in (("size", True), ("size", False), ("odd", True), ("odd", False))
    }
    assert best["size", True] == 5.0
    assert best["size", False] == best["odd", False] == 0.1
    assert best["odd", True] < 5.0  # NaN is worst
    with pytest.raises(cm.RecipeError, match="unknown metric 'siz'; did you mean 'size'"):
        search.sweep(adapters, cm.mean(), judge, {"scale": [1.0]}, objective="siz")


class KilledError(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("torn", ["", '{"rule": "ties + iso'])
@pytest.mark.parametrize("method", [search.grid(), search.line(), search.random(trials=5)])
def test_a_sweep_that_was_killed_goes_on(adapters, tmp_path, method, torn):
    log = tmp_path / "sweep.jsonl"
    whole = search.sweep(adapters, RULE, size, VALUES, method=method)
    count = 0

    def judge(merged):
        nonlocal count
        count += 1
        if count == 3:
            raise KilledError
        return size(merged)

    with pytest.raises(KilledError):
        search.sweep(adapters, RULE, judge, VALUES, method=method, log=log)
    with log.open("a") as file:
        file.write(torn)
    again = search.sweep(adapters, RULE, judge, VALUES, method=method, log=log)
    assert count == len(whole) + 1
    assert [(x.parameters, x.metrics) for x in again] == [(x.parameters, x.metrics) for x in whole]
    assert len(log.read_text().splitlines()) == 1 + len(whole)
    third = search.sweep(adapters, RULE, judge, VALUES, method=method, log=log)
    assert count == len(whole) + 1
    assert third.rows() == again.rows()


@pytest.mark.parametrize("method", [search.grid(), search.line(), search.random()], ids=str)
def test_a_rule_without_a_searched_parameter_is_tried_once(adapters, method):
    rules = {"tsv": cm.tsv(), "ties": cm.ties()}
    found = search.sweep(adapters, rules, size, {"ties.density": [0.3, 0.6]}, method=method)
    assert sorted(record.name for record in found) == ["ties", "ties", "tsv"]
    assert len(search.sweep(adapters, cm.tsv(), size, {}, method=method)) == 1


def test_a_log_of_another_sweep_is_refused(adapters, tmp_path):
    log = tmp_path / "sweep.jsonl"
    statistics = statistics_of(adapters, random_inputs(adapters))
    search.sweep(adapters, RULE, size, VALUES, log=log)
    more = {"scale": [3.0], "ties.density": [0.3]}
    assert len(search.sweep(adapters, RULE, size, more, log=log)) == 1  # other values may be added
    before = log.read_bytes()
    for other, match in (
        ({"rules": cm.tsv()}, "other rules"),
        ({"adapters": cm.project(adapters, space=cm.full())}, "other space"),
        ({"key": KEY}, "other key"),
        ({"adapters": random_adapters(SHAPES, (2, 4, 3), seed=1)}, "other adapters"),
        ({"adapters": cm.project(adapters, weights=[1, -1, 1])}, "adapters or weights"),
        ({"adapters": cm.project(adapters, statistics=statistics)}, "other statistics"),
        ({"adapters": adapters[:2]}, "another number"),
    ):
        given = {"adapters": adapters, "rules": RULE, **other}
        with pytest.raises(cm.MismatchError, match=match):
            search.sweep(evaluate=size, values={"scale": [1.0]}, log=log, **given)
    assert log.read_bytes() == before
    for text in ("scale,score\n", '{"a": 1}\n', "[]\n"):
        log.write_text(text)
        with pytest.raises(cm.FormatError, match=r"sweep\.jsonl: not the log of a sweep"):
            search.sweep(adapters, RULE, size, VALUES, log=log)
        assert log.read_text() == text


def test_what_is_refused(adapters):
    for values, match in (
        ({"ties.densiti": [0.1]}, "unknown parameter 'ties.densiti'; did you mean 'ties.density'"),
        ({"ties.density": []}, "values of 'ties.density': expected at least one"),
        ({"ties.density": [0.5, 2.0]}, r"ties.density: density=2.0: expected a share in"),
        ({"scale": scipy.stats.uniform()}, "are a distribution; only random"),
    ):
        with pytest.raises(ValueError, match=match):
            search.sweep(adapters, RULE, size, values)
    with pytest.raises(cm.RecipeError, match="unknown parameter of 'tsv'"):
        search.configure(cm.tsv(), {"density": 1})
    with pytest.raises(ValueError, match=r"pass key=jax\.random\.key"):
        search.sweep(adapters, cm.dare(), size, {"scale": [1.0]})
    for method in (search.line, search.random):
        with pytest.raises(ValueError, match="=0: expected a whole number"):
            method(0)


NAN = math.nan


@pytest.mark.parametrize(
    ("result", "match"),
    [
        (None, "gave None as 'a score'; expected a number"),
        ("0.5", "gave '0.5' as 'a score'"),
        (1j, "gave 1j as 'a score'"),
        ([0.5, 0.6], "gave list as 'a score'"),
        ({}, "gave no metrics"),
        ({"a": None}, "gave None as 'a'"),
        ({1: 0.5}, "gave 0.5 as 1; expected"),
    ],
)
def test_what_is_no_number_is_refused_with_its_candidate(adapters, result, match):
    with pytest.raises(cm.RecipeError, match=f"evaluate, with .'scale': 0.5.: {match}"):
        search.sweep(adapters, cm.mean(), lambda _: result, {"scale": [0.5]})


def test_metrics_of_other_names_are_refused(adapters):
    names = iter("ab")
    with pytest.raises(cm.RecipeError, match=r"'scale': 1.0.*gave metrics \['b'\], and \['a'\]"):
        search.sweep(adapters, cm.mean(), lambda _: {next(names): 1.0}, {"scale": [0.5, 1.0]})


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
def test_what_is_not_finite_is_never_the_best(adapters, tmp_path, value):
    values = {"scale": [0.5, 1.0, 2.0]}
    for maximize in (True, False):
        scores = iter([value, 3.0, value])
        result = search.sweep(
            adapters, cm.mean(), lambda _, x=scores: next(x), values, maximize=maximize
        )
        assert result.best.scale == 1.0
        assert result.summary() == "3 candidates, best score 3, 2 not finite"
        assert len(result.to_csv().splitlines()) == 4
    log = tmp_path / "sweep.jsonl"
    for _ in range(2):  # also if they are read again
        with pytest.raises(cm.FormatError, match="none of 3 candidates has a finite 'score'"):
            search.sweep(adapters, cm.mean(), lambda _: value, values, log=log)


@pytest.mark.parametrize(
    "line",
    [
        '{"rule": "mean", "parameters": {"scale": 0.5}, "metrics": {"score": "1"}, "seconds": 0}',
        '{"rule": "mean", "parameters": {"scale": 0.5}, "metrics": {"score": null}, "seconds": 0}',
        '{"rule": "mean", "parameters": {"scale": 0.5}, "metrics": [1], "seconds": 0}',
        '{"rule": "mean", "parameters": 3, "metrics": {"score": 1}, "seconds": 0}',
        '{"rule": "mean", "parameters": {"scale": 0.5}, "metrics": {"score": 1}, "seconds": "x"}',
        "[1, 2]",
        "3",
        "NaN",
        "[" * 100_000,
        "\x00",
    ],
)
def test_a_log_with_values_of_other_kinds_is_refused(adapters, tmp_path, line):
    log = tmp_path / "sweep.jsonl"
    projected = cm.project(adapters)
    search.sweep(projected, cm.mean(), size, {"scale": [1.0]}, log=log)
    header = log.read_text().splitlines()[0]
    for text in (f"{header}\n{line}\n", f"{line}\n", f'{{"sweep": {line}, "traits": {line}}}\n'):
        log.write_text(text)
        with pytest.raises(cm.CoreMergeError, match=r"sweep\.jsonl: "):
            search.sweep(projected, cm.mean(), size, {"scale": [0.5]}, log=log)
        assert log.read_text() == text


def test_arguments_of_other_kinds_are_named(adapters):
    for given, match in (
        ({"rules": "mean"}, "expected a merge rule"),
        ({"rules": {}}, "rules: got none"),
        ({"evaluate": 3}, "evaluate: expected a function, got 3"),
        ({"values": [1]}, "values: expected lists by name"),
        ({"values": {"scale": 1j}}, "values of 'scale': expected a list"),
        ({"values": {"scale": [NAN]}}, "scale=nan: expected a finite number"),
        ({"values": {"scale": ["1"]}}, "scale='1': expected a number"),
        ({"method": "grid"}, r"method: expected grid\(\), line\(\) or random\(\), got 'grid'"),
        ({"adapters": "x"}, "expected a list of adapters"),
    ):
        start = {"adapters": adapters, "rules": cm.mean(), "evaluate": size}
        with pytest.raises(cm.CoreMergeError, match=match):
            search.sweep(**start | {"values": {"scale": [1.0]}} | given)


def test_csv_and_table(adapters, tmp_path):
    result = search.sweep(adapters, RULE, size, VALUES)
    assert result.to_csv(tmp_path / "sweep.csv") == (tmp_path / "sweep.csv").read_text()
    rows = list(csv.DictReader((tmp_path / "sweep.csv").read_text().splitlines()))
    assert [float(row["score"]) for row in rows] == [x.metrics["score"] for x in result]
    assert list(rows[0]) == ["rule", "scale", "ties.density", "score", "seconds"]
    assert json.loads(json.dumps(result.rows())) == result.rows()
    console = Console(width=100)
    with console.capture() as capture:
        console.print(result.table(2))
    title, header, *shown = [line.split() for line in capture.get().splitlines()]
    assert title == ["ties", "+", "isotropize"]
    assert header == ["scale", "ties.density", "score"]
    assert [float(row[-1]) for row in shown] == [
        pytest.approx(x.metrics["score"], rel=1e-3) for x in result.top(2)
    ]


def test_plot(adapters, tmp_path):
    result = search.sweep(adapters, {"a": RULE, "b": cm.tsv()}, size, VALUES | {"tsv.rank": [1, 2]})
    figure = result.plot(tmp_path / "sweep.svg")
    assert [axes.get_xlabel() for axes in figure.axes] == ["scale", "ties.density", "tsv.rank"]
    line = figure.axes[0].lines[1]  # the best at each scale, behind the points
    best = {}
    for record in result:
        if record.name == "a":
            score = record.metrics["score"]
            best[record.scale] = max(score, best.get(record.scale, score))
    assert dict(zip(line.get_xdata(), line.get_ydata(), strict=True)) == best
    assert "ties.density" in (tmp_path / "sweep.svg").read_text()


def test_values_may_be_any_iterables_of_anything(adapters):
    found = search.sweep(adapters, cm.mean(), size, {"scale": (x / 2 for x in (1, 2))})
    assert [record.parameters["scale"] for record in found] == [0.5, 1.0]
    weights = [np.array([1.0, 2.0, 3.0]), (1.0, 1.0, 1.0)]
    for method in (search.grid(), search.random(trials=2)):
        values = {"task_arithmetic.weights": weights}
        found = search.sweep(adapters, cm.task_arithmetic(), size, values, method=method)
        assert len(found) == 2


def test_two_processes_do_not_share_a_log(adapters, tmp_path):
    log = tmp_path / "log.jsonl"
    started = []

    def judge(adapter):
        if not started:
            started.append(True)
            with pytest.raises(cm.MismatchError, match="another sweep is writing its log here"):
                search.sweep(adapters, RULE, size, VALUES, log=log)
        return size(adapter)

    first = search.sweep(adapters, RULE, judge, VALUES, log=log)
    again = search.sweep(adapters, RULE, size, VALUES, log=log)
    assert len(first) == len(again) == 6
    assert len(log.read_text().splitlines()) == 7
