"""``coremerge inspect``."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from coremerge_jax.cli.console import describe_paths, describe_ranks, print_json, print_table, say
from coremerge_jax.errors import CoreMergeError
from coremerge_jax.io.formats import described, find_format
from coremerge_jax.io.outputs import ADAPTER, PACK
from coremerge_jax.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from coremerge_jax.lora import Adapter, LoRA


_NAMED = 8  # extras in a line


def inspect(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER...",
            help=f"Adapters, each {described()}.",
            show_default=False,
        ),
    ],
    modules: Annotated[bool, typer.Option("--modules", help="Show every module.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what adapters are, and whether they can be merged."""
    from coremerge_jax.io.formats import open_adapter
    from coremerge_jax.io.packs.pack_record import expand

    sources = list(expand(sources))
    adapters = [open_adapter(source) for source in sources]
    problem = _problem(adapters)
    described = [_describe(*pair) for pair in zip(sources, adapters, strict=True)]
    if as_json:
        return print_json({"adapters": described, "can_be_merged": not problem, "reason": problem})
    _show(described)
    if modules:
        for adapter in described:
            _show_modules(adapter)
    if len(adapters) > 1:
        say(f"cannot be merged: {problem}" if problem else "can be merged")
    return None


def _problem(adapters: "Sequence[Adapter]") -> str | None:
    """Returns the reason why default options cannot merge the adapters; None if they can."""
    from coremerge_jax.merging.present import find_present

    default = Recipe()
    try:
        find_present(
            adapters, None, default.extras, default.allow_other_base, default.allow_disjoint
        )
    except CoreMergeError as error:
        return str(error)
    return None


def _describe(source: str, adapter: "Adapter") -> dict[str, Any]:
    metadata = adapter.metadata
    modules: dict[str, dict[str, Any]] = {
        path: {"shape": lora.shape, "rank": lora.rank, "kind": lora.kind.name, "norm": _norm(lora)}
        for path, lora in adapter.items()
    }
    return {
        "source": source,
        "name": metadata.name,
        "format": find_format(source).name,
        "base_model": metadata.base_model,
        "task_type": metadata.task_type,
        "rank": metadata.rank,
        "alpha": metadata.alpha,
        "dtype": metadata.dtype,
        "norm": sum(module["norm"] ** 2 for module in modules.values()) ** 0.5,
        "extras": list(adapter.extras),
        "beside": [file.name for file in metadata.beside],
        "modules": modules,
    }


def _norm(lora: "LoRA") -> float:
    """Returns the Frobenius norm of b @ a."""
    import numpy as np

    from coremerge_jax.lora import product_norm

    return product_norm(np.asarray(lora.b, np.float64), np.asarray(lora.a, np.float64))


def _show(adapters: list[dict[str, Any]]) -> None:
    bases = {adapter["base_model"] for adapter in adapters}
    columns = ["adapter", "modules", "ranks", "alpha", "‖ΔW‖", "dtype"]
    columns += ["base model"] * (len(bases) > 1)
    rows = [
        (
            adapter["name"] or adapter["source"],
            describe_paths(list(adapter["modules"])),
            describe_ranks({module["rank"] for module in adapter["modules"].values()}),
            "?" if adapter["alpha"] is None else f"{adapter['alpha']:g}",
            f"{adapter['norm']:.4g}",
            adapter["dtype"] or "?",
            adapter["base_model"] or "?",
        )[: len(columns)]
        for adapter in adapters
    ]
    print_table(columns, rows, right=("ranks", "alpha", "‖ΔW‖"))
    for adapter in adapters:
        if not adapter["norm"]:
            cause = "its alpha is 0" if adapter["alpha"] == 0 else "all its updates are zero"
            say(f"{adapter['name']} has no effect: {cause}")
        if adapter["extras"]:
            more = len(adapter["extras"]) - _NAMED
            names = ", ".join(adapter["extras"][:_NAMED])
            say(f"{adapter['name']} has extras: {names}" + f" and {more} more" * (more > 0))
        if adapter["beside"]:
            say(
                f"{adapter['name']} has other trained weights beside it: "
                f"{', '.join(adapter['beside'])}"
            )
    for line in _formats(adapters):
        say(line)
    if len(bases) == 1:
        say(f"base model: {bases.pop() or 'unknown'}")


def _formats(adapters: list[dict[str, Any]]) -> "Iterator[str]":
    """Yields a sentence for each format other than PEFT's, with the adapters that have it."""
    names: dict[str, list[str]] = {}
    for adapter in adapters:
        names.setdefault(adapter["format"], []).append(adapter["name"] or adapter["source"])
    names.pop(ADAPTER, None)
    for name, having in names.items():
        article = "an" if name[0] in "aeiouM" else "a"
        of_one = f"is {name if name.endswith('s') else f'{article} {name}'}"
        of_all = f"are {name.removesuffix('s')}s"
        if name == PACK:
            of_one, of_all = "is in a pack", "are in a pack"
        yield f"{', '.join(having)} {of_one if len(having) == 1 else of_all}"


def _show_modules(adapter: dict[str, Any]) -> None:
    rows = [
        (
            path,
            module["kind"],
            "{} × {}".format(*module["shape"]),
            f"{module['rank']}",
            f"{module['norm']:.4g}",
        )
        for path, module in adapter["modules"].items()
    ]
    columns = ("module", "kind", "m × n", "rank", "‖ΔW‖")
    print_table(columns, rows, right=columns[2:], title=adapter["name"])
