"""The command line of benchmarks, and their results in the terminal, Markdown and JSON."""

import argparse
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import platformdirs
from rich import box
from rich.console import Console
from rich.table import Table

from common import machine


class Sheet(NamedTuple):
    """A table; after the first columns, which are texts, come numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    texts: int = 2


def folder() -> Path:
    """Returns the folder of the results, one for each version of jax."""
    return Path(__file__).parents[1] / "results" / f"jax-{importlib.metadata.version('jax')}"


def script(doc: str, **more: Any) -> argparse.ArgumentParser:
    """Returns the parser of a benchmark, described by the first paragraph of its docstring."""
    parser = argparse.ArgumentParser(description=doc.split("\n\n")[0], **more)
    what = "folder for the results; default: %(default)s"
    parser.add_argument("--output", type=Path, default=folder(), help=what)
    return parser


def resumable(doc: str, name: str) -> argparse.ArgumentParser:
    """Returns the parser of a benchmark of long steps, whose results are kept in a folder."""
    parser = script(doc, prog=name)
    parser.add_argument(
        "--folder",
        type=Path,
        default=platformdirs.user_cache_path("coremerge_jax") / name,
        help="folder of downloads and finished steps; default: %(default)s",
    )
    return parser


def publish(
    stem: Path, title: str, result: Mapping[str, Any], sheets: Sequence[Sheet], notes: str
) -> None:
    """Prints the tables, and writes ``stem.md`` and ``stem.json``.

    Args:
        stem: path of the files, without suffix.
        title: headline of the Markdown file.
        result: content of the JSON file, with `machine.describe` under ``"machine"``.
        sheets: the tables.
        notes: meaning of the columns.
    """
    console = show(*sheets)
    stem.parent.mkdir(parents=True, exist_ok=True)
    parts = [f"# {title}", machine.summary(result["machine"]), *map(_markdown, sheets), notes]
    stem.with_suffix(".md").write_text("\n\n".join(parts) + "\n")
    text = json.dumps(_rounded(result), indent=1, ensure_ascii=False)
    stem.with_suffix(".json").write_text(text + "\n")
    console.print(f"wrote {stem}.*")


def show(*sheets: Sheet) -> Console:
    """Prints tables; returns where."""
    console = Console()
    if not console.is_terminal:
        console.width = 1000
    for sheet in sheets:
        console.print(_rich(sheet))
    return console


def digits(seconds: float) -> str:
    """Formats seconds with about three digits, without an exponent."""
    places = 4 if seconds < 0.01 else 3 if seconds < 0.1 else 2 if seconds < 10 else 1
    return f"{seconds:.{places}f}"


def _rich(sheet: Sheet) -> Table:
    table = Table(title=sheet.title or None, box=box.SIMPLE_HEAD, pad_edge=False)
    for column, name in enumerate(sheet.header):
        justify = "left" if column < sheet.texts else "right"
        table.add_column(name, justify=justify, overflow="fold")
    for row in sheet.rows:
        table.add_row(*row)
    return table


def _markdown(sheet: Sheet) -> str:
    rule = ["---"] * sheet.texts + ["---:"] * (len(sheet.header) - sheet.texts)
    lines = [f"| {' | '.join(cells)} |" for cells in (sheet.header, rule, *sheet.rows)]
    return "\n".join([f"## {sheet.title}\n", *lines] if sheet.title else lines)


def _rounded(value: Any) -> Any:
    """Rounds to four significant digits, for small files."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {key: _rounded(entry) for key, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, list) else value
