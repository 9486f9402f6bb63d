"""Sweeps over the parameters of merges, on adapters that are projected once."""

import csv
import dataclasses
import io
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from coremerge_jax.errors import FormatError, RecipeError, unknown
from coremerge_jax.io.atomic import atomic_file
from coremerge_jax.lora import Adapter
from coremerge_jax.merging.checks import check_function, check_scale, short
from coremerge_jax.merging.projected import Projected, Updates, project
from coremerge_jax.rules import Chain, as_rule, chain
from coremerge_jax.search.log import Log, identity
from coremerge_jax.search.methods import Grid, Method, listed
from coremerge_jax.search.parameters import SCALE, configure, label, parameters
from coremerge_jax.text import printable, shortened


@contextmanager
def progress_line(text: str, wanted: bool) -> Iterator[Callable[[str], None]]:
    """Shows a line, where stderr is a terminal; the given function changes its text."""
    console = Console(stderr=True)
    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    hidden = not (wanted and console.is_terminal)
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(text)
        yield lambda text: bar.update(task, description=shortened(printable(text), 200))


@dataclasses.dataclass(frozen=True)
class Record:
    """One candidate, and what it scored.

    Attributes:
        name: of the rule.
        rule: with the candidate's parameters.
        parameters: by name.
        metrics: by name.
        seconds: for merging and evaluating.
    """

    name: str
    rule: Chain
    parameters: Mapping[str, Any]
    metrics: Mapping[str, float]
    seconds: float

    @property
    def scale(self) -> float:
        """The number that multiplies the merged update."""
        return self.parameters.get(SCALE, 1.0)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The result of a sweep.

    Attributes:
        records: in the order of evaluation.
        objective: the metric that is compared; empty where nothing is.
        maximize: whether more of it is better.
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
        """The first of those with the best score.

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
        if not self.objective:
            return f"{len(self)} candidates"
        lost = sum(not math.isfinite(self._score(record)) for record in self)
        more = f", {lost} not finite" if lost else ""
        if lost == len(self):
            return f"{len(self)} candidates{more}"
        best = self.best.metrics[self.objective]
        return f"{len(self)} candidates, best {self.objective} {best:.4g}{more}"

    @property
    def columns(self) -> list[str]:
        """The names in `rows`: of the rule, of all parameters, of all metrics."""
        names: dict[str, None] = dict.fromkeys(["rule"])
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
            path: the file to write them to, if any. A file that is already there is replaced if it
                is a table of such a sweep.

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
            header = text.getvalue().partition("\n")[0].encode()
            with atomic_file(path, mark=header, force=True) as file:
                file.write_text(text.getvalue(), encoding="utf-8")
        return text.getvalue()

    def table(self, count: int | None = 10) -> Table:
        """Returns the best records for a terminal, best first."""
        one = len({record.name for record in self}) == 1
        title = _text(self.records[0].name) if one else None
        grid = Table(title=title, box=None, pad_edge=False)
        columns = self.columns[1 if one else 0 : -1]
        for column in columns:
            justify: Any = "left" if column == "rule" else "right"
            grid.add_column(_text(column), justify=justify, overflow="fold")
        for record in self.top(count):
            row = {"rule": record.name, **record.parameters, **record.metrics}
            grid.add_row(*(_text(_show(row.get(column, ""))) for column in columns))
        return grid

    def plot(self, path: str | Path | None = None) -> Any:
        """Draws the objective against each parameter: all candidates, and the best at each value.

        Args:
            path: the file to write the figure to, if any; its ending tells the format. A file that
                is already there is replaced if it is such a figure (SVG or PNG).

        Returns:
            The figure, of matplotlib, which has to be installed.
        """
        from coremerge_jax.search.plot import draw_sweep, save

        return save(draw_sweep(self.records, self.objective, self.maximize), path)


def _text(name: str) -> Text:
    """Returns a name for a table as it is, though it may look like markup."""
    return Text(shortened(printable(name), 300))


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


def _show(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


Metrics = float | Mapping[str, float]

Judge = Callable[[Record, Adapter], Metrics]


def sweep(
    adapters: Sequence[Adapter] | Projected,
    rules: Any,
    evaluate: Callable[[Adapter], Metrics],
    values: Mapping[str, Any],
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
        adapters: as in `merge`; or `project` of them, which chooses the space and all else.
        rules: a rule; or several, by a name for each.
        evaluate: gets the merged adapter, and returns a number, or numbers by name.
        values: by the name of a parameter (see `parameters`), the values to try; ``"scale"``
            multiplies the merged update. A rule is searched for the parameters that it has.
        method: `grid` (by default), `line` or `random`.
        objective: the metric that decides; by default the first.
        maximize: whether more of it is better.
        key: PRNG key, for rules that draw random numbers; the same for each candidate.
        log: a file to which each record is added as it comes. A sweep that finds records of its
            own candidates there does not evaluate these again.
        progress: whether to show progress on stderr, where that is a terminal.

    Returns:
        All records, and which is best.

    Raises:
        FormatError: no candidate has a finite score, or the log is none.
        RecipeError: no rule has a parameter of a name, a value is out of range, there is no such
            metric, or what ``evaluate`` returns is no number; or a rule draws random numbers and
            has no key.
        MismatchError: the log is that of other rules or adapters.
    """
    search = Search(adapters, rules, values, method, objective, maximize, key)
    check_function("evaluate", evaluate)
    records = search.run(measured(evaluate), log)
    return search.collect(records, progress=progress)


