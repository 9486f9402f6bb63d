"""Sweeps over the parameters of merges, on adapters that are projected once."""

import csv
import dataclasses
import io
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from rich.console import Console, JustifyMethod
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from coremerge_jax.errors import FormatError, RecipeError, unknown
from coremerge_jax.io.atomic import atomic_file
from coremerge_jax.lora import Adapter
from coremerge_jax.merging.checks import check_function, check_scale
from coremerge_jax.merging.projected import Projected, Updates, project
from coremerge_jax.rules import Chain, as_rule, chain
from coremerge_jax.rules.rule import AUTO
from coremerge_jax.search.log import Log, identity
from coremerge_jax.search.methods import Grid, Method, listed
from coremerge_jax.search.parameters import (
    SCALE,
    Choices,
    Distribution,
    MergeRule,
    Parameters,
    configure,
    label,
    parameters,
)
from coremerge_jax.text import display, printable, short

if TYPE_CHECKING:  # an optional library
    from matplotlib.figure import Figure

Metrics = float | Mapping[str, float]

TABLE_MARK = re.compile(rb"\Arule,[^\n]*\bseconds\n")
"""The header of a table of records, by which `Sweep.to_csv` knows its own files."""


@contextmanager
def progress_line(text: str, wanted: bool) -> Iterator[Callable[[str], None]]:
    """Shows a line on stderr, where that is a terminal; the yielded function changes its text."""
    console = Console(stderr=True)
    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    hidden = not (wanted and console.is_terminal)
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(text)
        yield lambda text: bar.update(task, description=display(text, 200))


