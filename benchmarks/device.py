"""Compares the stages of a merge with the peak rates of the device.

    python benchmarks/device.py [--shapes SHAPE ...] [--rules RULE ...] [--repeat N] [--tiny]

Merges on JAX's default device, in float64 and float32, and measures the operations and bytes per
second of each stage, beside those of a large matrix product and of a copy. Then it does as
`packs.py`, with Llama-3-8B. It needs only JAX.
Writes a table and JSON to ``benchmarks/results/jax-VERSION/device-NAME``.
"""

import argparse
import dataclasses
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import packs
from common import machine
from common.paper import RULE_TITLES
from common.peers import RULES
from common.publish import Sheet, digits, publish, script
from common.shapes import SHAPES, Kind, Shape

import coremerge_jax as cm
from coremerge_jax.linalg import lapack, matmul
from coremerge_jax.merging.cost import cost
from coremerge_jax.merging.groups import Group
from coremerge_jax.merging.precision import computing
from coremerge_jax.merging.stacks import over_modules
from coremerge_jax.rules import Chain, Context, Equivariance, chain
from coremerge_jax.spaces import Projection

NOTES = """\
Medians after a first run, whose surplus is *compile*; results are waited for. *merge*: `cm.merge`
of all modules, factors on the device before and after; *merge from host*: the same of NumPy
arrays. The stages below it are those of the modules of one shape, stacked: *Grams* are the
products that no merge can do without; *decompositions* are those of the Gram matrices alone;
*bases* is what the library does for both; *lift* is the way back to factors. Operations of products
are exact, those of decompositions and rules nominal (as in the cost model: Golub and Van Loan's
leading terms), bytes are those of inputs and results. Shares are of the ceilings in the first
table. A stage with a small share of both waits: for launches, or for steps that depend on each
other."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Time and rates of some work.

    Attributes:
        seconds: median.
        compile: how much longer the first run took.
        flop: floating-point operations.
        bytes: at least so many are read and written.
    """

    seconds: float
    compile: float
    flop: float
    bytes: float

    def record(self, ceiling: "Ceiling") -> dict[str, float]:
        """Returns the result for JSON, with shares of the ceilings."""
        flops, rate = self.flop / self.seconds, self.bytes / self.seconds
        return dataclasses.asdict(self) | {
            "flops": flops,
            "bandwidth": rate,
            "share_of_flops": flops / ceiling.flops,
            "share_of_bandwidth": rate / ceiling.bandwidth,
        }


@dataclasses.dataclass(frozen=True)
class Ceiling:
    """Measured peak rates of the device in one precision."""

    flops: float
    bandwidth: float


def clock(call: Callable[[], Any], repeat: int, flop: float = 0, size: float = 0) -> Timing:
    """Times a call, and once more before it."""
    times = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    median = statistics.median(times[1:])
    return Timing(median, max(times[0] - median, 0.0), flop, size)


def measure_ceiling(precision: str, repeat: int, tiny: bool) -> Ceiling:
    """Measures a large square matrix product, in full precision, and a scaled copy."""
    large = not tiny and jax.default_backend() != "cpu"
    side, length = (8192, 2**28) if large else (128, 2**14) if tiny else (1024, 2**25)
    with computing(precision) as dtype:
        x, y = jnp.ones((side, side), dtype), jnp.ones(length, dtype)
        product, copy = jax.jit(matmul), jax.jit(lambda y: y * 2)
        flops = 2 * side**3 / clock(lambda: product(x, x), repeat).seconds
        bandwidth = 2 * y.nbytes / clock(lambda: copy(y), repeat).seconds
    return Ceiling(flops, bandwidth)


# --- Whole merges, and their stages ----------------------------------------------------------


def merges(shape: Shape, rule: str, precision: str, repeat: int) -> dict[str, Timing]:
    """Merges of all modules, from and to the device or the host."""
    adapters = shape.adapters()
    on_device = jax.device_put(adapters)
    costs = [cost(_group(shape, kind), chain(RULES[rule]), cm.core()) for kind in shape.kinds]
    flop = sum(x.products + x.core for x in costs)
    size = sum(x.read + x.written for x in costs)
    named = {"merge": on_device, "merge from host": adapters}
    return {
        name: clock(partial(cm.merge, given, RULES[rule], precision=precision), repeat, flop, size)
        for name, given in named.items()
    }


