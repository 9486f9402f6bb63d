"""``coremerge merge``."""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.filesize import decimal

from coremerge_jax import __version__
from coremerge_jax.cli.console import (
    Stages,
    describe_paths,
    describe_range,
    describe_ranks,
    print_json,
    print_table,
)
from coremerge_jax.errors import RecipeError
from coremerge_jax.recipe import (
    DTYPES,
    EXTRAS,
    PRECISIONS,
    Recipe,
    parse_scale,
    parse_weights,
)

if TYPE_CHECKING:
    from coremerge_jax.lora import Adapter

EPILOG = """[bold]Examples[/]

coremerge merge adapters/* -o merged

coremerge merge adapters/* -o merged --rule tsv --rule isotropize --scale 0.9

coremerge merge math code chat -o merged --rule ties:density=0.2 --weights 1,1,0.5

coremerge merge adapters/* -o merged --scale 0.9 --scale '*.q_proj=0.5' --dry-run

coremerge merge --recipe recipe.yaml -o merged --rank 32

A recipe is a YAML file with the same content: adapters (relative to the file), weights, rules,
space, scale, rank, energy, dtype, seed, precision, extras, allow_mismatch."""

_method = partial(typer.Option, show_default=False, rich_help_panel="Method")
_result = partial(typer.Option, show_default=False, rich_help_panel="Result")
_run = partial(typer.Option, show_default=False, rich_help_panel="Run")


def _complete(*choices: str) -> Any:
    return lambda incomplete: [choice for choice in choices if choice.startswith(incomplete)]


def _complete_rule(incomplete: str) -> list[str]:
    from coremerge_jax.rules import RULES

    return [name for name in RULES if name.startswith(incomplete)]