@dataclasses.dataclass(frozen=True)
class Record:
    """A candidate and its scores.

    Attributes:
        name: the name of the rule.
        rule: the rule, with the candidate's parameters.
        parameters: their values by name.
        metrics: the scores by name.
        seconds: time for merging and evaluating.
    """

    name: str
    rule: Chain
    parameters: Parameters
    metrics: Mapping[str, float]
    seconds: float

    @property
    def scale(self) -> float | str:
        """The factor of the merged update, or ``"auto"``."""
        return self.parameters.get(SCALE, AUTO)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Records of a sweep.

    Attributes:
        records: the candidates, in the order of evaluation.
        objective: the metric that is compared; empty if nothing is.
        maximize: True if more of it is better.
    """

    records: tuple[Record, ...]
    objective: str
    maximize: bool = True

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    @property
    def best(self) -> Record:
        """The first record with the best score.

        Raises:
            FormatError: no candidate has a finite score.
        """
        best = max(self.records, key=self._score)
        if self.objective and not math.isfinite(self._score(best)):
            raise FormatError(
                f"none of {len(self)} candidates has a finite {self.objective!r} (the first has "
                f"{self.records[0].metrics[self.objective]}); check the function that evaluates"
            )
        return best

    def top(self, count: int | None = None) -> list[Record]:
        """Returns the best records, best first."""
        return sorted(self.records, key=self._score, reverse=True)[:count]

    def _score(self, record: Record) -> float:
        return score(record.metrics, self.objective, self.maximize)

    def summary(self) -> str:
        """Returns the number of candidates and the best score, in a few words."""
        found = f"{len(self)} candidates"
        lost = sum(not math.isfinite(self._score(record)) for record in self)
        if self.objective and lost < len(self):
            found += f", best {self.objective} {self.best.metrics[self.objective]:.4g}"
        return f"{found}, {lost} not finite" if lost else found

    @property
    def columns(self) -> list[str]:
        """The keys of `rows`: the rule, all parameters, all metrics, the seconds."""
        names = dict.fromkeys(["rule"])
        for part in ("parameters", "metrics"):
            names |= dict.fromkeys(name for record in self for name in getattr(record, part))
        return [*names, "seconds"]

    def rows(self) -> list[dict[str, Any]]:
        """Returns a flat mapping for each record, as for a data frame."""
        return [
            {"rule": x.name, **x.parameters, **x.metrics, "seconds": round(x.seconds, 4)}
            for x in self
        ]

    def to_csv(self, path: str | Path | None = None) -> str:
        """Returns the rows as CSV text.

        Args:
            path: file to write them to, if any. An existing file is replaced only if it is a table
                of such a sweep.

        Raises:
            FormatError: the file may not be written.
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(map(printable, self.columns))
        for row in self.rows():
            values = (row.get(column, "") for column in self.columns)
            writer.writerow(printable(x) if isinstance(x, str) else x for x in values)
        if path is not None:
            with atomic_file(path, mark=TABLE_MARK, force=True) as file:
                file.write_text(text.getvalue(), encoding="utf-8")
        return text.getvalue()

    def table(self, count: int | None = 10) -> Table:
        """Returns the best records for a terminal, best first."""
        one_rule = len({record.name for record in self}) == 1
        title = _cell(self.records[0].name) if one_rule else None
        grid = Table(title=title, box=None, pad_edge=False)
        columns = self.columns[1 if one_rule else 0 : -1]
        for column in columns:
            justify: JustifyMethod = "left" if column == "rule" else "right"
            grid.add_column(_cell(column), justify=justify, overflow="fold")
        for record in self.top(count):
            row = {"rule": record.name, **record.parameters, **record.metrics}
            grid.add_row(*(_cell(row.get(column, "")) for column in columns))
        return grid

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Draws the objective against each parameter: all candidates, and the best at each value.

        Needs matplotlib.

        Args:
            path: file to write the figure to, if any; its ending gives the format. An existing
                file is replaced only if it is such a figure (SVG or PNG).
        """
        from coremerge_jax.search.plot import draw_sweep, save

        return save(draw_sweep(self.records, self.objective, self.maximize), path)


def _cell(value: Any) -> Text:
    """Returns a cell of a table. Names stay as they are, also if they look like markup."""
    return Text(display(f"{value:.4g}" if isinstance(value, float) else str(value), 300))


def score(metrics: Mapping[str, float], objective: str | None, maximize: bool) -> float:
    """Returns the number to compare: more is better, and what is not finite is worst.

    Raises:
        RecipeError: there is no such metric.
    """
    if not metrics:
        return 0.0  # there is nothing to compare
    objective = objective or next(iter(metrics))
    if objective not in metrics:
        raise unknown("metric", objective, metrics)
    value = metrics[objective] if maximize else -metrics[objective]
    return value if math.isfinite(value) else -math.inf


def sweep(
    adapters: Sequence[Adapter] | Projected,
    rules: MergeRule | Mapping[str, MergeRule],
    evaluate: Callable[[Adapter], Metrics],
    values: Choices,
    *,
    method: Method | None = None,
    objective: str | None = None,
    maximize: bool = True,
    key: jax.Array | None = None,
    log: str | Path | None = None,
    progress: bool = False,
) -> Sweep:
    """Merges with many values of parameters, and evaluates each merge.

    Adapters are projected once. Candidates that differ in numbers alone share one compiled
    program, and those that differ in scale alone share a merge too.

    Args:
        adapters: the adapters to merge; or `project` of them, which also fixes the space,
            weights and precision.
        rules: a rule; or several, by a name for each.
        evaluate: gets the merged adapter, and returns a number, or numbers by name.
        values: by the name of a parameter (see `parameters`), the values to try; ``"scale"``
            multiplies the merged update, and is ``"auto"`` if it is not among them. A rule is
            searched for the parameters that it has.
        method: `grid` (by default), `line` or `random`.
        objective: the metric that decides; by default the first.
        maximize: True if more of it is better.
        key: PRNG key, for rules that draw random numbers; the same for each candidate.
        log: file to which each record is added as it comes. A sweep that finds records of its
            own candidates there does not evaluate these again. ``evaluate`` has to be the same.
        progress: True to show progress on stderr, where that is a terminal.

    Returns:
        All records, and which is best.

    Raises:
        FormatError: no candidate has a finite score, or the log is not that of a sweep.
        RecipeError: no rule has a parameter of a name, a value is out of range, there is no such
            metric, or ``evaluate`` returns something else than numbers; or a rule draws random
            numbers and has no key.
        MismatchError: the log is that of other rules, adapters, weights or statistics.
    """
    search = Search(adapters, rules, values, method, objective, maximize, key)
    check_function("evaluate", evaluate)
    return search.collect(search.run(measured(evaluate), log), progress=progress)


# Gets a record that has no metrics yet, and its merge.
Judge = Callable[[Record, Adapter], Metrics]


def measured(evaluate: Callable[[Adapter], Any]) -> Judge:
    """Returns the user's function as a judge of records; results that are no numbers raise."""

    def judge(record: Record, merged: Adapter) -> Metrics:
        found = evaluate(merged)
        named = found if isinstance(found, Mapping) else {"a score": found}
        where = f"evaluate, with {dict(record.parameters)}"
        if not named:
            raise RecipeError(f"{where}: gave no metrics; expected a number, or numbers by name")
        for name, value in named.items():
            if hasattr(value, "item") and getattr(value, "size", 0) == 1:
                value = value.item()
            if not isinstance(value, int | float) or not isinstance(name, str):
                raise RecipeError(
                    f"{where}: gave {short(value)} as {name!r:.40}; expected a number, or numbers "
                    "by name"
                )
        return found

    return judge


