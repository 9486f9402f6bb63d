"""Results of a sweep, as records, table, CSV and plot."""

import csv
import dataclasses
import io
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from coremerge_jax.checkpoint.atomic import atomic_file
from coremerge_jax.errors import FormatError
from coremerge_jax.foreign_text import printable, shortened
from coremerge_jax.recipe import unknown
from coremerge_jax.rules import Chain
from coremerge_jax.search.parameters import SCALE


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
        from coremerge_jax.search.plotting import draw_sweep, save

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
