"""``coremerge pack``."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.filesize import decimal
from typer.core import TyperGroup

from coremerge_jax.cli.console import Stages, folder_size, print_json, say
from coremerge_jax.cli.options import Force, Given, Json, run_option, takes_recipe
from coremerge_jax.errors import RecipeError
from coremerge_jax.io.formats import described

if TYPE_CHECKING:
    from collections.abc import Callable

    from coremerge_jax.merging.packing import Pack

EPILOG = """[bold]Examples[/]

coremerge pack adapters/* -o pack

coremerge merge pack -o merged; coremerge merge pack/math pack/code -o two

coremerge pack add pack adapters/new; coremerge pack remove pack math

coremerge pack compile pack --rule tsv -o tsv.safetensors; coremerge pack lift tsv.safetensors \
pack -o merged"""

PACK = typer.Argument(metavar="PACK", help="The folder of a pack.", show_default=False)
Names = Annotated[
    str | None,
    typer.Option(
        metavar="NAME,...",
        help="Names of the adapters in the pack. Default: those of their folders.",
        show_default=False,
    ),
]
OtherBase = Annotated[
    bool,
    run_option("--allow-other-base", help="Pack even if the adapters name different base models."),
]


class _Commands(TyperGroup):
    """The commands of packs; ``make`` may be left out."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parses arguments; the first is a command, or an argument of ``make``."""
        if args and args[0] not in (*self.commands, "-h", "--help"):
            args = ["make", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    help="Prepare adapters for many merges; coremerge pack ADAPTER... -o PACK is short for make.",
    epilog=EPILOG,
)


@app.command()
def make(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER...",
            help=f"Packs, or adapters, each {described()}.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="PACK", help="Folder to write.", show_default=False),
    ] = None,
    names: Names = None,
    allow_other_base: OtherBase = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Make a pack of adapters: commands take it, or PACK/NAME, wherever they take adapters."""
    if output is None:
        raise RecipeError("no output: give -o PACK")

    from coremerge_jax.io.formats import open_adapter
    from coremerge_jax.io.outputs import PACK as KIND
    from coremerge_jax.io.outputs import check_output
    from coremerge_jax.io.packs.pack_record import expand
    from coremerge_jax.merging.packing import pack

    stage = Stages()
    with stage("open"):
        check_output(output, kind=KIND, inputs=sources, force=force)
        adapters = [open_adapter(source) for source in expand(sources)]
    with stage("pack"):
        listed = None if names is None else names.split(",")
        made = pack(adapters, names=listed, allow_other_base=allow_other_base)
    _write(made, output, force, stage, as_json)


@app.command()
def add(
    folder: Annotated[Path, PACK],
    sources: Annotated[
        list[str],
        typer.Argument(metavar="ADAPTER...", help="Adapters to add.", show_default=False),
    ],
    names: Names = None,
    allow_other_base: OtherBase = False,
    as_json: Json = False,
) -> None:
    """Add adapters to a pack, which is replaced as a whole."""
    from coremerge_jax.io.formats import open_adapter

    adapters = [open_adapter(source) for source in sources]
    listed = [None] * len(adapters) if names is None else names.split(",")
    if len(listed) != len(adapters):
        raise RecipeError(f"names: got {len(listed)} for {len(adapters)} adapters; give one each")

    def added(made: "Pack") -> "Pack":
        for adapter, name in zip(adapters, listed, strict=True):
            made = made.add(adapter, name=name, allow_other_base=allow_other_base)
        return made

    _change(folder, added, as_json)


@app.command()
def remove(
    folder: Annotated[Path, PACK],
    names: Annotated[
        list[str],
        typer.Argument(metavar="NAME...", help="Adapters to remove.", show_default=False),
    ],
    as_json: Json = False,
) -> None:
    """Remove adapters from a pack, which is replaced as a whole."""
    _change(folder, lambda made: functools.reduce(_without, names, made), as_json)


@app.command("compile")
@takes_recipe
def compile_(
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="File to write, .safetensors."),
    ] = None,
    *,
    given: Given,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Merge to one small matrix for each module: a few megabytes, for lift and for cm.serve."""
    recipe = given.recipe()
    if output is None:
        raise RecipeError("no output: give -o FILE")
    if not recipe.limit.nothing or recipe.to:
        raise RecipeError(
            "matrices cannot be cut or written in another format; lift them, and convert the "
            "adapter (coremerge pack lift, coremerge convert)"
        )
    recipe.check()
    recipe = recipe.expanded()

    from coremerge_jax.io.formats import open_adapter
    from coremerge_jax.io.merge_files import MARK, save_merge
    from coremerge_jax.io.outputs import check_file
    from coremerge_jax.merging.compiled import compile_stream

    stage = Stages()
    with stage("open"):
        inputs = [*recipe.adapters, *(recipe.statistics or ())]
        check_file(output, mark=MARK.encode(), inputs=inputs, force=force)
        resolved = recipe.resolve()
        stream = resolved.stream([open_adapter(source) for source in recipe.adapters])
    with stage("merge"):
        merge = compile_stream(stream, recipe.dtype)
    with stage("write"):
        save_merge(merge, output, force=force)
    names = [adapter.metadata.name for adapter in merge.adapters]
    size = output.stat().st_size
    if as_json:
        report = {"output": str(output), "bytes": size, "adapters": names}
        return print_json({**report, "modules": len(merge.cores), "seconds": stage.seconds})
    return say(
        f"merged {', '.join(map(str, names))} by {' + '.join(recipe.rules)} to "
        f"{len(merge.cores)} matrices in {sum(stage.seconds.values()):.1f} s",
        f"wrote {output} ({decimal(size)}); keep the adapters",
    )


@app.command()
def lift(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What compile wrote.")],
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER...",
            help="The pack, or the adapters, of which the merge is.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="OUT", help="Folder for the merged adapter."),
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write the adapter that a compiled merge stands for, in PEFT's format."""
    if output is None:
        raise RecipeError("no output: give -o OUT")

    from coremerge_jax.io.formats import open_adapter
    from coremerge_jax.io.merge_files import load_merge
    from coremerge_jax.io.outputs import ADAPTER, check_output
    from coremerge_jax.io.packs.pack_record import expand
    from coremerge_jax.io.peft.writer import save_peft

    stage = Stages()
    with stage("open"):
        check_output(output, kind=ADAPTER, inputs=[file, *sources], force=force)
        merge = load_merge(file, [open_adapter(source) for source in expand(sources)])
    with stage("lift"):
        merged = merge.adapter()
    with stage("write"):
        save_peft(merged, output, force=force)
    size = folder_size(output)
    if as_json:
        return print_json({"output": str(output), "bytes": size, "seconds": stage.seconds})
    return say(f"wrote {output} ({decimal(size)}), {len(merged)} modules")


def _without(made: "Pack", name: str) -> "Pack":
    return made.remove(name)


def _change(folder: Path, change: "Callable[[Pack], Pack]", as_json: bool) -> None:
    """Replaces a pack by a changed one, one process after another."""
    from coremerge_jax.io.atomic import change_folder
    from coremerge_jax.io.packs.pack_files import open_pack

    stage = Stages()
    with change_folder(folder):
        with stage("open"):
            made = open_pack(folder)
        with stage("pack"):
            made = change(made)
        _write(made, folder, True, stage, as_json)


def _write(made: "Pack", output: Path, force: bool, stage: Stages, as_json: bool) -> None:
    from coremerge_jax.io.packs.pack_files import save_pack

    with stage("write"):
        save_pack(made, output, force=force)
    size = folder_size(output)
    if as_json:
        report = {"output": str(output), "bytes": size, "adapters": made.names}
        return print_json({**report, "seconds": stage.seconds})
    return say(
        f"packed {len(made)} adapters in {sum(stage.seconds.values()):.1f} s: "
        f"{', '.join(made.names)}",
        f"wrote {output} ({decimal(size)})",
    )