class Search:
    """A sweep as an iterator over its records; the arguments are those of `sweep`."""

    def __init__(
        self,
        adapters: Sequence[Adapter] | Projected,
        rules: MergeRule | Mapping[str, MergeRule],
        values: Choices,
        method: Method | None = None,
        objective: str | None = None,
        maximize: bool = True,
        key: jax.Array | None = None,
    ) -> None:
        if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
            raise RecipeError(f"values: expected lists by name of a parameter, got {short(values)}")
        if method is not None and not callable(getattr(method, "propose", None)):
            raise RecipeError(f"method: expected grid(), line() or random(), got {short(method)}")
        named = rules if isinstance(rules, Mapping) else {"": rules}
        if not named:
            raise RecipeError("rules: got none; expected a rule, or several by name")
        chains = {name: chain(as_rule(rule)) for name, rule in named.items()}
        self.rules = {name or label(rule): rule for name, rule in chains.items()}
        self.values = {
            name: choices if isinstance(choices, Distribution) else listed(name, choices)
            for name, choices in values.items()
        }
        self.method = method or Grid()
        self.objective, self.maximize, self.key = objective, maximize, key
        self._metrics: tuple[str, ...] = ()
        self._last: tuple[str, Updates] | None = None
        known = {name for rule in self.rules.values() for name in parameters(rule)} | {SCALE}
        for name, choices in self.values.items():
            if name not in known:
                raise unknown("parameter", name, sorted(known))
            self._check(name, choices)
        self.projected = adapters if isinstance(adapters, Projected) else project(adapters)

    def _check(self, name: str, choices: Iterable[Any] | Distribution) -> None:
        """Refuses values that are out of range, before anything is evaluated."""
        for value in [] if isinstance(choices, Distribution) else listed(name, choices):
            if name == SCALE:
                check_scale(value)
            for rule in self.rules.values():
                if name in parameters(rule):
                    configure(rule, {name: value})

    def run(
        self,
        judge: Judge,
        log: str | Path | None = None,
        subject: Mapping[str, Any] | None = None,
        is_done: Callable[[Record], bool] = lambda _: True,
    ) -> Iterator[Record]:
        """Yields records as they come.

        Args:
            judge: gives the metrics.
            log: the file of the log; None for none.
            subject: what else the records depend on, by name, as JSON-like data.
            is_done: returns False for a record of the log that has to be judged again.
        """
        subject = {
            "rules": {name: repr(rule) for name, rule in self.rules.items()},
            "space": repr(self.projected.space),
            "key": None if self.key is None else jax.random.key_data(self.key).tolist(),
            **(subject or {}),
        }
        with Log(log, subject, self.projected.traits(), self.projected.dtype) as known:
            for name in self.rules:
                yield from self._run_rule(name, judge, known, is_done)

    def collect(self, records: Iterator[Record], *, progress: bool = False) -> Sweep:
        """Returns all records; shows on stderr how many there are, if wanted."""
        found: list[Record] = []
        with progress_line("project", progress) as say:
            for record in records:
                found.append(record)
                if progress:
                    say(self._result(found).summary())
        result = self._result(found)
        if result.objective:
            _ = result.best  # raises if no score is finite
        return result

    def _result(self, records: list[Record]) -> Sweep:
        objective = self.objective or next(iter(records[0].metrics), "")
        return Sweep(tuple(records), objective, self.maximize)

    def _run_rule(
        self, name: str, judge: Judge, known: Log, is_done: Callable[[Record], bool]
    ) -> Iterator[Record]:
        start = {SCALE: AUTO, **parameters(self.rules[name])}
        own = {x: choices for x, choices in self.values.items() if x in start}
        proposals, scores = self.method.propose(own), dict[str, float]()
        last: float | None = None
        while True:
            try:
                proposed = proposals.send(last)  # type: ignore[arg-type]  # None starts it
            except StopIteration:
                return
            candidate = {x: _plain(start[x]) for x in own} | proposed
            which = identity(name, candidate)
            if which not in scores:
                record = self._record(name, candidate, judge, known, is_done)
                scores[which] = score(record.metrics, self.objective, self.maximize)
                yield record
            last = scores[which]

    def _record(
        self,
        name: str,
        candidate: Parameters,
        judge: Judge,
        known: Log,
        is_done: Callable[[Record], bool],
    ) -> Record:
        record = Record(name, configure(self.rules[name], candidate), candidate, {}, 0.0)
        if (found := known.find(name, candidate)) and is_done(record):
            metrics, seconds = found["metrics"], found["seconds"]
            self._check_names(record, metrics)
        else:
            started = time.perf_counter()
            judged = judge(record, self._merge(record))
            if not isinstance(judged, Mapping):
                judged = {self.objective or "score": judged}
            metrics = {metric: float(value) for metric, value in judged.items()}
            self._check_names(record, metrics)
            score(metrics, self.objective, self.maximize)  # raises before anything is logged
            seconds = time.perf_counter() - started
            known.add(name, candidate, metrics, seconds)
        return dataclasses.replace(record, metrics=metrics, seconds=seconds)

    def _merge(self, record: Record) -> Adapter:
        """Merges; candidates in a row that differ in scale alone share the merge."""
        others = {x: value for x, value in record.parameters.items() if x != SCALE}
        which = identity(record.name, others)
        if self._last is None or self._last[0] != which:
            self._last = which, self.projected.updates(record.rule, key=self.key)
        return self.projected.adapter(self._last[1], record.scale)

    def _check_names(self, record: Record, metrics: Mapping[str, float]) -> None:
        first = self._metrics = self._metrics or tuple(metrics)
        if set(first) != set(metrics):
            raise RecipeError(
                f"evaluate, with {dict(record.parameters)}: gave metrics {list(metrics)}, and "
                f"{list(first)} before; expected the same for every candidate"
            )


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value
