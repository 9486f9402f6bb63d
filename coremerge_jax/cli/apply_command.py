"""``coremerge apply``."""

import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.filesize import decimal

from coremerge_jax.cli.console import (
    Stages,
    describe_paths,
    folder_size,
    print_json,
    print_table,
    say,
)
from coremerge_jax.cli.convert_command import NAMES, parse_axes
from coremerge_jax.errors import RecipeError
from coremerge_jax.io.formats import described

if TYPE_CHECKING:
    from coremerge_jax.io.base_model.apply import Folding

_NAMED = 8  # names in a line

_tree = partial(
    typer.Option, show_default=False, rich_help_panel="A base that is an orbax checkpoint"
)

EPILOG = """[bold]Examples[/]

coremerge apply merged --base models/llama -o llama-merged

coremerge apply merged --base meta-llama/Llama-3.1-8B -o llama-merged --scale 0.8

coremerge apply merged --base checkpoints/base -o out --names maxtext-llama3.1 --head-dim 128"""


def apply(
    adapter: Annotated[
        str,
        typer.Argument(
            metavar="ADAPTER",
            help=f"The adapter: {described()}. A checkpoint has to record its alpha (else: "
            "coremerge convert first).",
            show_default=False,
        ),
    ],
    base: Annotated[
        str,
        typer.Option(
            "--base",
            metavar="MODEL",
            help="Its base model: a folder with safetensors files, a Hugging Face id, or an orbax "
            "checkpoint of parameters, which is held in memory.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="OUT", help="Folder for the changed model."),
    ] = None,
    scale: Annotated[float, typer.Option(metavar="NUMBER", help="Scale of the update.")] = 1.0,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check everything but values, write nothing."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
    names: Annotated[
        str | None,
        _tree(
            metavar=NAMES,
            help="Translate the adapter's module names from Hugging Face's to those of this "
            "implementation of a model family.",
        ),
    ] = None,
    head_dim: Annotated[
        int | None, _tree(metavar="D", help="Size of an attention head, for names that need it.")
    ] = None,
    scan_axis: Annotated[
        int | None,
        _tree(metavar="0|1", help="Axis of stacked layers. Default: inferred from shapes."),
    ] = None,
    axes: Annotated[
        list[str] | None,
        _tree(
            metavar="PATTERN=AXES",
            help="Axes of some kernels: i input, o output, l stacked layers; such as "
            "'*/q_einsum=oio'.",
        ),
    ] = None,
    item: Annotated[
        str | None, _tree(metavar="NAME", help="Item to read if the checkpoint has several.")
    ] = None,
    step: Annotated[int | None, _tree(metavar="N", help="Step to read. Default: the last.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Fold an adapter into the weights of its base model."""
    if output is None and not dry_run:
        raise RecipeError("no output: give -o OUT, or --dry-run to only check")
    told = {
        "names": names,
        "head_dim": head_dim,
        "scan_axis": scan_axis,
        "axes": parse_axes(axes, "PATTERN=AXES", "*/q_einsum=oio"),
        "item": item,
        "step": step,
    }
    options = {name: value for name, value in told.items() if value is not None}
    report = _report(adapter, base, output, scale, force=force, dry_run=dry_run, **options)
    if as_json:
        return print_json(report)
    return _show(report)


def _report(
    adapter: str,
    base: str,
    output: Path | None,
    scale: float,
    *,
    force: bool,
    dry_run: bool,
    **options: Any,
) -> dict[str, Any]:
    from coremerge_jax.io.base_model.apply import find_folding
    from coremerge_jax.io.formats import open_adapter
    from coremerge_jax.io.outputs import MODEL, check_output

    stage = Stages()
    with stage("open"):
        if output is not None:
            check_output(output, kind=MODEL, inputs=[adapter, base], force=force)
        folding = find_folding(open_adapter(adapter), base, scale=scale, **options)
    if output is None or dry_run:
        report: dict[str, Any] = {"report": folding.report}
    else:
        report = _write(folding, adapter, output, force, stage)
    told = dataclasses.asdict(report.pop("report"))
    return {**report, **told, "base": base, "scale": scale, "seconds": stage.seconds}


def _write(
    folding: "Folding", adapter: str, output: Path, force: bool, stage: Stages
) -> dict[str, Any]:
    from coremerge_jax.io.formats import hash_source

    source = {"path": adapter, "sha256": hash_source(adapter)}
    with stage("apply", total=len(folding.report.modules)) as advance:
        report = folding.write(
            output, force=force, provenance={"sources": [source]}, advance=advance
        )
    return {"output": str(output), "bytes": folder_size(output), "report": report}


def _show(report: Mapping[str, Any]) -> None:
    done = "output" in report
    groups: dict[tuple[Any, ...], dict[str, float]] = defaultdict(dict)
    for path, module in report["modules"].items():
        groups[*module["shape"], module["dtype"]][path] = module["rounding_loss"]
    columns = ["modules", "stored as", "dtype"]
    rows = [
        [describe_paths(list(losses)), " × ".join(map(str, shape)), dtype]
        for (*shape, dtype), losses in groups.items()
    ]
    if done:
        columns += ["rounding loss", "worst"]
        for row, losses in zip(rows, groups.values(), strict=True):
            row += [f"{pick(losses.values()):.3%}" for pick in (statistics.median, max)]
    print_table(columns, rows, right=("stored as", "rounding loss", "worst"))
    for what in ("replaced", "appended", "copied", "skipped"):
        names = report[what]
        if names:
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            say(f"{what}: {', '.join(names[:_NAMED])}{more}")
    modules = f"{len(report['modules'])} modules"
    if done:
        say(
            f"applied {modules} in {report['seconds']['apply']:.1f} s",
            f"wrote {report['output']} ({decimal(report['bytes'])})",
        )
    else:
        say(f"would apply {modules} to {report['base']}; nothing was written")
