"""How fast is a merge in memory? Against the paper's algorithm, peft, and the hardware's floor.

    python benchmarks/speed.py [--only SHAPE] [--rules RULE,RULE] [--repeat N] [--check] [--quick]

Contenders run one after another in one process, in rounds (each once, then each once more), so
that a drift of the machine meets all of them. Writes a table, JSON and a plot to
``benchmarks/results/jax-VERSION``. All of it takes about 12 minutes on two cores.
"""

import argparse
import dataclasses
import fnmatch
import gc
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import machine
import report
from floor import Files, Floor
from peers import CONTENDERS, PEFT_RULES, RULES, Merged, relative_error
from publish import folder, publish
from shapes import SHAPES, Shape

import coremerge_jax as cm
from coremerge_jax.merging.cost import Machine, expected_seconds

PATIENCE = 8.0  # seconds: who has used as many in a row of the table is not repeated,
LEAST = 3  # unless nothing is scaled: then there are as many rounds, so that the median is one
COMPARED = 8  # modules whose results are compared

PEERS = tuple(name for name in CONTENDERS if name != "ours")
EVERY = tuple(RULES)
MAIN = ("ties", "tsv+iso-c")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Who runs on a shape.

    Attributes:
        rules: the rules that are measured.
        modules: for each contender beside ours, on how many modules of each kind it runs; times
            are scaled to all of them. None is all.
        only: rules of contenders that cannot do all, or not in time.
    """

    rules: tuple[str, ...]
    modules: Mapping[str, int | None]
    only: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def restrict(self, rules: Sequence[str], peers: Sequence[str]) -> "Plan":
        """The same for some rules and contenders."""
        return dataclasses.replace(
            self,
            rules=tuple(rule for rule in self.rules if rule in rules),
            modules={name: count for name, count in self.modules.items() if name in peers},
        )

    def runs(self, contender: str, rule: str) -> bool:
        """Whether a contender runs a rule."""
        if contender == "peft" and rule not in PEFT_RULES:
            return False
        return rule in self.only.get(contender, EVERY)


PLANS = {
    "vit-b32": Plan(EVERY, {"torch": None, "jax": None, "peft": 4, "full": 2, "knots": 2}),
    "llama-3-8b": Plan(
        EVERY,
        {"torch": None, "jax": 4, "peft": 1, "full": 1, "knots": 1},
        only={"full": ("ties", "iso-c"), "knots": ("ties",)},
    ),
    "llama-3-70b": Plan(MAIN, {"torch": None, "jax": 2}),
    **{f"tasks-{t}": Plan(MAIN, {"torch": None, "jax": 2}) for t in (2, 4, 8, 16)},
    "tasks-32": Plan(MAIN, {"torch": 1, "jax": 1}),
    "tasks-64": Plan(MAIN, {"torch": 1}),
    "tasks-100": Plan(MAIN, {"torch": 1}, only={"torch": ("ties",)}),
    "rank-4": Plan(MAIN, {"torch": None, "jax": 2}),
    "rank-64": Plan(MAIN, {"torch": 1, "jax": 1}),
    "rank-256": Plan(MAIN, {"torch": 1}),
    "saturated": Plan(MAIN, {"torch": None, "jax": 2}),
}


@dataclasses.dataclass
class Runner:
    """One contender on one row of the table.

    Attributes:
        name: key of the contender, or ``"floor"`` or ``"read"``.
        call: what is timed.
        scale: modules of the shape per module that the call merges.
        merged: what the last call gave.
        seconds: what the calls took, scaled.
        first: what the first call took, scaled, where that compiles.
    """

    name: str
    call: Callable[[], Any]
    scale: float = 1.0
    merged: Merged | None = None
    seconds: list[float] = dataclasses.field(default_factory=list)
    first: float | None = None

    def warm_up(self) -> None:
        """Runs once, to compile."""
        self.first = self._run()

    def round(self) -> None:
        """Runs once more, unless it has taken long enough."""
        least = LEAST if self.scale == 1 else 1
        if len(self.seconds) < least or sum(self.seconds) / self.scale < PATIENCE:
            self.seconds.append(self._run())

    def _run(self) -> float:
        self.merged = None
        gc.collect()
        time.sleep(0.05)  # idle threads of the library that ran before spin for a while
        start = time.perf_counter()
        self.merged = self.call()
        return (time.perf_counter() - start) * self.scale

    def record(self) -> dict[str, Any]:
        """The result, for JSON."""
        median = statistics.median(self.seconds)
        record: dict[str, Any] = {
            "seconds": median,
            "min": min(self.seconds),
            "runs": len(self.seconds),
        }
        if self.first is not None:
            record["compile"] = max(self.first - median, 0.0) / self.scale
        if self.scale != 1:
            record["scaled_by"] = self.scale
        return record


def measure(shape: Shape, plan: Plan, repeat: int) -> list[dict[str, Any]]:
    """Measures a shape: one row of the table a rule."""
    adapters = shape.adapters()
    floor, files = Floor(shape), Files(shape)
    rates = Machine.measure(machine.cores())
    rows = []
    for rule in plan.rules:
        runners = _runners(shape, plan, rule, adapters)
        runners += [Runner("floor", floor), Runner("read", files)]
        for runner in runners:
            if runner.name in CONTENDERS and CONTENDERS[runner.name].compiles:
                runner.warm_up()
        for _ in range(repeat):
            for runner in runners:
                runner.round()
        times = {runner.name: runner.record() for runner in runners}
        _compare(rule, runners, times)
        times["model"] = {"seconds": _expected(rule, adapters, rates)}
        times["floor"] |= {"gflop": floor.flop / 1e9, "libraries": floor.libraries}
        times["read"]["bytes"] = files.bytes
        rows.append(_describe(shape) | {"rule": rule, "times": times})
        print(report.progress(rows[-1]), file=sys.stderr, flush=True)
    files.remove()
    return rows


def _expected(rule: str, adapters: Sequence[cm.Adapter], rates: Machine) -> float:
    """Seconds that the cost model expects of us, without compiling and files."""
    stream = cm.merge_stream(adapters, RULES[rule])
    seconds = expected_seconds(
        stream.costs(), cm.chain(RULES[rule]), rates, stream.workers, programs=0
    )
    return sum(seconds[stage] for stage in ("products", "core", "copies"))


def _runners(shape: Shape, plan: Plan, rule: str, adapters: Sequence[cm.Adapter]) -> list[Runner]:
    runners = []
    for name, modules in {"ours": None, **plan.modules}.items():
        contender = CONTENDERS[name]
        if contender.installed and plan.runs(name, rule):
            paths = [path for kind in shape.kinds for path in shape.paths(kind, modules)]
            some = [adapter.replace(modules=adapter.read(paths)) for adapter in adapters]
            scale = len(adapters[0]) / len(paths)
            runners.append(Runner(name, contender.prepare(rule, some), scale))
    return runners


def _compare(rule: str, runners: Sequence[Runner], times: dict[str, dict]) -> None:
    """Notes how far the updates of others are from ours, where they should be the same."""
    mine = runners[0].merged
    assert mine is not None
    for runner in runners[1:]:
        if runner.merged is not None and rule in CONTENDERS[runner.name].same:
            paths = list(runner.merged)
            paths = paths[:: -(-len(paths) // COMPARED)]
            errors = [relative_error(runner.merged[path], mine[path]) for path in paths]
            times[runner.name]["error"] = max(errors)


def _describe(shape: Shape) -> dict[str, Any]:
    kinds = [{"modules": shape.modules(kind), "m": kind.m, "n": kind.n} for kind in shape.kinds]
    return {
        "shape": shape.name,
        "title": shape.title,
        "kinds": kinds,
        "tasks": shape.tasks,
        "rank": shape.rank,
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Options from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=f"shapes: {', '.join(SHAPES)}"
    )
    parser.add_argument(
        "--only", action="append", metavar="SHAPE", help="shapes by name or pattern (tasks-*)"
    )
    parser.add_argument("--rules", default=",".join(EVERY), help="default: %(default)s")
    parser.add_argument("--peers", default=",".join(PEERS), help="default: %(default)s")
    parser.add_argument("--repeat", type=int, default=5, help="rounds; default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="tiny modules: does it all run?")
    parser.add_argument("--check", action="store_true", help="fail if a target is missed")
    parser.add_argument(
        "--output",
        type=Path,
        default=folder(),
        help="folder; default: %(default)s",
    )
    options = parser.parse_args(argv)
    patterns = options.only or ["*"]
    options.shapes = [
        shape for name, shape in SHAPES.items() if any(fnmatch.fnmatch(name, p) for p in patterns)
    ]
    options.rules = list(filter(None, options.rules.split(",")))
    options.peers = list(filter(None, options.peers.split(",")))
    unknown = {*options.rules, *options.peers} - {*EVERY, *PEERS}
    if not options.shapes or unknown or options.repeat < 1:
        parser.error("no such shape, rule or peer, or fewer than one round")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, shows and writes; the exit code."""
    options = parse(argv)
    if any(
        CONTENDERS[name].needs != "jax" and CONTENDERS[name].installed for name in options.peers
    ):
        import torch

        torch.set_num_threads(machine.cores())
    watch = machine.Watch()
    rows = []
    for shape in options.shapes:
        shaped = shape.tiny() if options.quick else shape
        plan = PLANS[shape.name].restrict(options.rules, options.peers)
        rows += measure(shaped, plan, options.repeat)
        jax.clear_caches()
    titles = {name: contender.title for name, contender in CONTENDERS.items()}
    described = machine.describe(watch)
    result: dict[str, Any] = {"machine": described, "contenders": titles, "rows": rows}
    result["targets"] = report.targets(rows)
    sheets = [report.times_sheet(result), report.targets_sheet(result)]
    publish(options.output / "speed", "Speed of a merge in memory", result, sheets, report.NOTES)
    if importlib.util.find_spec("matplotlib"):
        from plot import draw

        draw(result, options.output / "speed.svg")
    met = not machine.is_busy(described) and all(target["met"] for target in result["targets"])
    return 1 if options.check and not met else 0


if __name__ == "__main__":
    sys.exit(main())
