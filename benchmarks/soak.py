"""Makes thousands of merges on 1, 2 and 4 cores, with a time limit on each, to find hangs.

    python benchmarks/soak.py [--merges 10000] [--cores 1 2 4] [--seed 0] [--control]

For each number of cores, a process of its own merges in seeded random order: many signatures,
rules and spaces; from several threads at once; inside jitted programs that do other work, under
`jax.vmap` and `jax.grad`. A step that takes too long ends that process, with the Python stack of
each thread. Each result is also compared with that of the first time.

``--control`` shows that hangs would be found: without the library's precaution, JAX sends batches
to LAPACK, which hangs in some releases of JAX (0.9.2 among them).
"""

import argparse
import contextlib
import dataclasses
import faulthandler
import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import machine
from common.publish import Sheet, digits, publish, script

import coremerge_jax as cm
from coremerge_jax.linalg import lapack, matmul

PATIENCE = 120  # seconds for a step; a compiling one takes a few
TOLERANCE = 1e-4  # of results from those of the first time; threads may add in another order
NOTES = """\
Each row is a fresh process with XLA's thread pool of that size (the environment variable `NPROC`),
and on no more cores than that. A merge is one call of `cm.merge`, or one projection and merge
under `jax.vmap`; adapters have one to eight modules. *longest step*: seconds, without the first
time that each is taken, which compiles."""

KEY = jax.random.key(0)
TSV, ISO, TIES, CART, MEAN = cm.tsv(), cm.isotropize(), cm.ties(), cm.cart(rank=2), cm.mean()
TSV_ISO = cm.chain(TSV, ISO)
DARE_TIES = cm.chain(cm.dare(), cm.ties())


# --- The process that may hang ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Signature:
    """Adapters with modules of one shape."""

    m: int
    n: int
    ranks: tuple[int, ...]
    modules: int

    def __str__(self) -> str:
        return f"{self.modules} × ({self.m}, {self.n}), ranks {self.ranks}"

    @functools.cache  # noqa: B019  # signatures live as long as the process
    def adapters(self, dtype: str = "float32") -> list[cm.Adapter]:
        """Returns one adapter for each rank."""
        rng = np.random.default_rng(self.m)
        return [
            cm.Adapter(
                {
                    f"layers.{i}": cm.LoRA(
                        a=rng.standard_normal((rank, self.n)).astype(dtype),
                        b=rng.standard_normal((self.m, rank)).astype(dtype),
                    )
                    for i in range(self.modules)
                }
            )
            for rank in self.ranks
        ]


