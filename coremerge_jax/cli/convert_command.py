"""``coremerge convert``."""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.filesize import decimal

from coremerge_jax.cli.console import (
    describe_paths,
    describe_range,
    describe_ranks,
    folder_size,
    print_json,
    print_table,
    say,
)
from coremerge_jax.cli.options import BASE_CONFIG, parse_count
from coremerge_jax.errors import RecipeError
from coremerge_jax.io.formats import all_targets, described, find_target, open_adapter
from coremerge_jax.io.orbax.orbax_folder import FAMILIES
from coremerge_jax.io.outputs import check_output

if TYPE_CHECKING:
    from coremerge_jax.lora import Adapter

EPILOG = """[bold]Examples[/]

coremerge convert checkpoints/1000 -o adapter --alpha 32 --names tunix

coremerge convert adapter -o checkpoint --to maxtext-llama3.1 --head-dim 128

coremerge convert merged -o checkpoint --to orbax --like checkpoints/1000

coremerge convert merged -o merged-gguf --to gguf --base-config models/llama

coremerge convert loha.safetensors -o style --to kohya --rank 32

coremerge convert dora -o lora --base models/llama --rank 32"""

_source = partial(
    typer.Option, show_default=False, rich_help_panel="How the source, or --like, is stored"
)

_target = partial(typer.Option, show_default=False, rich_help_panel="Result")
NAMES = "|".join(FAMILIES)
LAYOUTS = "nnx|qwix|gemma|maxtext-serving|keras"


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help=f"The adapter: {described()}.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DST", help="Folder to write.")],
    to: Annotated[
        str,
        _target(
            metavar="|".join(all_targets()),
            help="Format to write: a PEFT folder (default); an orbax checkpoint, with stacked "
            "layers; a checkpoint that this implementation of a model family restores; or the "
            "files of another library.",
        ),
    ] = "peft",
    names: Annotated[
        str | None,
        _target(
            metavar=NAMES,
            help="Translate module names from Hugging Face's to those of this implementation of a "
            "model family, or back.",
        ),
    ] = None,
    head_dim: Annotated[
        int | None, _target(metavar="D", help="Size of an attention head, for names that need it.")
    ] = None,
    like: Annotated[
        Path | None,
        _target(
            metavar="CHECKPOINT",
            help="Orbax checkpoint whose keys, axes and dtypes to write.",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        _target(metavar="DTYPE", help="Dtype of the factors, if not orbax's. Default: float32."),
    ] = None,
    rank: Annotated[
        int | None,
        _target(metavar="N", min=1, help="Largest rank of a module; a higher one is cut."),
    ] = None,
    energy: Annotated[
        float | None,
        _target(
            metavar="SHARE",
            help="Share of each module's squared Frobenius norm, such as 0.99; the module is cut "
            "to the fewest directions that keep it.",
        ),
    ] = None,
    budget: Annotated[
        float | None,
        _target(
            metavar="N",
            min=1,
            help="Mean rank of the modules; each gets the rank that is best for the energy of all "
            "together.",
        ),
    ] = None,
    parameters: Annotated[
        str | None,
        _target(
            metavar="N[k|M|B]",
            help="Number of entries of all factors, such as 2.5M; like --budget.",
        ),
    ] = None,
    uniform_rank: Annotated[
        bool,
        _target(
            "--uniform-rank", help="Give all modules one rank, the largest, filled up with zeros."
        ),
    ] = False,
    base_config: Annotated[Path | None, _target(metavar="FILE", help=BASE_CONFIG)] = None,
    base_model: Annotated[
        str | None, _target(metavar="NAME", help="Name of the base model in the result.")
    ] = None,
    force: Annotated[bool, _target("--force", help="Replace DST if it exists.")] = False,
    layout: Annotated[
        str | None,
        _source(metavar=LAYOUTS, help="Layout of the factors. Default: recognised by the keys."),
    ] = None,
    alpha: Annotated[
        float | None,
        _source(
            metavar="NUMBER", help="LoRA alpha; required if the checkpoint does not record it."
        ),
    ] = None,
    alpha_rank: Annotated[
        int | None,
        _source(
            metavar="R", help="The rank that alpha is divided by. Default: that of the factors."
        ),
    ] = None,
    base: Annotated[
        str | None,
        _source(
            metavar="MODEL",
            help="Base model of a DoRA adapter, a folder or Hugging Face id: what the adapter adds "
            "to it is cut to LoRA of --rank.",
        ),
    ] = None,
    scan_axis: Annotated[
        str | None,
        _source(metavar="0|1|none", help="Axis of stacked layers. Default: inferred from shapes."),
    ] = None,
    axes: Annotated[
        list[str] | None,
        _source(
            metavar="PATTERN=A,B",
            help="Axes of the factors of some modules: i input, o output, r rank, l stacked layers "
            "or experts, e experts of each layer; such as '*/moe=lir,lro'.",
        ),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        _source(metavar="PATTERN", help="Keys that are not LoRA factors; several may be given."),
    ] = None,
    whole: Annotated[
        bool,
        _source(
            help="Take all LoRA factors as one model's, also those that look like an optimizer's, "
            "an average's or another model's."
        ),
    ] = False,
    item: Annotated[
        str | None, _source(metavar="NAME", help="Item to read if the checkpoint has several.")
    ] = None,
    step: Annotated[
        int | None, _source(metavar="N", help="Step to read. Default: the last.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Convert LoRA adapters between the formats of PEFT, orbax and other libraries."""
    target = find_target(to)
    written: dict[str, Any] = {
        "like": like,
        "dtype": dtype,
        "rank": rank,
        "energy": energy,
        "budget": budget,
        "parameters": None if parameters is None else parse_count(parameters),
        "uniform_rank": uniform_rank or None,
        "base_config": base_config,
    }
    written = {option: value for option, value in written.items() if value is not None}
    for option in written:
        if option not in target.targets[to]:
            takers = [name for name in all_targets() if option in find_target(name).targets[name]]
            named = option.replace("_", "-")
            raise RecipeError(f"--{named} is for --to {' or '.join(takers)}")
    if names is not None and to in FAMILIES:
        raise RecipeError(f"--names is not for --to {to}, which has names of its own")
    told: dict[str, Any] = {
        "layout": layout,
        "alpha": alpha,
        "rank": alpha_rank,
        "axes": parse_axes(axes, "PATTERN=A,B", "*/moe=lir,lro"),
        "ignore": ignore,
        "whole": whole or None,
        "item": item,
        "step": step,
    }
    options = {key: value for key, value in told.items() if value is not None}
    if scan_axis is not None:
        options["scan_axis"] = _parse_scan_axis(scan_axis)
    inputs = [source, *(x for x in (like, base, base_config) if x)]
    check_output(output, kind=target.name, inputs=inputs, force=force)
    if head_dim is not None and "head_dim" in target.targets[to]:
        written["head_dim"] = head_dim
    if like is not None:
        from coremerge_jax.io.orbax.orbax_adapter import share_options

        options, more = share_options(source, like, options)
        written |= more
    kept: Mapping[str, float] = {}
    if base is None:
        adapter = open_adapter(source, **options)
    else:
        from coremerge_jax.io.peft.dora import open_dora

        if "rank" not in written or options:
            raise RecipeError("--base: give --rank, the rank of the result, and no --alpha or such")
        adapter = cut = open_dora(source, base, rank=written.pop("rank"))
        kept = cut.kept
    if base_model is not None:
        adapter.metadata = dataclasses.replace(adapter.metadata, base_model=base_model)
    if names is not None:
        from coremerge_jax.trees.families import translate

        adapter = translate(adapter, names, head_dim=head_dim)
    result = target.save(adapter, output, to=to, force=force, **written)
    ranks = {path: lora.rank for path, lora in adapter.outline.items()}
    if result is not None:
        ranks, kept = dict(result.ranks), result.kept or kept
    _show(source, adapter.outline, output, to, ranks, kept, as_json)


def parse_axes(texts: list[str] | None, form: str, example: str) -> dict[str, str] | None:
    """Returns axes by pattern, from texts of a form."""
    parsed = {}
    for text in texts or []:
        pattern, separator, letters = text.rpartition("=")
        if not separator or letters.count(",") != example.count(","):
            raise RecipeError(f"--axes {text!r}: expected {form}, such as {example!r}")
        parsed[pattern] = letters
    return parsed or None


def _parse_scan_axis(text: str) -> int | None:
    if text not in ("0", "1", "none"):
        raise RecipeError(f"--scan-axis {text!r}: expected 0, 1 or none")
    return None if text == "none" else int(text)


def _show(
    source: str,
    adapter: "Adapter",
    output: Path,
    to: str,
    ranks: Mapping[str, int],
    kept: Mapping[str, float],
    as_json: bool,
) -> None:
    size = folder_size(output)
    if as_json:
        report = {"source": source, "output": str(output), "to": to, "bytes": size}
        return print_json({**report, "ranks": dict(ranks), "energy_kept": dict(kept)})
    shapes = Counter(lora.shape for lora in adapter.values())
    rows = []
    for shape in shapes:
        paths = [path for path, lora in adapter.items() if lora.shape == shape]
        rank = describe_ranks({ranks[path] for path in paths})
        row = [describe_paths(paths), "{} × {}".format(*shape), rank]
        rows.append([*row, describe_range((kept[p] for p in paths), ".1%")] if kept else row)
    columns = ["modules", "m × n", "ranks"] + ["energy kept"] * bool(kept)
    print_table(columns, rows, right=columns[1:])
    say(f"wrote {output} ({to}, {decimal(size)})")
    return None
