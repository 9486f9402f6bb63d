"""Times a sweep over candidates on projected adapters, against as many merges.

    python benchmarks/sweep.py [ADAPTER...] [--scales N] [--densities N] [--rounds N] [--check]

Sweeps TIES + Iso-C over scales and densities of PEFT adapters in memory (by default the demo's),
then calls `merge` for each candidate.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from common import machine
from common.publish import Sheet, digits, publish, script

import coremerge_jax as cm
from coremerge_jax import demo, search

RULE = cm.chain(cm.ties(), cm.isotropize())
TARGET = 20.0
COMPARED = 25  # every 25th candidate is compared with the result of `merge`
NOTES = """\
Seconds for all candidates, without an evaluation. *merges*: one call of `merge` for each, with
compiled programs; the fastest of the rounds. *sweep*: the median of the rounds, projection
included, with compiled programs. *first*: the same with nothing compiled yet, and the number of
programs compiled, which is that of a sweep of one candidate. *error*: largest relative difference
of a module's update from that of `merge`, over every 25th candidate."""


def timed(fn: Callable[[], Any]) -> tuple[float, Any]:
    """Returns the seconds of a call, and its result."""
    start = time.perf_counter()
    result = fn()
    return time.perf_counter() - start, result


def compilations(fn: Callable[[], Any]) -> tuple[int, float]:
    """Returns the seconds of a call, and the number of programs compiled, with none before."""
    count = 0

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        nonlocal count
        del duration_secs
        count += event == "/jax/core/compile/backend_compile_duration"

    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        return timed(fn)[0], count
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def measure(adapters: Sequence[cm.Adapter], scales: int, densities: int, rounds: int) -> dict:
    """Measures one set of adapters."""
    values = {
        "scale": np.linspace(0.1, 3, scales).tolist(),
        "ties.density": np.linspace(0.1, 0.9, densities).tolist(),
    }
    one = {name: choices[:1] for name, choices in values.items()}

    def sweep(values: dict = values, judge: Callable = lambda _: 0.0) -> search.Sweep:
        return search.sweep(adapters, RULE, judge, values)

    def merge(record: search.Record) -> cm.Adapter:
        return cm.merge(adapters, record.rule, scale=record.scale)

    first, programs = compilations(sweep)
    _, fewest = compilations(lambda: sweep(one))
    merged: list[cm.Adapter | None] = []

    def keep_some(adapter: cm.Adapter) -> float:
        merged.append(None if len(merged) % COMPARED else adapter)
        return 0.0

    records = sweep(judge=keep_some)
    errors = [_error(x, merge(record)) for x, record in zip(merged, records, strict=True) if x]
    merged.clear()
    times = {"sweep": [], "merges": []}
    for _ in range(rounds):
        times["sweep"].append(timed(sweep)[0])
        times["merges"].append(timed(lambda: [merge(record) for record in records])[0])
    return {
        "adapters": [adapter.metadata.name for adapter in adapters],
        "modules": len(adapters[0]),
        "candidates": len(records),
        "merges": min(times["merges"]),
        "sweep": statistics.median(times["sweep"]),
        "first": first,
        "programs": programs,
        "programs_of_one": fewest,
        "error": max(errors),
    }


def _error(found: cm.Adapter, expected: cm.Adapter) -> float:
    def distance(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.linalg.norm(x - y) / np.linalg.norm(y))

    return max(distance(found[path].dense(), lora.dense()) for path, lora in expected.items())


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = script(__doc__)
    parser.add_argument("adapters", nargs="*", type=Path, help="PEFT folders")
    parser.add_argument(
        "--scales", type=int, default=100, help="number of scales; default: %(default)s"
    )
    parser.add_argument(
        "--densities", type=int, default=5, help="number of densities; default: %(default)s"
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds; default: %(default)s")
    parser.add_argument("--check", action="store_true", help="fail if the target is missed")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes the results; returns the exit code."""
    options = parse(argv)
    watch = machine.Watch()
    paths = options.adapters or demo.adapters()
    adapters = [cm.load_peft(path) for path in paths]
    found = measure(adapters, options.scales, options.densities, options.rounds)
    ratio = found["merges"] / found["sweep"]
    described = machine.describe(watch)
    header = ["adapters", "modules", "candidates", "merges", "sweep", "merges / sweep", "first"]
    row = [
        f"{len(adapters)}: {', '.join(found['adapters'])}",
        f"{found['modules']}",
        f"{found['candidates']}",
        digits(found["merges"]),
        digits(found["sweep"]),
        f"{ratio:.1f}",
        f"{digits(found['first'])} ({found['programs']} programs)",
        f"{found['error']:.1e}",
    ]
    sheet = Sheet([*header, "error"], [row])
    result = {"machine": described, "ratio": ratio, "target": TARGET, **found}
    publish(options.output / "sweep", "Cost of a sweep", result, [sheet], NOTES)
    met = ratio >= TARGET and found["programs"] == found["programs_of_one"]
    return 1 if options.check and (machine.is_busy(described) or not met) else 0


if __name__ == "__main__":
    sys.exit(main())
