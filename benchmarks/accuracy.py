"""Measures the error of every rule against singular value decompositions in float64.

    python benchmarks/accuracy.py [--check]

Stacked factors of condition numbers up to 1e8 (within tasks and between them), duplicates, mixed
ranks and more ranks than rows are merged by the library, and by the definitions of the rules'
docstrings, written with singular value decompositions. Prints the relative error of the updates.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from common import machine, peers
from common.paper import RULE_TITLES
from common.publish import Sheet, publish, script
from common.reference import Array, Factors, Reference
from threadpoolctl import threadpool_limits

import coremerge_jax as cm

TARGET = 1e-6  # in float64
CONDITIONS = (1.0, 1e2, 1e4, 1e6, 1e8)


NOTES = f"""\
Relative error ‖ours − reference‖ / ‖reference‖ of the dense update; target in float64: at most
{TARGET:.0e}. *κ*: condition number of each stack that is named; the other one is Gaussian.
In brackets, where it is above 1e-8: how far the reference itself moves when the last bits of the
factors do; no program in that precision can be expected to come closer. For float32 the factors
are rounded to float32 first, and the reference, computed in float64, drops what is below
rounding errors of float32. Left out is what has no one answer: TIES where singular values of the
stacks coincide (κ = 1, duplicates), as it depends on their singular vectors; CART where those of
the updates do (κ = 1 of A and B); Iso-C where the condition number of the summed updates, about
the product of both κ, is beyond {CONDITIONS[-1]:.0e}."""

RULES = {"mean": cm.mean()} | {name: rule for name, rule in peers.RULES.items() if name != "ta"}
TITLES = RULE_TITLES | {"mean": "mean"}


# --- What is merged --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """Factors to merge.

    Attributes:
        title: what is special about them.
        size: ``(m, n)`` and the ranks of the tasks.
        condition: of the special stack; None where it is what comes.
        make: from a generator and the size, B or A factors, by task, of the special stack.
        of: ``"B"``, ``"A"`` or both.
    """

    title: str
    m: int
    n: int
    ranks: tuple[int, ...]
    make: Callable
    of: str = ""
    condition: float | None = None

    def defines(self, rule: str) -> bool:
        """Returns whether the rule has one answer, up to rounding in float64."""
        condition = self.condition or 1
        if rule == "ties":  # no coinciding singular values of the stacks
            return self.condition != 1 and self.make is not _duplicates
        if rule == "cart":  # no coinciding singular values of the updates
            return not (self.condition == 1 and self.of == "AB")
        return rule != "iso-c" or condition ** len(self.of) <= max(CONDITIONS)

    def factors(self, seed: int = 0) -> Factors:
        """Returns seeded float64 factors."""
        rng = np.random.default_rng(seed)
        stacks = {}
        for name, size in (("A", self.n), ("B", self.m)):
            make = self.make if name in self.of or not self.of else _gaussian
            parts = make(rng, size, self.ranks)
            special = self.condition is not None and name in self.of
            stacks[name] = _with_condition(parts, self.condition) if special else parts
        return [(a.T.copy(), b) for a, b in zip(stacks["A"], stacks["B"], strict=True)]


def _gaussian(rng: np.random.Generator, size: int, ranks: Sequence[int]) -> list[Array]:
    return [rng.standard_normal((size, rank)) / math.sqrt(size) for rank in ranks]


def _decaying(rng: np.random.Generator, size: int, ranks: Sequence[int]) -> list[Array]:
    """Draws tasks whose singular values fall off exponentially."""
    mixes = [np.linalg.qr(rng.standard_normal((rank, rank)))[0] for rank in ranks]
    parts = _gaussian(rng, size, ranks)
    return [
        x * np.geomspace(1, 1e-2, x.shape[1]) @ mix for x, mix in zip(parts, mixes, strict=True)
    ]


def _nearly_equal(rng: np.random.Generator, size: int, ranks: Sequence[int]) -> list[Array]:
    """Draws tasks that are the first one and a little more."""
    first, *others = _gaussian(rng, size, ranks)
    return [first, *(first + 1e-2 * x for x in others)]


def _duplicates(rng: np.random.Generator, size: int, ranks: Sequence[int]) -> list[Array]:
    """Draws tasks of which the last equals the first."""
    parts = _gaussian(rng, size, ranks)
    return [*parts[:-1], parts[0]]


def _with_condition(parts: Sequence[Array], condition: float) -> list[Array]:
    """Takes powers of the stack's singular values, to give it a condition number."""
    u, s, vt = np.linalg.svd(np.concatenate(parts, axis=1), full_matrices=False)
    s = (s / s[0]) ** (math.log(condition) / math.log(s[0] / s[-1]))
    return np.split(u * s @ vt, np.cumsum([x.shape[1] for x in parts])[:-1], axis=1)


