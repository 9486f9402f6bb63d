"""``coremerge collect``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

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
from coremerge_jax.cli.inputs import (
    AllowMissing,
    BatchSize,
    Device,
    Field,
    Inputs,
    Length,
    Reading,
    Tokens,
    check_base,
    inputs_option,
)
from coremerge_jax.cli.options import Force, Json, run_option
from coremerge_jax.errors import RecipeError

EPILOG = """[bold]Examples[/]

coremerge collect adapters/math adapters/code --base models/llama --inputs math.jsonl code.jsonl \
-o statistics

coremerge merge adapters/math adapters/code -o merged --rule regmean --statistics statistics

Needs torch and transformers: pip install 'coremerge-jax\\[torch]'."""


def collect(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER...",
            help="PEFT folders, or adapters of other formats, or Hugging Face ids.",
            show_default=False,
        ),
    ],
    base: Annotated[
        str,
        typer.Option(
            "--base",
            metavar="MODEL",
            help="Their base model: a folder of transformers, or a Hugging Face id.",
            show_default=False,
        ),
    ],
    inputs: Inputs = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="OUT", help="Folder for the statistics.", show_default=False
        ),
    ] = None,
    field: Field = None,
    tokens: Tokens = None,
    length: Length = 512,
    batch_size: BatchSize = 8,
    source: Annotated[
        str,
        inputs_option(
            "--source",
            metavar="own|base|ADAPTER",
            help="Model that reads the inputs of a task: with the task's own adapter, the base "
            "model alone, or with a merge that was made before. Default: own.",
        ),
    ] = "own",
    full: Annotated[
        bool,
        inputs_option(
            "--full",
            help="Collect n × n numbers of each module, for merges with free rows; by default, "
            "those in the space of the adapters, which are far fewer.",
        ),
    ] = False,
    device: Device = None,
    allow_missing: AllowMissing = False,
    allow_other_base: Annotated[
        bool,
        run_option(
            "--allow-other-base", help="Collect even if the adapters name another base model."
        ),
    ] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Collect statistics of modules' inputs, for merges with unlabelled examples."""
    if output is None:
        raise RecipeError("no output: give -o OUT")
    if not inputs:
        raise RecipeError("no inputs: give --inputs FILE..., one file for each adapter")

    from coremerge_jax.io.formats import open_adapter
    from coremerge_jax.io.outputs import STATISTICS, check_output
    from coremerge_jax.io.packs.pack_record import expand
    from coremerge_jax.io.statistics_files import save_statistics
    from coremerge_jax.merging.belonging import check_same_base

    reading = Reading(base, inputs, field, tokens, length, batch_size, device, allow_missing)
    stage = Stages()
    merge = None if source in ("own", "base") else source
    sources = list(expand(sources))
    with stage("open"):
        read = [*sources, base, *inputs, *([merge] if merge else [])]
        check_output(output, kind=STATISTICS, inputs=read, force=force)
        adapters = [open_adapter(path) for path in sources]
        reader = open_adapter(merge) if merge else source
        if not allow_other_base:
            check_same_base(adapters)
            check_base(base, adapters)
        examples = reading.examples(adapters)
    options = {"source": reader, "full": full}
    statistics, texts = reading.run("collect_torch", adapters, examples, stage, **options)
    save_statistics(statistics, output, inputs=inputs, force=force)
    counts = map(int, statistics.counts)
    rows = [
        {"adapter": name, "inputs": file, "texts": number, "tokens": count}
        for name, file, number, count in zip(
            statistics.adapters, inputs, texts, counts, strict=True
        )
    ]
    report = {
        "output": str(output),
        "bytes": folder_size(output),
        "source": statistics.source,
        "tasks": rows,
        "modules": list(statistics),
        "seconds": stage.seconds,
    }
    return _show(report, as_json)


def _show(report: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        return print_json(report)
    columns = ("adapter", "inputs", "texts", "tokens")
    rows = [[str(row[column]) for column in columns] for row in report["tasks"]]
    print_table(columns, rows, right=columns[2:])
    return say(
        f"collected modules {describe_paths(report['modules'])} in "
        f"{report['seconds']['read']:.1f} s",
        f"wrote {report['output']} ({decimal(report['bytes'])})",
    )
