"""The sections of the result as tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from common.publish import Sheet

from text8.results import ORDERS, RANK, SMALL, Row
from text8.unlabelled import INPUTS, LEARNED

NOTES = f"""\
Numbers are accuracies on test texts in %. In the tables of merges they are relative to those of
the task's own adapter, and *average* is their mean over tasks, with the interval that holds 95 % of
2000 bootstrap samples of the test texts; *to the sum* is that of the difference to
`task_arithmetic`, on the same samples. They tell what other test texts would change, not what other
trainings would.

Every parameter is chosen on validation texts, 200 a task: the scale first, then the others in
turn (arXiv 2509.17786, appendix D.3), except for `mean`, which is the plain average at scale 1.
Test texts decide nothing. Adapters have rank {RANK}; with mixed ranks every second one has rank
{SMALL}, from the second on. With learned coefficients, *parameters* are the scale that they start
from, and the steps after which they were kept.

*Core is better by* is the difference of the averages: the same rule, with parameters chosen in each
space.

The last table has averages of some of the tasks, in {ORDERS} random orders, with the adapters and
the texts of these tasks only."""


def sheets(result: Mapping[str, list[Row]]) -> list[Sheet]:
    """Returns all tables."""
    merged = {
        "paper": "The paper's rules and spaces",
        "more": "Rules from elsewhere, in core space",
        "small": f"Results of rank {RANK}",
        "learned": "Learned coefficients",
        "mixed": f"Mixed ranks: every second adapter has rank {SMALL}",
    }
    return [
        _tasks(result["tasks"]),
        *(_merges(title, result[name]) for name, title in merged.items()),
        _differences(result["differences"]),
        _spaces(result["spaces"]),
        _curve(result["curve"]),
    ]


UNLABELLED_NOTES = f"""\
Averages over tasks of the accuracy on test texts relative to that of the task's own adapter, in %,
with the interval that holds 95 % of 2000 bootstrap samples of the test texts; *to tsv* is the
difference to `tsv` at the scale that is best on labelled validation texts, on the same samples.
All figures are means over trainings of the eight adapters, which differ in their seeds;
*trainings* are the differences of each.

All else is chosen without labels and without validation or test texts: statistics are those of the
first {INPUTS} training texts of each task, read by the task's own adapter; coefficients are learned
from the first {LEARNED}. Scales are automatic. *seconds* are those of each step,
the least of the trainings."""


def unlabelled_sheets(result: Mapping[str, list[Row]]) -> list[Sheet]:
    """Returns the tables of merges with unlabelled inputs, and of the automatic scale."""
    titles = {
        "merges": "Merges with unlabelled inputs",
        "variants": "Variants of regmean",
        "curve": "Regmean, by the number of inputs of each task",
        "cuts": "Cut merges",
    }
    return [
        *(_ways(title, result[name]) for name, title in titles.items()),
        _scales(result["scales"]),
    ]


def _ways(title: str, rows: Sequence[Row]) -> Sheet:
    lines = [
        [
            *(row["merge"], f"{row['rank']}"),
            *map(_percent, [*row["tasks"].values(), row["test"]]),
            *(_range(row["interval"]), *_difference(row)),
            ", ".join(f"{name} {value:.0f}" for name, value in row["seconds"].items()),
        ]
        for row in rows
    ]
    header = ["merge", "rank", *rows[0]["tasks"], "average", "95 %"]
    return Sheet([*header, "to tsv", "95 %", "trainings", "seconds"], lines, title)


def _difference(row: Row) -> list[str]:
    """Returns the mean difference, its interval, and that of each training."""
    every = ", ".join(f"{100 * x:+.1f}" for x in row["differences"])
    gain = _range(row["gain"], "+") if any(row["gain"]) else "–"
    return [f"{100 * row['difference']:+.1f}", gain, every]


def _scales(rows: Sequence[Row]) -> Sheet:
    lines = [
        [
            *(row["rule"], f"{row['count']}", f"{row['order'] + 1}"),
            *(", ".join(f"{x:g}" for x in row["scales"]), f"{row['automatic']:.2f}"),
            *(_percent(row["test"]), *_difference(row)),
        ]
        for row in rows
    ]
    header = ["rule", "tasks", "order", "scales by labels", "automatic scale"]
    header += ["average", "to the scale by labels", "95 %", "trainings"]
    return Sheet(header, lines, "The automatic scale")


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _range(values: Sequence[float], sign: str = "") -> str:
    low, high = (f"{100 * x:{sign}.1f}" for x in values)
    return f"{low} to {high}"


def _tasks(rows: Sequence[Row]) -> Sheet:
    header = ["task", "from", "licence", "labels", "train", "validation", "test"]
    lines = [
        [
            *(row["task"], row["from"], row["licence"], f"{row['classes']}"),
            *(f"{count}" for count in row["texts"].values()),
            *(_percent(row[x]) for x in ("base", "own adapter")),
        ]
        for row in rows
    ]
    return Sheet([*header, "base model", "own adapter"], lines, "Tasks", texts=3)


def _merges(title: str, rows: Sequence[Row]) -> Sheet:
    header = ["rule", "space", "parameters", "rank", *rows[0]["tasks"]]
    lines = [
        [
            *(row["rule"], row["space"], _parameters(row["parameters"]), f"{row['rank']}"),
            *map(_percent, [*row["tasks"].values(), row["test"]]),
            *(_range(row["interval"]), _range(row["gain"], "+") if any(row["gain"]) else "–"),
        ]
        for row in rows
    ]
    return Sheet([*header, "average", "95 %", "to the sum"], lines, title, texts=3)


def _parameters(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in values.items())


def _differences(rows: Sequence[Row]) -> Sheet:
    lines = [
        [row["rule"], row["space"], f"{100 * row['gain']:+.1f}", _range(row["interval"], "+")]
        for row in rows
    ]
    return Sheet(["rule", "space", "core is better by", "95 %"], lines, "Core and other spaces")


def _spaces(rows: Sequence[Row]) -> Sheet:
    lines = [[row["rule"], row["space"], f"{row['off']:.0e}"] for row in rows]
    title = "The same as in core space"
    return Sheet(["rule", "space", "relative distance"], lines, title)


def _curve(rows: Sequence[Row]) -> Sheet:
    counts = sorted({row["count"] for row in rows})
    lines = []
    for rule in dict.fromkeys(row["rule"] for row in rows):
        for order in sorted({row["order"] for row in rows}):
            found = {x["count"]: x for x in rows if (x["rule"], x["order"]) == (rule, order)}
            cells = [_percent(found[count]["test"]) for count in counts]
            lines.append([rule, f"{order + 1}", *cells])
    header = ["rule", "order", *(f"{count} tasks" for count in counts)]
    return Sheet(header, lines, "More and more tasks")
