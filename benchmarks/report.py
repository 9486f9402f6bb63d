"""A benchmark's results as a table, JSON and a plot."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import machine
from rich import box
from rich.console import Console
from rich.table import Table

Row = Mapping[str, Any]

RULE_TITLES = {
    "ta": "TA",
    "ties": "TIES",
    "tsv": "TSV",
    "cart": "CART",
    "iso-c": "Iso-C",
    "tsv+iso-c": "TSV + Iso-C",
}
NOTES = """\
Seconds for all modules: median of the rounds, the fastest in brackets. `~`: run on a few modules
and scaled by their number. Factors are float32 NumPy arrays in memory, before and after.
*compile*: first call less the median. *floor*: two Gram matrices in float64 and one product
m × R × R in float32 per module, each with the fastest of NumPy's BLAS, PyTorch's and XLA, on all
cores. *read*: files of the factors' size out of the page cache. *error*: largest relative
difference of an update of PyTorch's from ours, over up to 8 modules. Where nothing stands, the
contender has no such rule or was not run."""

# Issue of speed: (shape, rule, what, bound); "speedup" at least, "floors" at most.
TARGETS = (
    ("llama-3-8b", "tsv+iso-c", "speedup", 8.0),
    ("llama-3-8b", "ties", "speedup", 8.0),
    ("llama-3-8b", "tsv+iso-c", "floors", 2.5),
    ("llama-3-8b", "ties", "floors", 2.5),
    ("vit-b32", "tsv+iso-c", "speedup", 6.0),
    ("vit-b32", "ties", "speedup", 6.0),
)


def ratio(row: Row, over: str, under: str) -> float | None:
    """How many times longer one took than another; None if one was not measured."""
    times = row["times"]
    if over not in times or under not in times:
        return None
    return times[over]["seconds"] / times[under]["seconds"]


def targets(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Which targets are met; one that was not measured is not."""
    found = {(row["shape"], row["rule"]): row for row in rows}
    verdicts = []
    for shape, rule, what, bound in TARGETS:
        row = found.get((shape, rule), {"times": {}})
        least = what == "speedup"
        value = ratio(row, "torch", "ours") if least else ratio(row, "ours", "floor")
        met = value is not None and (value >= bound if least else value <= bound)
        verdicts.append(
            {"shape": shape, "rule": rule, "what": what, "bound": bound, "value": value, "met": met}
        )
    return verdicts


def write(result: Mapping[str, Any], folder: Path) -> None:
    """Prints the tables, and writes speed.json, speed.md and speed.svg."""
    folder.mkdir(parents=True, exist_ok=True)
    tables = [_times(result), _targets(result)]
    console = Console()
    if not console.is_terminal:
        console.width = 1000
    for header, rows in tables:
        console.print(_rich(header, rows))
    text = "\n\n".join(
        ["# Speed", machine.summary(result["machine"]), *(_markdown(*t) for t in tables), NOTES]
    )
    (folder / "speed.md").write_text(text + "\n")
    (folder / "speed.json").write_text(json.dumps(_rounded(result), ensure_ascii=False) + "\n")
    try:
        from plot import draw
    except ImportError:
        console.print("no plot: it needs matplotlib")
    else:
        draw(result, folder / "speed.svg")
    console.print(f"wrote {folder}")


def progress(row: Row) -> str:
    """One row in one line."""
    times = ", ".join(f"{name} {_seconds(entry)}" for name, entry in row["times"].items())
    return f"{row['title']}: {RULE_TITLES[row['rule']]}: {times}"


TimesTable = tuple[Sequence[str], Sequence[Sequence[str]]]


def _times(result: Mapping[str, Any]) -> TimesTable:
    peers = [name for name in result["contenders"] if name not in ("ours", "torch")]
    header = [
        "shape",
        "rule",
        "ours",
        "compile",
        "floor",
        "ours / floor",
        "read",
        result["contenders"]["torch"],
        "PyTorch / ours",
        "error",
        *(result["contenders"][name] for name in peers),
    ]
    return header, [_row(row, peers) for row in result["rows"]]


def _row(row: Row, peers: Sequence[str]) -> list[str]:
    times = row["times"]
    return [
        row["title"],
        RULE_TITLES[row["rule"]],
        _seconds(times["ours"]),
        _digits(times["ours"]["compile"]),
        _seconds(times["floor"]),
        _factor(ratio(row, "ours", "floor")),
        _digits(times["read"]["seconds"]),
        _seconds(times.get("torch")),
        _factor(ratio(row, "torch", "ours")),
        f"{times['torch']['error']:.0e}" if "torch" in times else "",
        *(_seconds(times.get(name)) for name in peers),
    ]


def _targets(result: Mapping[str, Any]) -> TimesTable:
    titles = {"speedup": "PyTorch / ours at least", "floors": "ours / floor at most"}
    rows = [
        [
            target["shape"],
            RULE_TITLES[target["rule"]],
            f"{titles[target['what']]} {target['bound']:g}",
            _factor(target["value"]) or "not measured",
            "met" if target["met"] else "missed",
        ]
        for target in result["targets"]
    ]
    return ["shape", "rule", "target", "measured", ""], rows


def _seconds(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return ""
    if "scaled_by" in entry:
        return f"~{_digits(entry['seconds'])}"
    return f"{_digits(entry['seconds'])} ({_digits(entry['min'])})"


def _digits(seconds: float) -> str:
    """Two or three significant digits, without an exponent."""
    places = 4 if seconds < 0.01 else 3 if seconds < 0.1 else 2 if seconds < 10 else 1
    return f"{seconds:.{places}f}"


def _factor(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}×"


def _rich(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column, name in enumerate(header):
        table.add_column(name, justify="left" if column < 2 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---"] * 2 + ["---:"] * (len(header) - 2)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def _rounded(value: Any) -> Any:
    """The same with four significant digits, for small files."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {key: _rounded(entry) for key, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, list) else value
