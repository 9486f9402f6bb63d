"""``coremerge report``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal

from coremerge_jax.cli.console import Stages, print_json, say
from coremerge_jax.cli.options import Force, Json, run_option
from coremerge_jax.errors import RecipeError

if TYPE_CHECKING:
    from coremerge_jax.diagnosis import Diagnosis

EPILOG = """[bold]Examples[/]

coremerge report adapters/* -o report.html

coremerge report adapters/* --merged merged -o report.html

coremerge report adapters/* --json > numbers.json"""


def report(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER...",
            help="PEFT folders, orbax checkpoints, or Hugging Face ids.",
            show_default=False,
        ),
    ],
    merged: Annotated[
        str | None,
        typer.Option(metavar="ADAPTER", help="Their merge, by any method.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="OUT", help="HTML file to write.", show_default=False
        ),
    ] = None,
    allow_other_base: Annotated[
        bool,
        run_option(
            "--allow-other-base", help="Compare even if the adapters name different base models."
        ),
    ] = False,
    allow_disjoint: Annotated[
        bool,
        run_option(
            "--allow-disjoint",
            help="Compare even if an adapter has no module in common with the others.",
        ),
    ] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Show what adapters share, where they conflict, and what a merge kept of each."""
    if output is None and not as_json:
        raise RecipeError("no output: give -o OUT.html, or --json to print the numbers")
    if output is not None:
        _check(output, [*sources, *([] if merged is None else [merged])], force)
    allowed = {"allow_other_base": allow_other_base, "allow_disjoint": allow_disjoint}
    diagnosis = _diagnose(sources, merged, allowed)
    if output is not None:
        diagnosis.to_html(output)
    if as_json:
        return print_json(diagnosis.to_dict())
    assert output is not None
    return say(f"wrote {output} ({decimal(output.stat().st_size)})")


def _check(output: Path, inputs: list[str], force: bool) -> None:
    """Refuses an output that could not be written, before any work."""
    from coremerge_jax.diagnosis.page import MARK  # raises without matplotlib
    from coremerge_jax.io.outputs import check_file

    check_file(output, mark=MARK, inputs=inputs, force=force)
    if output.suffix.lower() not in ("", ".html", ".htm"):
        raise RecipeError(f"{output}: the report is an HTML page; give a name that ends in .html")


def _diagnose(sources: list[str], merged: str | None, allowed: dict[str, bool]) -> "Diagnosis":
    from coremerge_jax.diagnosis import diagnose
    from coremerge_jax.io.formats import open_adapter
    from coremerge_jax.io.packs.pack_record import expand
    from coremerge_jax.linalg.threads import processors
    from coremerge_jax.merging.cost import Machine
    from coremerge_jax.run import keep_compiled_programs

    keep_compiled_programs()
    stage = Stages()
    with stage("open"):
        adapters = [open_adapter(source) for source in expand(sources)]
        result = None if merged is None else open_adapter(merged)
    with stage("measure the machine"):
        machine = Machine.measure(processors())
    with stage("measure the adapters"):
        return diagnose(adapters, result, machine=machine, **allowed)
