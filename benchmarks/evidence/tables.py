"""The sections of the results as tables."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from common.publish import Sheet

from evidence.methods import Plan
from evidence.results import Row


def notes(plan: Plan, trainings: int, adapters: str) -> str:
    """Returns the meaning of the columns of all tables.

    Args:
        plan: of the merges.
        trainings: of the adapters.
        adapters: a sentence about their ranks.
    """
    many = (
        "There is one training of the adapters."
        if trainings == 1
        else f"Figures are means over {trainings} trainings of the adapters, which differ in "
        "their seeds; *trainings* are the differences of each. Tables without them have fewer."
    )
    return f"""\
Numbers are accuracies on test examples in %. In the tables of merges they are relative to those of
the task's own adapter, and *average* is their mean over tasks, with the interval that holds 95 % of
2000 bootstrap samples of the test examples. *to the sum* is the difference to `{plan.total.rules}`,
*to {plan.tuned.rules}* that to `{plan.tuned.rules}` at the scale that is best on validation
examples, each with its interval on the same samples. Intervals tell what other test examples would
change, not what other trainings would. {many}

{adapters} Every parameter is chosen on validation examples: the scale first, then the others in
turn (arXiv 2509.17786, appendix D.3), except for `mean`, which is the plain average at scale 1.
Test examples decide nothing. If answers are generated, *form* is the share, in %, of those that
begin with a token that a right answer to the task begins with, and *nats* is the mean
log-likelihood of a token of the right answers. With learned coefficients, *parameters* are the
scale that they start from, and the steps after which they were kept.

*Core is better by* is the difference of the averages: the same rule, with parameters chosen in each
space.

*More and more tasks* has averages of some of the tasks, in {plan.orders} random orders, with the
adapters and the examples of these tasks only.

With unlabelled inputs, nothing is chosen by labels, or by validation or test examples: statistics
are those of the first {plan.inputs} training inputs of each task, read by the task's own adapter;
coefficients are learned from the first {plan.taught}. Scales are automatic. *seconds* are those of
each step, the least of the trainings."""


def sheets(result: Mapping[str, Any]) -> list[Sheet]:
    """Returns the tables of all sections that have rows."""
    makers = {
        "tasks": _tasks,
        "paper": partial(_merges, "The paper's rules and spaces"),
        "more": partial(_merges, "Rules from elsewhere, in core space"),
        "small": partial(_merges, "Results of the adapters' rank"),
        "learned": partial(_merges, "Learned coefficients"),
        "mixed": partial(_merges, "Mixed ranks"),
        "differences": _differences,
        "spaces": _spaces,
        "curve": _curve,
        "own adapters": _own,
        "retrained": partial(_merges, "Merges of a few tasks, by training"),
        "unlabelled": partial(_ways, "Merges with unlabelled inputs"),
        "variants": partial(_ways, "Variants of regmean"),
        "inputs": partial(_ways, "Regmean, by the number of inputs of each task"),
        "cuts": partial(_ways, "Cut merges"),
        "scales": _scales,
    }
    return [make(result[name]) for name, make in makers.items() if result.get(name)]


def _tasks(rows: Sequence[Row]) -> Sheet:
    own = [name for name in ("labels", "tokens") if name in rows[0]]
    header = ["task", "from", "licence", *own, *rows[0]["examples"], "base model", "own adapter"]
    lines = [
        [
            *(row["task"], row["from"], row["licence"], *(f"{row[x]}" for x in own)),
            *(f"{count}" for count in row["examples"].values()),
            *(_percent(row[x]) for x in ("base", "own adapter")),
        ]
        for row in rows
    ]
    return Sheet(header, lines, "Tasks", texts=3)


def _own(rows: Sequence[Row]) -> Sheet:
    (row,) = rows
    each = ", ".join(map(_percent, row["trainings"]))
    cells = [*map(_percent, [*row["tasks"].values(), row["test"]]), each]
    header = [*row["tasks"], "average", "trainings"]
    return Sheet(header, [cells], "Accuracy of own adapters, by training", texts=0)


def _merges(title: str, rows: Sequence[Row]) -> Sheet:
    lines = [
        [
            *(row["rule"], row["space"], _parameters(row["parameters"]), f"{row['rank']}"),
            *_average(row),
        ]
        for row in rows
    ]
    header = ["rule", "space", "parameters", "rank", *_average_header(rows[0], "to the sum")]
    return Sheet(header, lines, title, texts=3)


def _parameters(values: Mapping[str, Sequence[float]]) -> str:
    """Returns parameters, each with its value in every training, or in all if it is the same."""
    return ", ".join(
        f"{name} {' / '.join(f'{x:g}' for x in (found if len(set(found)) > 1 else found[:1]))}"
        for name, found in values.items()
    )


def _ways(title: str, rows: Sequence[Row]) -> Sheet:
    lines = [
        [
            *(row["merge"], f"{row['rank']}", *_average(row)),
            ", ".join(f"{name} {value:.0f}" for name, value in row["seconds"].items()),
        ]
        for row in rows
    ]
    header = ["merge", "rank", *_average_header(rows[0], "to tsv"), "seconds"]
    return Sheet(header, lines, title, texts=1)


def _average(row: Row) -> list[str]:
    """Returns the cells of each task, of the average, and of its difference to another merge."""
    parts = map(_percent, [*row["tasks"].values(), row["test"]])
    more = [show(row[name]) for name, show in MORE.items() if name in row]
    return [*parts, _range(row["interval"]), *more, *_difference(row)]


def _average_header(row: Row, to: str) -> list[str]:
    more = [name for name in MORE if name in row]
    return [*row["tasks"], "average", "95 %", *more, *_difference_header(row, to)]


def _difference(row: Row) -> list[str]:
    """Returns the mean difference, its interval, and that of each training if there are several."""
    every = ", ".join(f"{100 * x:+.1f}" for x in row["differences"])
    gain = _range(row["gain"], "+") if any(row["gain"]) else "–"
    several = [every] if len(row["differences"]) > 1 else []
    return [f"{100 * row['difference']:+.1f}", gain, *several]


def _difference_header(row: Row, to: str) -> list[str]:
    return [to, "95 %", *(["trainings"] if len(row["differences"]) > 1 else [])]


def _differences(rows: Sequence[Row]) -> Sheet:
    header = ["rule", "space", *_difference_header(rows[0], "core is better by")]
    lines = [[row["rule"], row["space"], *_difference(row)] for row in rows]
    return Sheet(header, lines, "Core and other spaces")


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
            cells = [_percent(found[x]["test"]) if x in found else "" for x in counts]
            lines.append([rule, f"{order + 1}", *cells])
    header = ["rule", "order", *(f"{count} tasks" for count in counts)]
    return Sheet(header, lines, "More and more tasks")


def _scales(rows: Sequence[Row]) -> Sheet:
    lines = [
        [
            *(row["rule"], f"{row['count']}", f"{row['order'] + 1}"),
            *(", ".join(f"{x:g}" for x in row["scales"]), f"{row['automatic']:.2f}"),
            *(_percent(row["test"]), *_difference(row)),
        ]
        for row in rows
    ]
    header = ["rule", "tasks", "order", "scales by labels", "automatic scale", "average"]
    header += _difference_header(rows[0], "to the scale by labels")
    return Sheet(header, lines, "The automatic scale")


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _nats(value: float) -> str:
    return f"{value:.2f}"


MORE = {"form": _percent, "nats": _nats}
"""Columns of studies whose answers are texts."""


def _range(values: Sequence[float], sign: str = "") -> str:
    low, high = (f"{100 * x:{sign}.1f}" for x in values)
    return f"{low} to {high}"
