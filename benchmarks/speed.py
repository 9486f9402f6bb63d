"""Times merges in memory, against the paper's algorithm, peft, and the hardware's floor.

    python benchmarks/speed.py [--only SHAPE] [--rules RULE,RULE] [--repeat N] [--check] [--quick]

Contenders run one after another in one process, in rounds (each once, then each once more), so
that a drift of the machine meets all of them. Writes a table, JSON and a plot to
``benchmarks/results/jax-VERSION``. All of it takes about 12 minutes on two cores.
"""

import argparse
import dataclasses
import fnmatch
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from common import machine, report
from common.floor import Files, Floor
from common.peers import CONTENDERS, PEFT_RULES, RULES, relative_error
from common.publish import publish, script
from common.shapes import SHAPES, Shape
from common.timing import Runner, model_seconds

import coremerge_jax as cm
from coremerge_jax.merging.cost import Machine

COMPARED = 8  # modules whose results are compared

PEERS = tuple(name for name in CONTENDERS if name != "ours")
EVERY = tuple(RULES)
MAIN = ("ties", "tsv+iso-c")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Contenders and rules that run on a shape.

    Attributes:
        rules: the rules that are measured.
        modules: for each contender beside ours, on how many modules of each kind it runs; times
            are scaled to all of them. None means all.
        only: rules of contenders that cannot run all, or not in time.
    """

    rules: tuple[str, ...]
    modules: Mapping[str, int | None]
    only: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def restrict(self, rules: Sequence[str], peers: Sequence[str]) -> "Plan":
        """Returns the plan for only some rules and contenders."""
        return dataclasses.replace(
            self,
            rules=tuple(rule for rule in self.rules if rule in rules),
            modules={name: count for name, count in self.modules.items() if name in peers},
        )

    def runs(self, contender: str, rule: str) -> bool:
        """Returns whether a contender runs a rule."""
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


def measure(shape: Shape, plan: Plan, repeat: int) -> list[dict[str, Any]]:
    """Measures a shape; returns one row of the table for each rule."""
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
    """Returns the seconds that the cost model expects of our merge."""
    stream = cm.merge_stream(adapters, RULES[rule], scale=1.0)
    return model_seconds(stream, cm.chain(RULES[rule]), rates)


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
    """Records the distance of the others' updates from ours, where they should be equal."""
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
    """Parses the command line."""
    parser = script(__doc__, epilog=f"shapes: {', '.join(SHAPES)}")
    parser.add_argument(
        "--only",
        action="append",
        metavar="SHAPE",
        help="shapes by name or pattern (tasks-*); default: all but many",
    )
    parser.add_argument(
        "--rules", default=",".join(EVERY), help="rules, with commas; default: %(default)s"
    )
    parser.add_argument(
        "--peers", default=",".join(PEERS), help="contenders, with commas; default: %(default)s"
    )
    parser.add_argument("--repeat", type=int, default=5, help="rounds; default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="only try it, on tiny modules")
    parser.add_argument("--check", action="store_true", help="fail if a target is missed")
    options = parser.parse_args(argv)
    patterns = options.only or [name for name in SHAPES if name != "many"]
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
    """Measures, prints and writes the results; returns the exit code."""
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
        from common.plot import draw

        draw(result, options.output / "speed.svg")
    met = not machine.is_busy(described) and all(target["met"] for target in result["targets"])
    return 1 if options.check and not met else 0


if __name__ == "__main__":
    sys.exit(main())