TINY = Signature(12, 9, (2, 3, 1), 4)
SMALL = Signature(24, 20, (4, 4, 4), 1)
FULL = Signature(16, 12, (8, 8, 8), 8)  # R > m, n
MIDDLE = Signature(48, 40, (6, 6, 12, 12), 3)
LARGE = Signature(96, 80, (8,) * 6, 4)
LARGE_FULL = Signature(64, 48, (16,) * 5, 2)  # R > m, n


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of the soak.

    Attributes:
        name: for messages.
        call: takes the step, and returns arrays.
        merges: the number of merges in it.
    """

    name: str
    call: Callable[[], Any]
    merges: int = 1


def steps(quick: bool) -> list[Step]:
    """Returns all steps, or those with fewer programs to compile."""
    plain = [
        _plain(LARGE, TSV),
        _plain(LARGE, TIES),
        _plain(MIDDLE, TSV_ISO),
        _plain(TINY, TIES),
    ]
    if not quick:
        plain += [
            _plain(LARGE, TSV_ISO),
            _plain(LARGE_FULL, TSV),
            _plain(LARGE_FULL, DARE_TIES),
            _plain(LARGE_FULL, ISO),
            _plain(LARGE, CART),
            _plain(LARGE, TIES, cm.knots()),
            _plain(LARGE, ISO, cm.full()),
            _plain(MIDDLE, DARE_TIES),
            _plain(MIDDLE, cm.ties(scope="model")),
            _plain(MIDDLE, TSV, cm.knots()),
            *(_plain(shape, rule) for shape in (SMALL, FULL) for rule in (TSV_ISO, CART, MEAN)),
            _plain(TINY, MEAN),
            _plain(TINY, TSV_ISO, cm.knots()),
            _plain(FULL, DARE_TIES, cm.full()),
        ]
    jitted = [_in_jit(LARGE, TSV_ISO), _vmapped(LARGE, TSV), _gradient(SMALL, TSV_ISO)]
    if not quick:
        jitted += [_in_jit(MIDDLE, TIES), _vmapped(MIDDLE, TIES), _gradient(MIDDLE, TIES)]
    groups = [plain[i : i + 4] for i in range(0, len(plain), 4)]
    together = [_together([*group, step]) for group, step in zip(groups, jitted, strict=False)]
    return [*plain, *jitted, *together, _together([plain[0]] * 4), _together(jitted)]


def _plain(shape: Signature, rule: cm.rules.Rule, space: Any = None) -> Step:
    name = f"{rule} in {space or cm.core()} of {shape}"
    return Step(name, lambda: cm.merge(shape.adapters(), rule, space=space, scale=1.0, key=KEY))


def _in_jit(shape: Signature, rule: cm.rules.Rule) -> Step:
    """Merges beside products and decompositions that do not depend on it."""

    @jax.jit
    def program(adapters: Sequence[cm.Adapter], x: jax.Array) -> tuple:
        square = matmul(x, x.T)
        values = [jnp.linalg.eigh(square + i)[0] for i in range(3)]
        merged = cm.merge(adapters, rule, scale=1.0)
        return merged, values, functools.reduce(matmul, [square / len(x)] * 8)

    x = np.random.default_rng(0).standard_normal((128, 128)).astype(np.float32)
    return Step(f"jit: {rule} of {shape}", lambda: program(shape.adapters(), x))


def _vmapped(shape: Signature, rule: cm.rules.Rule) -> Step:
    """Projects and merges several modules at once, in float64."""

    @jax.jit
    @jax.vmap
    def program(a: jax.Array, b: jax.Array) -> cm.LoRA:
        return cm.core().project(a, b, shape.ranks).merge(rule)

    def call() -> Any:
        adapters = shape.adapters("float64")
        paths = list(adapters[0])
        a = np.stack([np.concatenate([x[path].a for x in adapters]) for path in paths])
        b = np.stack([np.concatenate([x[path].b for x in adapters], axis=1) for path in paths])
        with jax.enable_x64(True):
            return program(a, b)

    return Step(f"vmap: {rule} of {shape}", call)


def _gradient(shape: Signature, rule: cm.rules.Rule) -> Step:
    @jax.jit
    @jax.grad
    def program(weights: jax.Array, adapters: Sequence[cm.Adapter]) -> jax.Array:
        merged = cm.merge(adapters, rule, weights=weights, scale=1.0)
        return sum(jnp.sum(jnp.square(matmul(x.b, x.a))) for x in merged.values())

    weights = np.linspace(0.5, 1, len(shape.ranks), dtype=np.float32)
    return Step(f"grad: {rule} of {shape}", lambda: program(weights, shape.adapters()))


def _together(which: Sequence[Step]) -> Step:
    """Takes several steps at once, each in a thread."""

    def call() -> list[Any]:
        with ThreadPoolExecutor(len(which)) as pool:
            return list(pool.map(lambda step: jax.block_until_ready(step.call()), which))

    name = f"at once: {'; '.join(step.name for step in which)}"
    return Step(name, call, sum(step.merges for step in which))


def control() -> None:
    """Switches off the precaution that keeps decompositions from waiting for each other."""
    for name, function in vars(lapack).items():
        if isinstance(function, jax.custom_batching.custom_vmap):
            setattr(lapack, name, function.fun)


def soak(options: argparse.Namespace) -> None:
    """Takes steps until there are enough merges; prints each before it starts."""
    rng = np.random.default_rng(options.seed)
    if options.control:
        control()
    every = steps(options.quick)
    first: dict[int, list[np.ndarray]] = {}
    done, order = 0, list(range(len(every)))  # each once, so that all is compiled
    start = time.perf_counter()
    while done < options.merges:
        i = order.pop() if order else int(rng.integers(len(every)))
        faulthandler.dump_traceback_later(options.patience, exit=True)
        print(done, f"{time.perf_counter() - start:.1f}", every[i].name, sep="\t", flush=True)
        found = [np.asarray(x) for x in jax.tree.leaves(every[i].call())]
        _compare(every[i], found, first.setdefault(i, found))
        done += every[i].merges
    faulthandler.cancel_dump_traceback_later()
    print(done, f"{time.perf_counter() - start:.1f}", "", sep="\t", flush=True)


def _compare(step: Step, found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for x, y in zip(found, expected, strict=True):
        if not np.allclose(x, y, rtol=0, atol=TOLERANCE * float(np.abs(y).max())):
            raise AssertionError(f"{step.name}: not what it was the first time")


# --- The process that watches ----------------------------------------------------------------


@contextlib.contextmanager
def visible(cores: int) -> Iterator[None]:
    """Limits processes started in this context to a number of cores."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:cores])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def run(cores: int, arguments: Sequence[str]) -> dict[str, Any]:
    """Soaks in a process of its own; returns the record of it."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", *arguments]
    # The library has to limit the threads of BLAS itself.
    environment = {name: x for name, x in os.environ.items() if not name.endswith("_NUM_THREADS")}
    environment |= {"NPROC": str(cores), "JAX_PLATFORMS": "cpu"}
    with visible(cores):
        process = subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
    with process, ThreadPoolExecutor(1) as pool:
        errors = pool.submit(process.stderr.read)  # type: ignore[union-attr]
        progress = Progress(cores)
        for line in process.stdout:  # type: ignore[union-attr]
            progress.note(line)
        code, said = process.wait(), errors.result()
    hung = "Timeout (" in said  # what faulthandler says
    record = {
        "cores": cores,
        "merges": progress.merges,
        "seconds": progress.seconds,
        "longest": progress.longest,
        "hangs": int(hung),
    }
    return record if code == 0 else record | {"step": progress.step, "error": said[-4000:]}


@dataclasses.dataclass
class Progress:
    """Progress of a soaking process.

    Attributes:
        cores: for messages.
        merges: number of merges done.
        seconds: time of these.
        step: current step.
        longest: seconds of the longest step, first times (which compile) apart.
    """

    cores: int
    merges: int = 0
    seconds: float = 0.0
    step: str = "start"
    longest: float = 0.0
    _seen: set[str] = dataclasses.field(default_factory=set)

    def note(self, line: str) -> None:
        """Reads a line: merges, seconds and the next step."""
        merges, seconds, step = line.rstrip("\n").split("\t")
        if self.step in self._seen:
            self.longest = max(self.longest, round(float(seconds) - self.seconds, 1))
        if int(merges) // 1000 > self.merges // 1000:
            print(f"{self.cores} cores: {merges} merges, {seconds} s", file=sys.stderr, flush=True)
        self._seen.add(self.step)
        self.merges, self.seconds, self.step = int(merges), float(seconds), step


def sheet(rows: Sequence[dict[str, Any]]) -> Sheet:
    """Returns the table."""
    return Sheet(
        ["cores", "outcome", "merges", "seconds", "longest step", "hangs"],
        [
            [
                str(row["cores"]),
                "failed" if "error" in row else "done",
                str(row["merges"]),
                digits(row["seconds"]),
                str(row["longest"]),
                str(row["hangs"]),
            ]
            for row in rows
        ],
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = script(__doc__)
    parser.add_argument(
        "--merges", type=int, default=10_000, help="merges of each process; default: %(default)s"
    )
    parser.add_argument(
        "--cores", type=int, nargs="+", default=[1, 2, 4], help="numbers of cores; default: 1 2 4"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the order; default: %(default)s"
    )
    parser.add_argument("--quick", action="store_true", help="take fewer kinds of steps")
    parser.add_argument("--control", action="store_true", help="switch the precaution off")
    parser.add_argument(
        "--patience", type=float, default=PATIENCE, help="seconds for a step; default: %(default)s"
    )
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Soaks, prints and writes the results; returns 1 if anything hung or failed."""
    options = parse(argv)
    if options.child:
        soak(options)
        return 0
    watch = machine.Watch()
    arguments = [f"--{name}={getattr(options, name)}" for name in ("merges", "seed", "patience")]
    arguments += [f"--{name}" for name in ("quick", "control") if getattr(options, name)]
    rows = []
    for cores in options.cores:
        rows.append(run(cores, arguments))
        if "error" in rows[-1]:
            print(f"{cores} cores: {rows[-1]['step']}\n{rows[-1]['error']}", file=sys.stderr)
    result = {"machine": machine.describe(watch), "seed": options.seed, "rows": rows}
    name = "soak-control" if options.control else "soak"
    publish(options.output / name, "Soak", result, [sheet(rows)], NOTES)
    return 1 if any("error" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
