"""What does a sweep cost? Many candidates on projected adapters, against as many merges.

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
import machine
import numpy as np
from publish import Sheet, digits, folder, publish

import coremerge_jax as cm
from coremerge_jax import demo, search

RULE = cm.chain(cm.ties(), cm.isotropize())
TARGET = 20.0
COMPARED = 25  # one of so many candidates is compared with what `merge` gives
NOTES = """\
Seconds for all candidates, which nothing evaluates. *merges*: one call of `merge` for each, with
compiled programs; the fastest of the rounds. *sweep*: the median of the rounds, projecting anew,
with compiled programs. *first*: the same with nothing compiled, and how many programs that
compiled: as many as a sweep of one candidate does. *error*: largest relative difference of a
module's update from that of `merge`, over every 25th candidate."""


def timed(fn: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what it gives."""
    start = time.perf_counter()
    result = fn()
    return time.perf_counter() - start, result


def compilations(fn: Callable[[], Any]) -> tuple[int, float]:
    """How many programs were compiled, with none at hand before, and the seconds."""
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
    """The figures for one set of adapters."""
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
    """Options from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("adapters", nargs="*", type=Path, help="PEFT folders")
    parser.add_argument("--scales", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--densities", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--check", action="store_true", help="fail if the target is missed")
    parser.add_argument("--output", type=Path, default=folder(), help="default: %(default)s")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, shows and writes; the exit code."""
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