def merge(
    adapters: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="ADAPTER",
            help="PEFT adapters: folders, or Hugging Face ids.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="OUT", help="Folder for the merged adapter."),
    ] = None,
    rules: Annotated[
        list[str] | None,
        _method(
            "--rule",
            metavar="NAME[:key=value,...]",
            help="Merge rule; several are applied in order. "
            f"Default: {' '.join(Recipe.rules)}; see 'coremerge rules'.",
            autocompletion=_complete_rule,
        ),
    ] = None,
    space: Annotated[
        str | None,
        _method(
            metavar="core|full|knots",
            help=f"Where to merge. Default: {Recipe.space}.",
            autocompletion=_complete("core", "full", "knots"),
        ),
    ] = None,
    scale: Annotated[
        list[str] | None,
        _method(
            metavar="[PATTERN=]NUMBER",
            help="Scale of the merged update. With a pattern: of the modules whose path matches, "
            f"the first that does counts. Default: {Recipe.scale}.",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        _method(metavar="W1,W2,...", help="Weight of each adapter. Default: 1 each."),
    ] = None,
    seed: Annotated[
        int | None,
        _method(metavar="N", help=f"Seed of random rules (dare). Default: {Recipe.seed}."),
    ] = None,
    precision: Annotated[
        str | None,
        _method(
            metavar="|".join(PRECISIONS),
            help="Precision of the computation. Default: the best that the device has.",
            autocompletion=_complete(*PRECISIONS),
        ),
    ] = None,
    rank: Annotated[
        int | None,
        _result(metavar="N", help="Cut the result to this rank. Default: nothing is cut."),
    ] = None,
    energy: Annotated[
        float | None,
        _result(
            metavar="SHARE",
            help="Cut the result to the fewest directions that hold this share of its squared "
            "norm, such as 0.99. Default: nothing is cut.",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        _result(
            metavar="|".join(DTYPES),
            help=f"Number format of the written factors. Default: {Recipe.dtype}.",
            autocompletion=_complete(*DTYPES),
        ),
    ] = None,
    extras: Annotated[
        str | None,
        _result(
            metavar="|".join(EXTRAS),
            help="What to do with trained weights that are not LoRA factors (heads, biases, "
            f"tokens). Default: {Recipe.extras}.",
            autocompletion=_complete(*EXTRAS[:3], "keep="),
        ),
    ] = None,
    allow_mismatch: Annotated[
        bool,
        _run("--allow-mismatch", help="Merge even if base models differ or no module is common."),
    ] = False,
    recipe_file: Annotated[
        Path | None,
        _run(
            "--recipe",
            metavar="FILE.yaml",
            help="Take adapters and options from a file; those given here replace them.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, _run("--dry-run", help="Check everything, show what would be done, write nothing.")
    ] = False,
    force: Annotated[bool, _run("--force", help="Replace OUT if it exists.")] = False,
    as_json: Annotated[bool, _run("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Merge LoRA adapters into one."""
    given: dict[str, Any] = {
        "adapters": tuple(adapters) if adapters else None,
        "weights": parse_weights(weights) if weights is not None else None,
        "rules": tuple(rules) if rules else None,
        "space": space,
        "scale": parse_scale(scale) if scale else None,
        "rank": rank,
        "energy": energy,
        "dtype": dtype,
        "seed": seed,
        "precision": precision,
        "extras": extras,
        "allow_mismatch": allow_mismatch or None,
    }
    recipe = Recipe.load(recipe_file) if recipe_file else Recipe()
    recipe = dataclasses.replace(recipe, **{k: v for k, v in given.items() if v is not None})
    if not recipe.adapters:
        raise RecipeError("no adapters: name their folders, or give a recipe that does")
    if output is None and not dry_run:
        raise RecipeError("no output: give -o OUT, or --dry-run to only check")
    report = _report(recipe, output, force=force, dry_run=dry_run)
    if as_json:
        return print_json(report)
    return _show(report)


def _report(recipe: Recipe, output: Path | None, *, force: bool, dry_run: bool) -> dict[str, Any]:
    """Does the work and tells about it. What can fail early is checked first."""
    from coremerge_jax.checkpoint import check_output

    recipe.check()
    if output is not None:
        check_output(output, force=force, sources=recipe.adapters)
    stage = Stages()
    adapters = _read(recipe, stage)
    if output is None or dry_run:
        report = _plan(recipe, adapters, stage)
    else:
        report = _write(recipe, adapters, output, force, stage)
    return {**report, "seconds": stage.seconds, "recipe": recipe.to_dict()}


def _plan(recipe: Recipe, adapters: "list[Adapter]", stage: Stages) -> dict[str, Any]:
    import jax.numpy as jnp

    with stage("check"):
        merged = recipe.plan(adapters)
    ranks = {path: min(lora.rank, recipe.rank or lora.rank) for path, lora in merged.items()}
    size = sum(rank * sum(merged[path].shape) for path, rank in ranks.items())
    return {
        "bytes": size * jnp.dtype(recipe.dtype).itemsize,
        "signatures": _signatures(adapters, merged, ranks),
    }


def _write(
    recipe: Recipe, adapters: "list[Adapter]", output: Path, force: bool, stage: Stages
) -> dict[str, Any]:
    import jax

    from coremerge_jax.checkpoint import save_peft
    from coremerge_jax.truncation import truncate

    energy_kept: dict[str, float] = {}
    with stage("merge"):
        merged = jax.block_until_ready(recipe.run(adapters))
        if recipe.rank or recipe.energy:
            merged, energy_kept = truncate(merged, rank=recipe.rank, energy=recipe.energy)
    with stage("write"):
        card = _provenance(recipe, adapters)
        save_peft(merged, output, dtype=recipe.dtype, force=force, card=card)
    ranks = {path: lora.rank for path, lora in merged.items()}
    return {
        "output": str(output),
        "bytes": sum(file.stat().st_size for file in output.iterdir()),
        "signatures": _signatures(adapters, merged, ranks),
        "energy_kept": energy_kept,
    }


def _read(recipe: Recipe, stage: Stages) -> "list[Adapter]":
    from coremerge_jax.checkpoint import load_peft

    adapters = []
    with stage("read", total=len(recipe.adapters)) as advance:
        for source in recipe.adapters:
            adapters.append(load_peft(source))
            advance()
    return adapters


def _provenance(recipe: Recipe, adapters: "Sequence[Adapter]") -> dict[str, Any]:
    """What the output records of its making: enough to make it again."""
    from coremerge_jax.checkpoint import hash_source

    return {
        "coremerge_version": __version__,
        "recipe": recipe.explicit().to_dict(),
        "sources": [
            {"name": adapter.metadata.name, "path": source, "sha256": hash_source(source)}
            for source, adapter in zip(recipe.adapters, adapters, strict=True)
        ],
    }


def _signatures(
    adapters: "Sequence[Adapter]", merged: "Adapter", ranks: Mapping[str, int]
) -> list[dict[str, Any]]:
    """One entry for all modules of equal shape and ranks."""
    groups = defaultdict(list)
    for path, lora in merged.items():
        ranks_in = tuple(adapter[path].rank for adapter in adapters if path in adapter)
        groups[lora.shape, ranks_in].append(path)
    return [
        {"shape": shape, "ranks_in": ranks_in, "ranks_out": {path: ranks[path] for path in paths}}
        for (shape, ranks_in), paths in groups.items()
    ]


def _show(report: Mapping[str, Any]) -> None:
    kept = report.get("energy_kept")
    rows = []
    for signature in report["signatures"]:
        paths = list(signature["ranks_out"])
        row = [
            describe_paths(paths),
            "{} × {}".format(*signature["shape"]),
            describe_ranks(signature["ranks_in"]),
            describe_range(signature["ranks_out"].values()),
        ]
        rows.append([*row, describe_range((kept[path] for path in paths), ".1%")] if kept else row)
    columns = ["modules", "m × n", "ranks in", "rank out"] + ["energy kept"] * bool(kept)
    print_table(columns, rows, right=("m × n", "rank out", "energy kept"))
    recipe, size = report["recipe"], decimal(report["bytes"])
    rules = " + ".join(recipe["rules"])
    merge = f"{len(recipe['adapters'])} adapters by {rules} in {recipe['space']} space"
    if "output" in report:
        seconds = ", ".join(f"{stage} {value:.1f} s" for stage, value in report["seconds"].items())
        typer.echo(f"merged {merge}; {seconds}\nwrote {report['output']} ({size})")
    else:
        typer.echo(f"would merge {merge}, and write at most {size}; nothing was written")
