"""The tables and targets of `speed.py`."""

from collections.abc import Mapping, Sequence
from typing import Any

from common.paper import RULE_TITLES
from common.publish import Sheet, digits

Row = Mapping[str, Any]

NOTES = """\
Seconds for all modules: median of the rounds, the fastest in brackets. `~`: run on a few modules
and scaled by their number. Factors are float32 NumPy arrays in memory, before and after.
*compile*: first call less the median. *model*: the estimate of the cost model of
`--dry-run`, from the machine's rates. *floor*: two Gram matrices in float64 and one product
m × R × R in float32 per module, each with the fastest of NumPy's BLAS, PyTorch's and XLA, on all
cores. *read*: files of the factors' size out of the page cache. *error*: largest relative
difference of an update of PyTorch's from ours, over up to 8 modules. An empty cell: the contender
has no such rule, or was not run."""

# (shape, rule, what, bound): a speedup over PyTorch of at least; so many floors at most; from
# `FEW` adapters on, at most so many times the growth that the cost model expects.
FEW = "tasks-8"
TARGETS = (
    ("llama-3-8b", "tsv+iso-c", "speedup", 8.0),
    ("llama-3-8b", "ties", "speedup", 8.0),
    ("llama-3-8b", "tsv+iso-c", "floors", 2.5),
    ("llama-3-8b", "ties", "floors", 2.5),
    ("vit-b32", "tsv+iso-c", "speedup", 6.0),
    ("vit-b32", "ties", "speedup", 6.0),
    ("tasks-100", "tsv+iso-c", "growth", 1.0),
    ("tasks-100", "ties", "growth", 1.0),
)


def ratio(row: Row, over: str, under: str) -> float | None:
    """Returns the time of one over that of another; None if one was not measured."""
    times = row["times"]
    if over not in times or under not in times:
        return None
    return times[over]["seconds"] / times[under]["seconds"]


def targets(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Returns the targets, and whether they are met; one that was not measured is not."""
    found = {(row["shape"], row["rule"]): row for row in rows}
    verdicts = []
    for shape, rule, what, bound in TARGETS:
        row, few = (found.get((name, rule), {"times": {}}) for name in (shape, FEW))
        value = _measured(what, row, few)
        met = value is not None and (value >= bound if what == "speedup" else value <= bound)
        verdicts.append(
            {"shape": shape, "rule": rule, "what": what, "bound": bound, "value": value, "met": met}
        )
    return verdicts


def _measured(what: str, row: Row, few: Row) -> float | None:
    if what == "speedup":
        return ratio(row, "torch", "ours")
    if what == "floors":
        return ratio(row, "ours", "floor")
    now, before = (ratio(one, "ours", "model") for one in (row, few))
    return None if now is None or before is None else now / before


def progress(row: Row) -> str:
    """Returns a row in one line."""
    times = ", ".join(f"{name} {_seconds(entry)}" for name, entry in row["times"].items())
    return f"{row['title']}: {RULE_TITLES[row['rule']]}: {times}"


def times_sheet(result: Mapping[str, Any]) -> Sheet:
    """Returns the table of times."""
    measured = {name for row in result["rows"] for name in row["times"]}
    peers = [name for name in result["contenders"] if name in measured - {"ours", "torch"}]
    header = [
        "shape",
        "rule",
        "ours",
        "compile",
        "floor",
        "ours / floor",
        "model",
        "read",
        result["contenders"]["torch"],
        "PyTorch / ours",
        "error",
        *(result["contenders"][name] for name in peers),
    ]
    return Sheet(header, [_row(row, peers) for row in result["rows"]])


def _row(row: Row, peers: Sequence[str]) -> list[str]:
    times = row["times"]
    return [
        row["title"],
        RULE_TITLES[row["rule"]],
        _seconds(times["ours"]),
        digits(times["ours"]["compile"]),
        _seconds(times["floor"]),
        _factor(ratio(row, "ours", "floor")),
        _seconds(times["model"]),
        digits(times["read"]["seconds"]),
        _seconds(times.get("torch")),
        _factor(ratio(row, "torch", "ours")),
        f"{times['torch']['error']:.0e}" if "torch" in times else "",
        *(_seconds(times.get(name)) for name in peers),
    ]


def targets_sheet(result: Mapping[str, Any]) -> Sheet:
    """Returns the table of targets."""
    titles = {
        "speedup": "PyTorch / ours at least",
        "floors": "ours / floor at most",
        "growth": f"growth from {FEW} / that of the model at most",
    }
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
    return Sheet(["shape", "rule", "target", "measured", ""], rows)


def _seconds(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return ""
    if "scaled_by" in entry:
        return f"~{digits(entry['seconds'])}"
    fastest = f" ({digits(entry['min'])})" if "min" in entry else ""
    return digits(entry["seconds"]) + fastest


def _factor(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}×"
