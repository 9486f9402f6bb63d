"""``coremerge demo``."""

import dataclasses
from typing import Annotated

import typer

from coremerge_jax.cli.console import Stages, print_json, say, show


def demo(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Merge the example that comes with the package, and measure every method on it."""
    from coremerge_jax.demo import METHODS, run, table

    stage = Stages()
    with stage("merge and measure", total=len(METHODS) + 2) as advance:
        records = run(progress=lambda _: advance())
    if as_json:
        return print_json([{**dataclasses.asdict(r), "average": r.average} for r in records])
    show(table(records))
    seconds = stage.seconds["merge and measure"]
    return say(
        f"Accuracy on test images; normalized by each task's own adapter. Took {seconds:.0f} s."
    )
