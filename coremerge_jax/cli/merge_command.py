"""``coremerge merge``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.filesize import decimal

from coremerge_jax.cli.console import (
    Stages,
    describe_paths,
    describe_range,
    describe_ranks,
    print_json,
    print_table,
    say,
)
from coremerge_jax.cli.devices import devices_option, join_job
from coremerge_jax.cli.options import (
    BASE_CONFIG,
    Force,
    Given,
    Json,
    parse_size,
    run_option,
    takes_recipe,
)
from coremerge_jax.errors import RecipeError
from coremerge_jax.io.formats import check_source
from coremerge_jax.recipe import OPTIONS, Recipe

if TYPE_CHECKING:
    from coremerge_jax.run import Merged, MergePlan, Signature

EPILOG = f"""[bold]Examples[/]

coremerge merge adapters/* -o merged

coremerge merge adapters/* -o merged --rule tsv --rule isotropize --scale 0.9

coremerge merge math code chat -o merged --rule ties:density=0.2 --weights 1,1,0.5

coremerge merge adapters/* -o merged --scale 0.9 --scale '*.q_proj=0.5' --dry-run

coremerge merge --recipe recipe.yaml -o merged --rank 32

coremerge merge adapters/* -o merged --budget 16 --statistics statistics

coremerge merge adapters/* -o merged --to gguf --base-config models/llama

A recipe is a YAML file with the same content, by the keys {", ".join(OPTIONS)}. Paths of adapters \
are relative to the file."""


@takes_recipe
def merge(
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="OUT", help="Folder for the merged adapter."),
    ] = None,
    *,
    given: Given,
    max_memory: Annotated[
        str | None,
        run_option(
            metavar="SIZE",
            help="Memory that the whole process may take, such as 2GiB. Default: what is best for "
            "speed; it does not grow with the number of modules.",
        ),
    ] = None,
    mesh: Annotated[
        str | None,
        devices_option(
            metavar="ROWS[xCOLUMNS]",
            help="Arrangement of the devices: rows share the modules, and columns share each "
            "module. Default: all devices, one a row.",
        ),
    ] = None,
    distributed: Annotated[
        bool,
        devices_option(
            "--distributed",
            help="Share the work with other processes that run the same command on the same files. "
            "They are found automatically on TPU, Slurm and Open MPI; elsewhere, set "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.",
        ),
    ] = False,
    patience: Annotated[
        int,
        devices_option(
            metavar="SECONDS",
            min=1,
            help="With --distributed: time without a sign of life from a process after which all "
            "end. Default: 60.",
        ),
    ] = 60,
    base_config: Annotated[
        Path | None,
        run_option(metavar="FILE", help=BASE_CONFIG),
    ] = None,
    dry_run: Annotated[
        bool,
        run_option(
            "--dry-run",
            help="Check everything but the values of factors, show what would be done and what it "
            "would cost, write nothing.",
        ),
    ] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Merge LoRA adapters into one."""
    recipe = given.recipe()
    if output is None and not dry_run:
        raise RecipeError("no output: give -o OUT, or --dry-run to only check")
    room = parse_size(max_memory) if max_memory else None

    # Mistakes that show without JAX do not wait for it.
    recipe.check()
    if not distributed:  # else all processes fail together
        recipe = recipe.expanded()
        for source in recipe.adapters:
            check_source(source)

    from coremerge_jax.run import Merged, run_merge

    resolved = recipe.resolve()
    if distributed:
        join_job(patience)
    result = run_merge(
        resolved,
        output,
        mesh=mesh,
        max_memory=room,
        base_config=base_config,
        force=force,
        dry_run=dry_run,
        progress=Stages(),
    )
    if result is None:
        return None
    if as_json:
        return print_json(result.to_dict())
    return _show_merged(result) if isinstance(result, Merged) else _show_plan(result)


def _show_merged(merged: "Merged") -> None:
    _show_signatures(merged.signatures, merged.energy_kept)
    seconds = merged.seconds
    say(
        *(
            f"the automatic scale of modules of {words} is {scale:.3g} (--scale 1: the plain rule)"
            for words, scale in merged.auto_scale.items()
        ),
        *_cut_by(merged.cut_by),
        f"merged {_describe(merged.recipe)} in {seconds['open'] + seconds['merge']:.1f} s, of "
        f"which {seconds['compile']:.1f} s went to compiling",
        f"wrote {merged.output} ({decimal(merged.bytes)})",
    )


def _show_plan(plan: "MergePlan") -> None:
    _show_signatures(plan.signatures, {})
    cost, decisions = plan.cost, plan.decisions
    operations, data = cost["operations"], cost["bytes"]
    programs = f"{cost['programs']} programs"
    amounts = {
        "trace": programs,
        "compile": f"{programs}, once",
        "read": decimal(data["read"]),
        "products": f"{operations['products'] / 1e9:.3g} GFLOP",
        "core": f"{operations['core'] / 1e9:.3g} GFLOP",
        "copies": decimal(2 * (data["read"] + data["written"])),
        "write": decimal(data["written"]),
    }
    rows = [(name, amounts[name], f"{value:.2f}") for name, value in cost["seconds"].items()]
    columns = ("stage", "amount", "expected seconds")
    print_table(columns, rows, right=columns[1:])
    say(
        f"expected memory {decimal(cost['memory'])}; stages overlap, and programs that are kept "
        "from an earlier merge are not compiled again",
        f"computes in {decisions['precision']}, in {decisions['batches']} batches, "
        f"{decisions['at_once']} at once",
        *_cut_by(decisions["cut_by"]),
        *(
            f"merges modules {paths} {words}"
            for words, paths in _by_words(decisions["groups"]).items()
        ),
        f"would merge {_describe(plan.recipe)}, and write at most {decimal(plan.bytes)}; nothing "
        "was written",
    )


def _cut_by(words: str | None) -> list[str]:
    return [f"cut by {words}"] if words else []


def _by_words(groups: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Returns a description of the modules for which the engine chooses the same, by its choice."""
    found: dict[str, list[str]] = {}
    for group in groups:
        found.setdefault(group["in_words"], []).extend(group["modules"])
    return {words: describe_paths(paths) for words, paths in found.items()}


def _show_signatures(signatures: "list[Signature]", kept: Mapping[str, float]) -> None:
    rows = []
    for signature in signatures:
        paths = list(signature.ranks_out)
        row = [
            describe_paths(paths),
            "{} × {}".format(*signature.shape),
            describe_ranks(signature.ranks_in),
            describe_range(signature.ranks_out.values()),
        ]
        rows.append([*row, describe_range((kept[path] for path in paths), ".1%")] if kept else row)
    columns = ["modules", "m × n", "ranks in", "rank out"] + ["energy kept"] * bool(kept)
    print_table(columns, rows, right=("m × n", "rank out", "energy kept"))


def _describe(recipe: Recipe) -> str:
    rules = " + ".join(recipe.rules)
    return f"{len(recipe.adapters)} adapters by {rules} in {recipe.space} space"
