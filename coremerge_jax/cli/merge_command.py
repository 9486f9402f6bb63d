"""``coremerge merge``."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.filesize import decimal

from coremerge_jax.cli.console import (
    Stages,
    describe_paths,
    describe_range,
    describe_ranks,
    folder_size,
    print_json,
    print_table,
    say,
)
from coremerge_jax.cli.devices import devices_option, join_job
from coremerge_jax.cli.effects import idle_adapters, refuse_nothing
from coremerge_jax.cli.options import run_option, takes_recipe
from coremerge_jax.cli.runtime import (
    compile_seconds,
    keep_compiled_programs,
    room_for_batches,
    taken_by_program,
)
from coremerge_jax.errors import RecipeError
from coremerge_jax.merging.mesh import make_mesh
from coremerge_jax.recipe import Recipe, parse_size
from coremerge_jax.record import describe_sources, provenance

if TYPE_CHECKING:
    from coremerge_jax.lora import Adapter, LoRA
    from coremerge_jax.merging.stream import MergeStream

EPILOG = """[bold]Examples[/]

coremerge merge adapters/* -o merged

coremerge merge adapters/* -o merged --rule tsv --rule isotropize --scale 0.9

coremerge merge math code chat -o merged --rule ties:density=0.2 --weights 1,1,0.5

coremerge merge adapters/* -o merged --scale 0.9 --scale '*.q_proj=0.5' --dry-run

coremerge merge --recipe recipe.yaml -o merged --rank 32

A recipe is a YAML file with the same content: adapters (relative to the file), weights, rules,
space, scale, rank, energy, dtype, seed, precision, extras, allow_mismatch."""


@takes_recipe
def merge(
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="OUT", help="Folder for the merged adapter."),
    ] = None,
    *,
    recipe: Recipe,
    max_memory: Annotated[
        str | None,
        run_option(
            metavar="SIZE",
            help="Memory that the whole process may take, such as 2GiB. Default: what is good for "
            "speed; it does not grow with the number of modules.",
        ),
    ] = None,
    mesh: Annotated[
        str | None,
        devices_option(
            metavar="ROWS[xCOLUMNS]",
            help="How devices are arranged: rows share the modules, and columns share each module. "
            "Default: all devices, one a row.",
        ),
    ] = None,
    distributed: Annotated[
        bool,
        devices_option(
            "--distributed",
            help="Share the work with other processes that run the same command, and see the same "
            "files. Found on TPU, Slurm, Open MPI; else give JAX_COORDINATOR_ADDRESS, "
            "JAX_NUM_PROCESSES, JAX_PROCESS_ID.",
        ),
    ] = False,
    patience: Annotated[
        int,
        devices_option(
            metavar="SECONDS",
            min=1,
            help="With --distributed: how long a process may give no sign of life before all end. "
            "Default: 60.",
        ),
    ] = 60,
    dry_run: Annotated[
        bool,
        run_option(
            "--dry-run",
            help="Check everything, show what would be done and what it would cost, write nothing.",
        ),
    ] = False,
    force: Annotated[bool, run_option("--force", help="Replace OUT if it exists.")] = False,
    as_json: Annotated[bool, run_option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Merge LoRA adapters into one."""
    if output is None and not dry_run:
        raise RecipeError("no output: give -o OUT, or --dry-run to only check")
    room = parse_size(max_memory) if max_memory else None
    recipe.check()
    if distributed:
        join_job(patience)
    report = _report(recipe, output, room, mesh, force=force, dry_run=dry_run)
    if report is None:
        return None
    if as_json:
        return print_json(report)
    return _show(report)


def _report(
    recipe: Recipe,
    output: Path | None,
    max_memory: int | None,
    mesh: str | None,
    *,
    force: bool,
    dry_run: bool,
) -> dict[str, Any] | None:
    """Does the work; one process tells about it. What can fail early is checked first."""
    import jax

    from coremerge_jax.io.formats import open_adapter
    from coremerge_jax.io.outputs import ADAPTER, check_output
    from coremerge_jax.merging.processes import agreed

    stage = Stages()
    with stage("open"), agreed():
        if output is not None:
            check_output(output, kind=ADAPTER, inputs=recipe.adapters, force=force)
        adapters = [open_adapter(source) for source in recipe.adapters]
        devices = make_mesh(mesh)
        taken = taken_by_program()
        room = None if max_memory is None else room_for_batches(max_memory, taken)
        stream = recipe.stream(adapters, mesh=devices, max_memory=room)
    target = None if dry_run else output
    kept = _write(recipe, adapters, stream, target, force, stage) if target else {}
    if jax.process_index() > 0:  # whose host may not see the output yet
        return None
    if target:
        report = _describe(adapters, stream, target, kept)
    else:
        report = _plan(recipe, adapters, stream, taken, stage)
    return {**report, "seconds": stage.seconds, "recipe": recipe.to_dict()}


def _plan(
    recipe: Recipe, adapters: "list[Adapter]", stream: "MergeStream", taken: int, stage: Stages
) -> dict[str, Any]:
    import jax.numpy as jnp

    from coremerge_jax.merging.cost import Machine, expected_seconds

    with stage("trace"):
        merged = stream.outline
    with stage("check"):
        ranks = {path: min(lora.rank, recipe.rank or lora.rank) for path, lora in merged.items()}
        signatures = _signatures(adapters, merged, ranks)
    with stage("measure the machine"):
        machine = Machine.measure(stream.workers)
    costs, programs = stream.own.costs(), len(signatures)
    size = sum(rank * sum(merged[path].shape) for path, rank in ranks.items())
    seconds = expected_seconds(costs, recipe.build_rule(), machine, stream.workers, programs)
    # Programs are traced here as for a merge, which then has to lower them: that takes as long.
    seconds = {"trace": 2 * stage.seconds["trace"], **seconds}
    return {
        "bytes": size * jnp.dtype(recipe.dtype).itemsize,
        "signatures": signatures,
        "cost": {
            "operations": {
                "products": sum(one.products for one in costs),
                "core": sum(one.core for one in costs),
            },
            "bytes": {
                "read": sum(one.read for one in costs),
                "written": sum(one.written for one in costs),
            },
            "memory": taken + stream.own.memory,
            "programs": programs,
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
        },
    }


def _write(
    recipe: Recipe,
    adapters: "list[Adapter]",
    stream: "MergeStream",
    output: Path,
    force: bool,
    stage: Stages,
) -> dict[str, float]:
    """Gives the energy that modules have kept."""
    import jax

    from coremerge_jax.io.peft.writer import save_peft

    keep_compiled_programs()
    with compile_seconds() as compiled, stage("merge", total=len(stream.own)) as advance:
        kept = save_peft(
            _Watched(stream, advance),
            output,
            dtype=recipe.dtype,
            rank=recipe.rank,
            energy=recipe.energy,
            force=force,
            card=provenance(recipe, describe_sources(recipe, adapters)),
        )
    for note in idle_adapters(stream) if jax.process_index() == 0 else ():
        say(f"note: {note}", err=True)
    stage.seconds["compile"] = round(compiled["compile"], 3)
    return kept or {}


def _describe(
    adapters: "list[Adapter]", stream: "MergeStream", output: Path, kept: Mapping[str, float]
) -> dict[str, Any]:
    from coremerge_jax.io.peft.reader import open_peft

    written = open_peft(output).outline
    ranks = {path: written[path].rank for path in stream.outline}
    return {
        "output": str(output),
        "bytes": folder_size(output),
        "signatures": _signatures(adapters, stream.outline, ranks),
        "energy_kept": kept,
    }


@dataclasses.dataclass
class _Watched:
    """A stream that tells of each part."""

    stream: "MergeStream"
    advance: Callable[[], None]

    @property
    def outline(self) -> "Adapter":
        return self.stream.outline

    @property
    def folders(self) -> tuple[Path, ...]:
        return self.stream.folders

    @property
    def processes(self) -> Mapping[int, int]:
        return self.stream.processes

    @property
    def spread(self) -> bool:
        return self.stream.spread

    def share(
        self, together: Iterable[Sequence[str]] | None = None
    ) -> "tuple[_Watched, dict[str, int]]":
        share, owner = self.stream.share(together)
        return dataclasses.replace(self, stream=share), owner

    def __iter__(self) -> "Iterator[Mapping[str, LoRA]]":
        for part in self.stream:
            yield part
            self.advance()
        refuse_nothing(self.stream)


def _signatures(
    adapters: "Sequence[Adapter]", merged: "Adapter", ranks: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Returns one entry for all modules of equal shape and ranks."""
    groups = defaultdict(list)
    outlines = [adapter.outline for adapter in adapters]
    for path, lora in merged.items():
        ranks_in = tuple(adapter[path].rank for adapter in outlines if path in adapter)
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
        seconds = report["seconds"]
        say(
            f"merged {merge} in {seconds['open'] + seconds['merge']:.1f} s, of which "
            f"{seconds['compile']:.1f} s went to compiling",
            f"wrote {report['output']} ({size})",
        )
    else:
        _show_cost(report["cost"])
        say(f"would merge {merge}, and write at most {size}; nothing was written")


def _show_cost(cost: Mapping[str, Any]) -> None:
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
        "from an earlier merge are not compiled again"
    )