def stages(shape: Shape, kind: Kind, rule: str, precision: str, repeat: int) -> dict[str, Timing]:
    """Returns the steps of merging modules of one kind, each on results of the one before."""
    parts, group = chain(RULES[rule]), _group(shape, kind)
    elementwise = parts.equivariance == Equivariance.ELEMENTWISE
    (m, n), rank, number = group.shape, sum(group.ranks), len(group.paths)
    p, q = min(m, rank), min(n, rank)
    decompositions = number * (9 if elementwise else 2 / 3) * (p**3 + q**3)
    products = number * 2 * (p**2 * max(m, rank) + q**2 * max(n, rank))
    factors = 4 * number * rank * (m + n)
    rng = np.random.default_rng(0)
    with computing(precision) as dtype:
        a = jnp.asarray(rng.standard_normal((number, rank, n), np.float32))
        b = jnp.asarray(rng.standard_normal((number, m, rank), np.float32))
        small = partial(_grams, dtype=dtype)
        project = partial(_project, ranks=group.ranks, dtype=dtype, elementwise=elementwise)
        combine, decompose = partial(_combine, parts), _eigh if elementwise else _cholesky
        grams, projections = _over(small)(a, b), _over(project)(a, b)
        cores = _over(combine)(projections)

        of_rule = cost(group, parts, cm.core()).core - decompositions
        squares = dtype.itemsize * number * (p**2 + q**2)
        of_cores = dtype.itemsize * number * (rank * (p + q) + p * q)
        work: dict[str, tuple[Callable, tuple, float, float]] = {
            "Grams": (small, (a, b), products, factors + squares),
            "decompositions": (decompose, (grams,), decompositions, 3 * squares),
            "bases": (project, (a, b), products + decompositions, factors + 2 * squares),
            "rule": (combine, (projections,), of_rule, of_cores),
            "lift": (_lift, (projections, cores), number * 2 * m * p * q, 2 * factors),
        }
        return {
            name: clock(partial(_over(fn), *inputs), repeat, flop, size)
            for name, (fn, inputs, flop, size) in work.items()
        }


def _group(shape: Shape, kind: Kind) -> Group:
    paths = tuple(shape.paths(kind))
    tasks = np.zeros((len(paths), shape.tasks), np.int32)
    return Group(paths, tasks, (kind.m, kind.n), (shape.rank,) * shape.tasks, len(paths))


def _over(fn: Callable) -> Callable:
    """Compiles one program for all modules, as `cm.merge` does."""
    return jax.jit(lambda *stacks: over_modules(lambda row: fn(*row), stacks))


