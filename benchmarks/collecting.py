"""Times collecting statistics of inputs, against the forward passes alone.

    python benchmarks/collecting.py [--repeat N] [--quick] [--output DIR]

A sentence encoder of six layers of width 384, with random weights, reads batches of 32 texts of 64
tokens, plainly and while statistics are collected, with one adapter after the other. Both run once
to compile, and then take turns. Writes a table and JSON to ``benchmarks/results/jax-VERSION``.
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from common import machine
from common.publish import Sheet, publish, script
from common.timing import Runner
from flax import nnx
from text8.minilm import Config, MiniLM

import coremerge_jax as cm

CONFIG = Config(
    vocab_size=1000,
    hidden_size=384,
    num_hidden_layers=6,
    num_attention_heads=12,
    intermediate_size=1536,
    max_position_embeddings=64,
    type_vocab_size=2,
    layer_norm_eps=1e-12,
)
TEXTS, LENGTH = 32, 64
ATTENTION = ("attention.self.query", "attention.self.key", "attention.self.value")
ATTENTION += ("attention.output.dense",)
LINEAR = (*ATTENTION, "intermediate.dense", "output.dense")

NOTES = """\
Seconds of one batch of each task: medians of the rounds. *R* is the number of rows of all adapters'
A, of which the coordinates of the inputs are summed up; the width is 384."""


class Case(NamedTuple):
    """Adapters: how many, of which rank, and of which modules of each layer."""

    adapters: int
    rank: int
    names: tuple[str, ...]


CASES = {
    "attention, R = 32": Case(2, 16, ATTENTION),
    "attention, R = 64": Case(4, 16, ATTENTION),
    "attention, R = 128": Case(8, 16, ATTENTION),
    "all linear, R = 32": Case(2, 16, LINEAR),
    "all linear, R = 128": Case(8, 16, LINEAR),
}


def adapters(case: Case, config: Config) -> list[cm.Adapter]:
    """Returns seeded adapters."""
    rng = np.random.default_rng(0)
    sizes = {"intermediate.dense": (config.intermediate_size, config.hidden_size)}
    sizes["output.dense"] = config.hidden_size, config.intermediate_size
    square = config.hidden_size, config.hidden_size

    def lora(name: str) -> cm.LoRA:
        m, n = sizes.get(name, square)
        a, b = rng.standard_normal((case.rank, n)), rng.standard_normal((m, case.rank))
        return cm.LoRA(a=np.float32(a / n**0.5), b=np.float32(1e-2 * b))

    paths = [
        (f"encoder.layer.{i}.{name}", name)
        for i in range(config.num_hidden_layers)
        for name in case.names
    ]
    return [cm.Adapter({path: lora(name) for path, name in paths}) for _ in range(case.adapters)]


def measure(case: Case, config: Config, repeat: int) -> dict[str, Any]:
    """Returns one row of the table."""
    graph, state = nnx.split(MiniLM(config, nnx.Rngs(0)))
    given = adapters(case, config)
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, config.vocab_size, (TEXTS, LENGTH)).astype(np.int32)
    batch = tokens, np.ones(tokens.shape, bool)

    def forward(state: nnx.State, batch: tuple) -> jax.Array:
        return nnx.merge(graph, state)(*batch)

    collector = cm.collecting.collector(state, given, forward)
    models = [collector.parameters(t) for t in range(len(given))]
    plain = jax.jit(forward)

    def read() -> list[jax.Array]:
        return jax.block_until_ready([plain(model, batch) for model in models])

    def collect() -> Any:
        return jax.block_until_ready([collector.sums(t, [batch]) for t in range(len(given))])

    runners = [Runner("forward", read), Runner("collect", collect)]
    for runner in runners:
        runner.warm_up()
    for _ in range(repeat):
        for runner in runners:
            runner.round()
    times = {runner.name: runner.record() for runner in runners}
    seconds = [times[name]["seconds"] for name in ("forward", "collect")]
    return {"adapters": case.adapters, "times": times, "ratio": seconds[1] / seconds[0]}


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes the results; returns the exit code."""
    parser = script(__doc__)
    parser.add_argument("--repeat", type=int, default=7, help="rounds; default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="one layer, to try that it runs")
    options = parser.parse_args(argv)
    config = dataclasses.replace(CONFIG, num_hidden_layers=1) if options.quick else CONFIG
    watch = machine.Watch()
    rows = {name: measure(case, config, options.repeat) for name, case in CASES.items()}
    lines = [
        [
            *(name, f"{row['adapters']}"),
            *(f"{row['times'][x]['seconds']:.3f}" for x in ("forward", "collect")),
            f"{row['ratio']:.2f}",
        ]
        for name, row in rows.items()
    ]
    sheet = Sheet(["adapters of", "tasks", "forward, s", "collect, s", "ratio"], lines, texts=1)
    result = {"machine": machine.describe(watch), "rows": rows}
    publish(options.output / "collecting", "Collecting statistics", result, [sheet], NOTES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
