"""Times every rule, against the others and against the cost model.

    python benchmarks/rules.py [--rules PATTERN] [--repeat N] [--quick] [--output DIR]

Measures every rule with its default parameters, some chains and some spaces, on adapters in memory:
Llama-3-8B, 128 modules, six adapters of rank 16. All run once to compile, and then once in each
round, so that a drift of the machine affects all of them. Writes a table and JSON to
``benchmarks/results/jax-VERSION``. All of it takes about 4 minutes on two cores.
"""

import argparse
import fnmatch
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from common import machine
from common.publish import Sheet, digits, publish, script
from common.shapes import SHAPES
from common.timing import Runner, model_seconds

import coremerge_jax as cm
from coremerge_jax.merging.cost import Machine
from coremerge_jax.rules import RULES, Chain
from coremerge_jax.spaces import Space

SHAPE = SHAPES["llama-3-8b"]
BASES = ("task_arithmetic", "tsv")  # to which the others are compared

NOTES = """\
Seconds for all modules: median of the rounds, the fastest in brackets. Factors are float32 NumPy
arrays in memory, before and after. *compile*: first call less the median. *products*, *core*:
operations in the cost model, in matrix products and in everything else; *model*: the seconds that
it expects from them and from the machine's rates; *memory*: the most that it expects all batches
in flight to take. A chain is applied from left to right; if no part of it merges, adapters are
summed. Linear rules need no space. RegMean is given random statistics, and merges at
the automatic scale, which takes two passes; all others merge at scale 1."""


class Entry(NamedTuple):
    """A row of the table."""

    rule: Chain
    space: Space = cm.core()
    space_name: str = "core"
    scale: float | str = 1.0


def entries() -> dict[str, Entry]:
    """Returns the rows of the table by name."""
    chains = {
        "tsv, isotropize": cm.chain(cm.tsv(), cm.isotropize()),
        "ties, isotropize": cm.chain(cm.ties(), cm.isotropize()),
        "flatten, tsv": cm.chain(cm.flatten(), cm.tsv()),
        "tsv, svc": cm.chain(cm.tsv(), cm.svc()),
        "pico, tsv": cm.chain(cm.pico(), cm.tsv()),
    }
    spaces: dict[str, Space] = {
        "tucker": cm.tucker(),
        "core, balanced": cm.core(gauge="balanced"),
    }
    return {
        **{name: Entry(cm.chain(make())) for name, make in RULES.items()},
        # At scale 1, their results are too small to be of use.
        "regmean": Entry(cm.chain(cm.regmean()), scale="auto"),
        "regmean, plain": Entry(cm.chain(cm.regmean(orthogonalize=False)), scale="auto"),
        **{name: Entry(rule) for name, rule in chains.items()},
        **{
            f"ties in {name}": Entry(cm.chain(cm.ties()), space, name)
            for name, space in spaces.items()
        },
    }


def measure(
    some: Mapping[str, Entry], adapters: Sequence[cm.Adapter], repeat: int
) -> list[dict[str, Any]]:
    """Measures the entries; returns a row of the table for each."""
    rates = Machine.measure(machine.cores())
    needed = any(entry.rule.needs_inputs for entry in some.values())
    inputs = random_statistics(adapters) if needed else None

    def stream(entry: Entry) -> cm.MergeStream:
        return cm.merge_stream(
            adapters,
            entry.rule,
            space=entry.space,
            scale=entry.scale,
            key=jax.random.key(0),
            statistics=inputs,
        )

    runners = {
        name: Runner(name, lambda entry=entry: stream(entry).collect())
        for name, entry in some.items()
    }
    for name, runner in runners.items():
        runner.warm_up()
        runner.merged = None
        print(f"{name}: first call {digits(runner.first or 0)} s", file=sys.stderr, flush=True)
    for _ in range(repeat):
        for runner in runners.values():
            runner.round()
            runner.merged = None
    times = {name: runner.record() for name, runner in runners.items()}
    return [
        {
            "name": name,
            "rule": repr(entry.rule),
            "space": entry.space_name,
            **_expected(stream(entry), entry.rule, rates),
            "times": times[name],
            "over": {
                base: times[name]["seconds"] / times[base]["seconds"]
                for base in BASES
                if base in times
            },
        }
        for name, entry in some.items()
    ]


def random_statistics(adapters: Sequence[cm.Adapter]) -> cm.Statistics:
    """Returns seeded statistics of as many Gaussian inputs as the stacks have rows."""
    rng = np.random.default_rng(0)
    grams = {}
    for path in adapters[0]:
        squares = np.concatenate([np.sum(np.square(x[path].a), axis=1) for x in adapters])
        z = rng.standard_normal((len(adapters), len(squares), len(squares)), np.float32)
        z *= np.sqrt(squares)
        ranks = tuple(x[path].rank for x in adapters)
        counts, tasks = np.full(len(adapters), len(squares)), tuple(range(len(adapters)))
        grams[path] = cm.Gram(np.swapaxes(z, 1, 2) @ z, counts, squares, tasks, ranks)
    return cm.Statistics(grams, [adapter.metadata.name for adapter in adapters])


def _expected(stream: cm.MergeStream, rule: Chain, rates: Machine) -> dict[str, Any]:
    """Returns the estimates of the cost model, without compiling and files."""
    costs = stream.costs()
    return {
        "products": sum(one.products for one in costs),
        "core": sum(one.core for one in costs),
        "memory": stream.memory,
        "model": model_seconds(stream, rule, rates),
    }


def sheet(rows: Sequence[Mapping[str, Any]]) -> Sheet:
    """Returns the table."""
    header = ["rule", "space", "seconds", *(f"/ {base}" for base in BASES)]
    header += [
        "model",
        "seconds / model",
        "products, GFLOP",
        "core, GFLOP",
        "memory, MiB",
        "compile",
    ]
    return Sheet(header, [_cells(row) for row in rows])


def _cells(row: Mapping[str, Any]) -> list[str]:
    times = row["times"]
    return [
        row["name"].split(" in ")[0],
        row["space"],
        f"{digits(times['seconds'])} ({digits(times['min'])})",
        *(f"{row['over'][base]:.1f}×" if base in row["over"] else "" for base in BASES),
        digits(row["model"]),
        f"{times['seconds'] / row['model']:.1f}×",
        f"{row['products'] / 1e9:.1f}",
        f"{row['core'] / 1e9:.1f}",
        f"{row['memory'] / 2**20:.0f}",
        digits(times["compile"]),
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = script(__doc__)
    parser.add_argument(
        "--rules", action="append", metavar="PATTERN", help="rows by name or pattern (*tsv*)"
    )
    parser.add_argument("--repeat", type=int, default=5, help="rounds; default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="only try it, on tiny modules")
    options = parser.parse_args(argv)
    patterns = options.rules or ["*"]
    options.entries = {
        name: entry
        for name, entry in entries().items()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }
    if not options.entries or options.repeat < 1:
        parser.error("no such rule, or fewer than one round")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes the results; returns the exit code."""
    options = parse(argv)
    shape = SHAPE.tiny() if options.quick else SHAPE
    watch = machine.Watch()
    rows = measure(options.entries, shape.adapters(), options.repeat)
    described = machine.describe(watch)
    machine.is_busy(described)
    result = {"machine": described, "shape": shape.title, "rows": rows}
    publish(
        options.output / "rules", f"Cost of each rule: {shape.title}", result, [sheet(rows)], NOTES
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
