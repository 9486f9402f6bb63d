"""Times merges of a pack, and batches of requests that each have a merge of their own.

    python benchmarks/packs.py [--layers N] [--repeat N] [--requests N] [--tokens N] [--quick]

Six adapters of rank 16 for the attention of Llama-3-8B. First: from weights to a merge, of the
adapters themselves, of their pack, and of the pack to small matrices alone. Then one layer of each
shape, with a batch of requests: with one merged adapter, with as many merges as requests by
`coremerge_jax.serve`, and with as many written adapters. All take turns in each round. `device.py`
does the same on an accelerator. Writes a table and JSON to ``benchmarks/results/jax-VERSION``.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import machine
from common.publish import Sheet, digits, publish, script
from common.shapes import SHAPES, Kind, Shape
from common.timing import Runner

import coremerge_jax as cm

RULES = {
    "task_arithmetic": cm.task_arithmetic(),
    "tsv": cm.tsv(),
    "tsv, isotropize": cm.chain(cm.tsv(), cm.isotropize()),
    "ties": cm.ties(),
}

NOTES = """\
Medians of the rounds, in milliseconds. *adapters*: `cm.merge` of adapters in memory to one in
memory. *pack*: the same of their pack. *matrices*: `cm.compile_merge` of the pack. *adapter, MB*
and *matrices, MB*: the size of each, in float32. Preparing the pack took {packing} ms.