def _grams(a: jax.Array, b: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Returns Gram matrices of the shorter sides."""
    a, b = a.astype(dtype), b.astype(dtype)
    a, b = a if len(a) <= a.shape[1] else a.T, b.T if len(b) >= b.shape[1] else b
    return matmul(a, a.T), matmul(b, b.T)


def _cholesky(grams: tuple[jax.Array, jax.Array]) -> Any:
    return [lapack.inverse_lower(lapack.cholesky(x)) for x in grams]


def _eigh(grams: tuple[jax.Array, jax.Array]) -> Any:
    return [lapack.eigh(x) for x in grams]


def _project(a: jax.Array, b: jax.Array, ranks: tuple[int, ...], **options: Any) -> Projection:
    return cm.core().project(a, b, ranks, **options)


def _combine(rule: Chain, projection: Projection) -> jax.Array:
    tasks = jnp.arange(len(jax.tree.leaves(projection.factors)[0]), dtype=jnp.int32)
    return rule(projection.factors, context=Context(shape=projection.shape, tasks=tasks))


def _lift(projection: Projection, core: jax.Array) -> cm.LoRA:
    lora = projection.lift(core)
    return cm.LoRA(a=lora.a.astype(jnp.float32), b=lora.b.astype(jnp.float32))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measures everything."""
    ceilings, rows = {}, []
    for precision in options.precisions:
        ceiling = measure_ceiling(precision, options.repeat, options.tiny)
        ceilings[precision] = dataclasses.asdict(ceiling)
        for name in options.shapes:
            shape = SHAPES[name].tiny() if options.tiny else SHAPES[name]
            for rule in options.rules:
                found = {"": merges(shape, rule, precision, options.repeat)}
                for kind in shape.kinds:
                    title = f"{shape.modules(kind)} × ({kind.m}, {kind.n})"
                    found[title] = stages(shape, kind, rule, precision, options.repeat)
                row = {"shape": shape.title, "rule": rule, "precision": precision}
                for title, timings in found.items():
                    rows += [
                        row | {"of": title, "stage": stage} | timing.record(ceiling)
                        for stage, timing in timings.items()
                    ]
                whole = found[""]["merge"].seconds
                print(f"{shape.title}: {rule}: {precision}: {digits(whole)}", file=sys.stderr)
                jax.clear_caches()
    packed = SHAPES["llama-3-8b"].tiny() if options.tiny else SHAPES["llama-3-8b"]
    return {"ceilings": ceilings, "rows": rows, "packs": packs.measure(packed, options.repeat)}


# --- Tables ----------------------------------------------------------------------------------


def sheets(result: dict[str, Any]) -> list[Sheet]:
    """Returns the tables of the ceilings, of the stages, and of packs."""
    ceilings = [
        [name, "", f"{c['flops'] / 1e9:.0f}", f"{c['bandwidth'] / 1e9:.0f}"]
        for name, c in result["ceilings"].items()
    ]
    header = ["ceiling", "", "GFLOP/s", "GB/s"]
    columns = ["seconds", "compile", "GFLOP/s", "of ceiling", "GB/s", "of ceiling"]
    rows = [_row(row) for row in result["rows"]]
    return [
        Sheet(header, ceilings),
        Sheet(["merge", "stage", "rule", "precision", *columns], rows),
        *packs.sheets(result["packs"]),
    ]


def _row(row: dict[str, Any]) -> list[str]:
    return [
        row["of"] or row["shape"],
        row["stage"],
        RULE_TITLES[row["rule"]],
        row["precision"],
        f"{row['seconds']:.2e}",
        digits(row["compile"]),
        f"{row['flops'] / 1e9:.3g}",
        f"{row['share_of_flops']:.1%}",
        f"{row['bandwidth'] / 1e9:.3g}",
        f"{row['share_of_bandwidth']:.1%}",
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = script(__doc__)
    shapes = ["llama-3-8b", "vit-b32", "llama-3-70b", "tasks-32", "rank-64", "saturated"]
    precisions = ["float64", "float32"]
    if jax.default_backend() == "tpu":
        precisions.remove("float64")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=shapes, metavar="SHAPE")
    rules = ["tsv+iso-c", "ties"]
    parser.add_argument("--rules", nargs="+", choices=RULES, default=rules, metavar="RULE")
    parser.add_argument(
        "--precisions", nargs="+", choices=("float64", "float32"), default=precisions
    )
    parser.add_argument("--repeat", type=int, default=5, help="runs; default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="only try it, on tiny modules")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes the results; returns the exit code."""
    options = parse(argv)
    watch = machine.Watch()
    device = jax.devices()[0]
    result = measure(options)
    memory = device.memory_stats() or {}
    described = machine.describe(watch) | {
        "device": device.device_kind,
        "device_peak_bytes": memory.get("peak_bytes_in_use"),
    }
    name = re.sub(r"\W+", "-", device.device_kind).strip("-").lower()
    title = f"Stages of a merge on {device.device_kind}"
    stem = options.output / f"device-{name}"
    notes = f"{NOTES}\n\n{packs.notes(result['packs'])}"
    publish(stem, title, {"machine": described} | result, sheets(result), notes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