def measured(evaluate: Callable[[Adapter], Any]) -> Judge:
    """Returns a user's function as a judge of records, whose results are checked."""

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
        rules: Any,
        values: Mapping[str, Any],
        method: Method | None = None,
        objective: str | None = None,
        maximize: bool = True,
        key: jax.Array | None = None,
    ) -> None:
        if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
            raise RecipeError(f"values: expected lists by name of a parameter, got {short(values)}")
        if method is not None and not callable(getattr(method, "propose", None)):
            raise RecipeError(f"method: expected grid(), line() or random(), got {short(method)}")
        named = rules if isinstance(rules, Mapping) else {None: rules}
        if not named:
            raise RecipeError("rules: got none; expected a rule, or several by name")
        chains = {name: chain(as_rule(rule)) for name, rule in named.items()}
        self.rules = {name or label(rule): rule for name, rule in chains.items()}
        self.values, self.method = values, method or Grid()
        self.objective, self.maximize, self.key = objective, maximize, key
        self._metrics: tuple[str, ...] = ()
        known = {name for rule in self.rules.values() for name in parameters(rule)} | {SCALE}
        for name, choices in values.items():
            if name not in known:
                raise unknown("parameter", name, sorted(known))
            self._check(name, choices)
        self.projected = adapters if isinstance(adapters, Projected) else project(adapters)

    def _check(self, name: str, choices: Any) -> None:
        """Refuses what is out of range before anything is evaluated."""
        for value in [] if hasattr(choices, "rvs") else listed(name, choices):
            if name == SCALE:
                check_scale(value)
            for rule in self.rules.values():
                if name in parameters(rule):
                    configure(rule, {name: value})

    def run(
        self, judge: Callable[[Record, Adapter], Metrics], log: str | Path | None = None
    ) -> Iterator[Record]:
        """Yields records as they come; ``judge`` gets each before it has metrics, and the merge."""
        subject = {
            "rules": {name: repr(rule) for name, rule in self.rules.items()},
            "space": repr(self.projected.space),
            "key": None if self.key is None else jax.random.key_data(self.key).tolist(),
        }
        with Log(log, subject, self.projected.norms()) as known:
            for name in self.rules:
                yield from self._run_rule(name, judge, known)

    def collect(self, records: Iterator[Record], *, progress: bool = False) -> Sweep:
        """Returns all records, with a line on stderr that tells how far they are."""
        found: list[Record] = []
        with progress_line("project", progress) as say:
            for record in records:
                found.append(record)
                if progress:
                    say(self._result(found).summary())
        result = self._result(found)
        if result.objective:
            _ = result.best  # refuses scores that cannot be compared
        return result

    def _result(self, records: list[Record]) -> Sweep:
        objective = self.objective or next(iter(records[0].metrics), "")
        return Sweep(tuple(records), objective, self.maximize)

    def _run_rule(
        self, name: str, judge: Callable[[Record, Adapter], Metrics], known: Log
    ) -> Iterator[Record]:
        rule = self.rules[name]
        start = {SCALE: 1.0} | parameters(rule)
        own = {x: choices for x, choices in self.values.items() if x in start}
        proposals = self.method.propose(own)
        merges, scores = _Merges(self.projected, self.key), dict[str, float]()
        last: float | None = None
        while True:
            try:
                proposed = proposals.send(last)  # type: ignore[arg-type]  # None starts it
            except StopIteration:
                return
            candidate = {x: _plain(start[x]) for x in own} | proposed
            which = identity(name, candidate)
            if which not in scores:
                record = self._record(name, candidate, merges, judge, known)
                scores[which] = score(record.metrics, self.objective, self.maximize)
                yield record
            last = scores[which]

    def _record(
        self,
        name: str,
        candidate: Mapping[str, Any],
        merges: "_Merges",
        judge: Callable[[Record, Adapter], Metrics],
        known: Log,
    ) -> Record:
        rule = configure(self.rules[name], candidate)
        if found := known.find(name, candidate):
            self._check_names(candidate, found["metrics"])
            return Record(name, rule, candidate, found["metrics"], found["seconds"])
        started = time.perf_counter()
        metrics = judge(Record(name, rule, candidate, {}, 0.0), merges(rule, candidate))
        if not isinstance(metrics, Mapping):
            metrics = {self.objective or "score": metrics}
        metrics = {metric: float(value) for metric, value in metrics.items()}
        self._check_names(candidate, metrics)
        score(metrics, self.objective, self.maximize)  # refuses before it is noted
        seconds = time.perf_counter() - started
        known.add(name, candidate, metrics, seconds)
        return Record(name, rule, candidate, metrics, seconds)

    def _check_names(self, candidate: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        first = self._metrics = self._metrics or tuple(metrics)
        if set(first) != set(metrics):
            raise RecipeError(
                f"evaluate, with {dict(candidate)}: gave metrics {list(metrics)}, and "
                f"{list(first)} before; expected the same for every candidate"
            )


class _Merges:
    """Merges by rules that differ in parameters; the last is kept, for the next scale."""

    def __init__(self, projected: Projected, key: jax.Array | None) -> None:
        self._projected, self._key = projected, key
        self._last: tuple[str, Updates] | None = None

    def __call__(self, rule: Chain, candidate: Mapping[str, Any]) -> Adapter:
        which = identity("", {x: value for x, value in candidate.items() if x != SCALE})
        if self._last is None or self._last[0] != which:
            self._last = which, self._projected.updates(rule, key=self._key)
        return self._projected.adapter(self._last[1], candidate.get(SCALE, 1.0))


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value