Layers: *base* is the product with the base weight; the others add to it one merged adapter of the
stacked rank for all requests; a merge of its own for each request, by `serve.apply`; a written
adapter of that rank for each request. Inputs and weights are in float32."""


def merging(shape: Shape, repeat: int) -> tuple[float, list[dict[str, Any]]]:
    """Measures merges; returns the seconds of preparing a pack, and a row for each rule."""
    adapters = shape.adapters()
    cm.pack(adapters)
    packing = Runner("pack", lambda: cm.pack(adapters))
    packing.round()
    pack: Any = packing.merged
    rows = []
    for name, rule in RULES.items():
        calls: dict[str, Callable[[], Any]] = {
            "adapters": lambda rule=rule: cm.merge(adapters, rule),
            "pack": lambda rule=rule: cm.merge(pack, rule),
            "matrices": lambda rule=rule: cm.compile_merge(pack, rule),
        }
        runners = [Runner(x, call) for x, call in calls.items()]
        sizes = {runner.name: _warm_up(runner) for runner in runners}
        for _ in range(repeat):
            for runner in runners:
                runner.round()
                runner.merged = None
        times = {runner.name: runner.record() for runner in runners}
        rows.append({"rule": name, "times": times, "bytes": sizes})
    return packing.record()["seconds"], rows


def _warm_up(runner: Runner) -> int:
    """Runs once; returns the bytes of the result."""
    runner.warm_up()
    found, runner.merged = runner.merged, None
    if isinstance(found, cm.Merge):
        return found.nbytes
    return sum(x.nbytes for x in jax.tree.leaves(found))


def serving(
    shape: Shape, kind: Kind, requests: int, tokens: int, repeat: int
) -> dict[str, dict[str, Any]]:
    """Measures one layer with a batch of requests, in four ways."""
    rng, rank = np.random.default_rng(0), shape.stacked_rank

    def normal(*size: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(size, np.float32) / size[-1] ** 0.5)

    x, base = normal(requests, tokens, kind.n), normal(kind.m, kind.n)
    a, b, cores = normal(rank, kind.n), normal(kind.m, rank), normal(requests, rank, rank)
    written_a, written_b = normal(requests, rank, kind.n), normal(requests, kind.m, rank)
    which = jnp.arange(requests)

    def plain(x: jax.Array) -> jax.Array:
        return x @ base.T

    ways: dict[str, tuple[Callable, tuple]] = {
        "base": (lambda x: plain(x), ()),
        "one adapter": (lambda x, a, b: plain(x) + (x @ a.T) @ b.T, (a, b)),
        "merges": (lambda x, *rest: plain(x) + cm.serve.apply(x, *rest), (a, b, cores, which)),
        "written adapters": (lambda x, a, b: plain(x) + _each(x, a, b), (written_a, written_b)),
    }
    runners = []
    for name, (function, more) in ways.items():
        compiled = jax.jit(function)
        runners.append(
            Runner(name, lambda f=compiled, more=more: jax.block_until_ready(f(x, *more)))
        )
    for runner in runners:
        runner.warm_up()
    for _ in range(repeat):
        for runner in runners:
            runner.round()
    sizes = {"merges": cores.nbytes, "written adapters": written_a.nbytes + written_b.nbytes}
    return {x.name: {**x.record(), "bytes": sizes.get(x.name, 0)} for x in runners}


def _each(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """Applies an adapter of its own to each request."""
    return jnp.einsum("nlr,nmr->nlm", jnp.einsum("nli,nri->nlr", x, a), b)


def measure(shape: Shape, repeat: int, requests: int = 64, tokens: int = 1) -> dict[str, Any]:
    """Measures merges of all modules, and one layer of each shape."""
    packing, merged = merging(shape, repeat)
    served = [
        {"layer": f"{kind.m} × {kind.n}", "times": serving(shape, kind, requests, tokens, repeat)}
        for kind in shape.kinds
    ]
    return {
        "shape": shape.title,
        "layers": shape.layers,
        "requests": requests,
        "tokens": tokens,
        "packing": packing,
        "merging": merged,
        "serving": served,
    }


def notes(result: Mapping[str, Any]) -> str:
    """Returns the notes below the tables."""
    return NOTES.format(packing=digits(1000 * result["packing"]))


def sheets(result: Mapping[str, Any]) -> list[Sheet]:
    """Returns the tables."""
    header = ["rule", "adapters", "pack", "matrices", "adapters / matrices"]
    header += ["adapter, MB", "matrices, MB"]
    rows = []
    for row in result["merging"]:
        times = {name: x["seconds"] for name, x in row["times"].items()}
        rows.append(
            [
                row["rule"],
                *(digits(1000 * x) for x in times.values()),
                f"{times['adapters'] / times['matrices']:.1f}×",
                *(f"{row['bytes'][x] / 1e6:.1f}" for x in ("adapters", "matrices")),
            ]
        )
    names = list(result["serving"][0]["times"])
    serving = [
        [
            row["layer"],
            *(digits(1000 * row["times"][name]["seconds"]) for name in names),
            *(f"{_over(row, 'merges', x):.2f}×" for x in ("one adapter", "written adapters")),
            *(f"{row['times'][x]['bytes'] / 1e6:.1f}" for x in ("merges", "written adapters")),
        ]
        for row in result["serving"]
    ]
    served = ["layer", *names, "merges / one adapter", "merges / written", "merges, MB"]
    return [
        Sheet(header, rows, "From weights to a merge", texts=1),
        Sheet([*served, "written, MB"], serving, "One layer", texts=1),
    ]


def _over(row: Mapping[str, Any], name: str, other: str) -> float:
    ratio: float = row["times"][name]["seconds"] / row["times"][other]["seconds"]
    return ratio


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = script(__doc__)
    parser.add_argument("--layers", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--repeat", type=int, default=5, help="rounds; default: %(default)s")
    parser.add_argument("--requests", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=1, help="of a request; default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="only try it, on tiny modules")
    options = parser.parse_args(argv)
    if min(options.layers, options.repeat, options.requests, options.tokens) < 1:
        parser.error("numbers must be at least 1")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes the results; returns the exit code."""
    options = parse(argv)
    shape = dataclasses.replace(SHAPES["llama-3-8b"], layers=options.layers)
    shape = shape.tiny() if options.quick else shape
    watch = machine.Watch()
    found = measure(shape, options.repeat, options.requests, options.tokens)
    described = machine.describe(watch)
    machine.is_busy(described)
    result = {"machine": described} | found
    title = f"Packs: {shape.title}, {shape.layers} layers, {options.requests} requests of "
    title += f"{options.tokens} token{'s' if options.tokens > 1 else ''}"
    publish(options.output / "packs", title, result, sheets(result), notes(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
