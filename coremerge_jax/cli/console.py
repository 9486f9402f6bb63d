"""Output of the commands: tables on stdout, progress on stderr."""

import codecs
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from coremerge_jax.text import json_escaped, printable, shortened

_LONGEST = 4000  # characters of a line that is not in a table


def say(*lines: str, err: bool = False) -> None:
    """Prints lines to stdout or stderr; control characters in names are shown as escapes."""
    for line in lines:
        typer.echo(shortened(printable(line), _LONGEST), err=err)


def folder_size(folder: Path) -> int:
    """Returns the bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Sequence[str] = (),
    title: str | None = None,
) -> None:
    """Prints a table to stdout; the columns named in ``right`` hold numbers."""
    heading = None if title is None else Text(printable(title))
    table = Table(title=heading, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))  # a name may look like markup
    show(table)


def show(table: Table) -> None:
    """Prints a table to stdout: fitted and in color on a terminal, plain in a pipe."""
    console = Console()
    if not console.is_terminal:
        console.width = 1000
    console.print(table)


def print_json(value: Any) -> None:
    """Prints one JSON document to stdout."""
    unicode = codecs.lookup(sys.stdout.encoding or "ascii").name.startswith("utf")
    typer.echo(json_escaped(json.dumps(value, indent=2, ensure_ascii=not unicode)))


class Stages:
    """A display of stages on stderr, if that is a terminal, which also measures their seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._console = Console(stderr=True)

    @contextmanager
    def __call__(self, stage: str, total: int | None = None) -> Iterator[Callable[[], None]]:
        """Shows and times the block; the yielded function advances its bar by one of ``total``."""
        bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn() if total else TextColumn(""),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        start = time.perf_counter()
        with bar:
            task = bar.add_task(stage, total=total)
            yield lambda: bar.advance(task)
        self.seconds[stage] = round(time.perf_counter() - start, 3)


def describe_paths(paths: Sequence[str]) -> str:
    """Returns ``24: query, key, …``: the number of modules, and the last parts of their names.

    Numbers belong to the part before them (``to_out.0``), and experts of a parameter are one.
    """
    found = (re.search(r"[^.]*(?:\.\d+)*$", re.sub(r"\[\d+\]$", "", path)) for path in paths)
    names = list(dict.fromkeys(match[0] for match in found if match))
    shown = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
    return f"{len(paths)}: {shown}"


def describe_ranks(ranks: Iterable[int]) -> str:
    """Returns ``4, 16 ×2`` for the ranks 4, 16, 16."""
    counts = sorted(Counter(ranks).items())
    return ", ".join(f"{rank} ×{count}" if count > 1 else f"{rank}" for rank, count in counts)


def describe_range(values: Iterable[float], form: str = "d") -> str:
    """Returns ``12`` if all values print alike, else ``12–31``."""
    low, high = min(values := list(values)), max(values)
    shown = format(low, form), format(high, form)
    return shown[0] if shown[0] == shown[1] else "–".join(shown)
