"""``coremerge verify``."""

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coremerge_jax.cli.console import Stages, print_json, print_table, say
from coremerge_jax.cli.options import Given, Json, takes_recipe
from coremerge_jax.recipe import DTYPES, Recipe

if TYPE_CHECKING:
    from coremerge_jax.verification import Check, Verification

_SHOWN = 5  # modules, the worst ones

EPILOG = """[bold]Examples[/]

coremerge verify merged

coremerge verify merged --sources adapters/math adapters/code

coremerge verify merged --base models/llama

coremerge verify other --sources math code --rule ties:density=0.2 --weights 1,0.5

Options of the merge replace those in its record (coremerge.json); a merge without a record needs \
them. Exit code 1: there is a defect."""


@takes_recipe
def verify(
    merged: Annotated[
        str,
        typer.Argument(
            metavar="MERGED",
            help="The merge: a PEFT folder, or an orbax checkpoint.",
            show_default=False,
        ),
    ],
    sources: Annotated[
        list[str] | None,
        typer.Option(
            "-s",
            "--sources",
            metavar="ADAPTER...",
            help="Adapters that were merged, in any order if there is a record. Default: those of "
            "the record.",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="MODEL",
            help="Base model, as for apply: also check that the merge fits it.",
            show_default=False,
        ),
    ] = None,
    *,
    given: Given,
    as_json: Json = False,
) -> None:
    """Check a merge: merge again as recorded, and compare."""
    from coremerge_jax.io.packs.pack_record import expand
    from coremerge_jax.run import keep_compiled_programs
    from coremerge_jax.verification import verify as check

    options = dict(given.options)
    # Words after the first of --sources are parsed as arguments.
    names = expand([*(sources or ()), *options.pop("adapters", ())]) or None
    recipe: Any = options
    if given.file:
        recipe = dataclasses.replace(Recipe.load(given.file), **options)
    keep_compiled_programs()
    stage = Stages()
    with stage("verify"):
        found = check(merged, names, recipe=recipe, base=base)
    if as_json:
        print_json({"merged": merged, **found.to_dict(), "seconds": stage.seconds})
    else:
        _show(merged, found)
    if not found.ok:
        raise typer.Exit(1)


def _show(merged: str, found: "Verification") -> None:
    if found.modules:
        _show_modules(found)
    for finding in found.findings:
        say(f"{'defect' if finding.defect else 'note'} {finding.kind}: {finding.message}")
    say(_verdict(merged, found))


def _show_modules(found: "Verification") -> None:
    worst = sorted(found.modules, key=lambda path: -_excess(found.modules[path]))
    rows = [_row(path, found.modules[path]) for path in worst[:_SHOWN]]
    columns = ("worst modules", "‖ΔW‖", "expected", "error", "explained by rounding")
    print_table(columns, rows, right=columns[1:])
    losses = ", ".join(f"{dtype} {_worst_loss(found, dtype)}" for dtype in DTYPES)
    say(f"largest loss by writing it in another dtype: {losses}; it is in {found.dtype}")


def _excess(one: "Check") -> float:
    return one.error / one.tolerance if one.tolerance else one.error


def _row(path: str, one: "Check") -> tuple[str, ...]:
    norms = f"{one.norm:.4g}", f"{one.expected:.4g}"
    return path, *norms, f"{one.error:.2g}", f"{one.tolerance:.2g}"


def _worst_loss(found: "Verification", dtype: str) -> str:
    losses = [one.losses[dtype] for one in found.modules.values()]
    finite = [loss for loss in losses if loss is not None]
    return f"{max(finite):.2g}" if len(finite) == len(losses) else "overflows"


def _verdict(merged: str, found: "Verification") -> str:
    what = " + ".join(found.recipe["rules"])
    if found.ok:
        return f"{merged} is the merge of {len(found.sources)} adapters by {what}"
    kinds = ", ".join(dict.fromkeys(finding.kind for finding in found.defects))
    return f"{merged} is not the merge of {len(found.sources)} adapters by {what}: {kinds}"
