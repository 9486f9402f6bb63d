"""``coremerge demo``."""

import dataclasses
from typing import Annotated

import typer

from coremerge_jax.cli.console import Stages, print_json, say, show


def demo(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Merge the example that comes with the package, and measure every method on it."""
    from coremerge_jax.demo import METHODS, WITH_INPUTS, run, table

    stage, total = Stages(), len(METHODS) + len(WITH_INPUTS) + 2
    with stage("merge and measure", total=total) as advance:
        records = run(progress=lambda _: advance(), with_inputs=WITH_INPUTS)
    if as_json:
        return print_json([{**dataclasses.asdict(r), "average": r.average} for r in records])
    show(table(records))
    seconds = stage.seconds["merge and measure"]
    return say(
        "Accuracy on test images; normalized by each task's own adapter. Scales are chosen on "
        "labelled images. The last rows have none, and use 64 or 80 unlabelled images a task. Took "
        f"{seconds:.0f} s."
    )