def cases() -> list[Case]:
    """Returns all cases."""
    sizes = {
        "": (200, 160, (16,) * 5),
        ", R > m, n": (200, 160, (48,) * 5),
        ", small": (24, 20, (4,) * 3),
    }
    found = []
    for suffix, size in sizes.items():
        for what, make in (("decaying", _decaying), ("nearly equal", _nearly_equal)):
            for of in ("B", "AB"):
                conditions = CONDITIONS[1 if make is _nearly_equal else 0 :]
                found += [
                    Case(f"{what} {' and '.join(of)}{suffix}", *size, make, of, k)
                    for k in conditions
                ]
        found.append(Case(f"Gaussian{suffix}", *size, _gaussian))
        found.append(Case(f"duplicates{suffix}", *size, _duplicates))
    found.append(Case("mixed ranks", 200, 160, (4, 8, 16, 24, 32), _gaussian))
    return found


# --- Comparison ------------------------------------------------------------------------------


def measure(which: Sequence[Case], precision: str) -> list[dict[str, Any]]:
    """Measures the errors of all rules; returns a row for each case."""
    eps = float(np.finfo(precision).eps)
    inputs = [[(a.astype(precision), b.astype(precision)) for a, b in c.factors()] for c in which]
    rows = [
        {"case": c.title, "condition": c.condition, "precision": precision, "rules": {}}
        for c in which
    ]
    reference = Reference(eps)
    for rule, merge_rule in RULES.items():
        for chosen in _of_equal_tasks(which):
            merged = _merge([inputs[i] for i in chosen], merge_rule, precision)
            for i, update in zip(chosen, merged, strict=True):
                if not which[i].defines(rule):
                    continue
                doubles = [(a.astype(float), b.astype(float)) for a, b in inputs[i]]
                expected = reference.merge(rule, doubles)
                moved = reference.merge(rule, _jitter(doubles, eps))
                rows[i]["rules"][rule] = {
                    "error": _distance(update, expected),
                    "sensitivity": _distance(moved, expected),
                }
    return rows


def _of_equal_tasks(which: Sequence[Case]) -> list[list[int]]:
    """Cases that fit into the same adapters, as their modules."""
    found: dict[int, list[int]] = {}
    for i, case in enumerate(which):
        found.setdefault(len(case.ranks), []).append(i)
    return list(found.values())


def _merge(inputs: Sequence[Factors], rule: cm.rules.Rule, precision: str) -> list[Array]:
    adapters = [
        cm.Adapter({str(i): cm.LoRA(*factors[t]) for i, factors in enumerate(inputs)})
        for t in range(len(inputs[0]))
    ]
    merged = cm.merge(adapters, rule, scale=1.0, precision=precision)
    loras = [merged[str(i)] for i in range(len(inputs))]
    return [np.asarray(x.b, float) @ np.asarray(x.a, float) for x in loras]


def _jitter(factors: Factors, eps: float) -> Factors:
    """Changes the last bit of the factors."""
    rng = np.random.default_rng(1)
    return [
        tuple(x * (1 + eps / 2 * rng.choice([-1, 1], x.shape)) for x in pair)  # type: ignore[misc]
        for pair in factors
    ]


def _distance(x: Array, y: Array) -> float:
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))


def sheet(rows: Sequence[dict[str, Any]]) -> Sheet:
    """Returns the table of one precision."""
    header = [rows[0]["precision"], "κ", *(TITLES[rule] for rule in RULES)]
    return Sheet(header, [_row(row) for row in rows])


def _row(row: dict[str, Any]) -> list[str]:
    condition = "" if row["condition"] is None else f"{row['condition']:.0e}"
    return [row["case"], condition, *(_cell(row["rules"].get(rule)) for rule in RULES)]


def _cell(entry: dict[str, float] | None) -> str:
    if entry is None:
        return ""
    moves = f" ({entry['sensitivity']:.0e})" if entry["sensitivity"] > 1e-8 else ""
    return f"{entry['error']:.0e}{moves}"


def misses(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Returns a line for each float64 result that misses the target."""
    return [
        f"{TITLES[rule]}, {row['case']}, κ {row['condition']}: {entry['error']:.1e}"
        for row in rows
        for rule, entry in row["rules"].items()
        if row["precision"] == "float64" and not entry["error"] <= TARGET
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes the results; returns the exit code."""
    parser = script(__doc__)
    parser.add_argument("--only", default="", help="run only cases whose name contains this")
    parser.add_argument("--check", action="store_true", help="fail if float64 misses the target")
    options = parser.parse_args(argv)
    watch = machine.Watch()
    which = [case for case in cases() if options.only in case.title]
    if not which:
        parser.error(f"no such case: {options.only!r}")
    with threadpool_limits(1):  # NumPy's, which wait for each other on a busy machine
        tables = [measure(which, precision) for precision in ("float64", "float32")]
    rows = [row for table in tables for row in table]
    missed = misses(rows)
    result = {"machine": machine.describe(watch), "rows": rows, "missed": missed}
    publish(options.output / "accuracy", "Accuracy", result, [sheet(t) for t in tables], NOTES)
    print("\n".join(missed) or f"all within {TARGET:.0e}")
    return 1 if options.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
