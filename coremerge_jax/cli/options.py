"""The options of a recipe, which the commands that merge have in common."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from coremerge_jax.errors import RecipeError
from coremerge_jax.lora import DTYPES
from coremerge_jax.recipe import EXTRAS, PRECISIONS, Recipe, parse_scale, parse_weights

SPACES = ("core", "full", "knots", "tucker")  # those of spaces.SPACES, which would need JAX

_method = partial(typer.Option, show_default=False, rich_help_panel="Method")

_result = partial(typer.Option, show_default=False, rich_help_panel="Result")

search_option = partial(typer.Option, show_default=False, rich_help_panel="Search")

run_option = partial(typer.Option, show_default=False, rich_help_panel="Run")


def _complete(*choices: str) -> Any:
    return lambda incomplete: [choice for choice in choices if choice.startswith(incomplete)]


def _complete_rule(incomplete: str) -> list[str]:
    from coremerge_jax.rules import RULES

    return [name for name in RULES if name.startswith(incomplete)]


@dataclasses.dataclass(frozen=True)
class Given:
    """Recipe fields that were given on the command line.

    Attributes:
        file: the recipe's.
        options: fields of it, which replace what the file says.
    """

    file: Path | None
    options: Mapping[str, Any]


def read_options(
    adapters: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="ADAPTER",
            help="PEFT folders, orbax checkpoints, or Hugging Face ids.",
            show_default=False,
        ),
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
            metavar="NAME[:key=value,...]",
            help=f"Where to merge, such as knots, or tucker:rank=16. Default: {Recipe.space}.",
            autocompletion=_complete(*SPACES),
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
        run_option(
            "--allow-mismatch", help="Merge even if base models differ or no module is common."
        ),
    ] = False,
    recipe_file: Annotated[
        Path | None,
        run_option(
            "--recipe",
            metavar="FILE.yaml",
            help="Take adapters and options from a file; those given here replace them.",
        ),
    ] = None,
) -> Given:
    """Returns the options of a recipe.

    Raises:
        RecipeError: an option is not what it can be.
    """
    options: dict[str, Any] = {
        "adapters": tuple(adapters) if adapters else None,
        "rules": tuple(rules) if rules else None,
        "space": space,
        "scale": parse_scale(scale) if scale else None,
        "weights": parse_weights(weights) if weights is not None else None,
        "seed": seed,
        "precision": precision,
        "rank": rank,
        "energy": energy,
        "dtype": dtype,
        "extras": extras,
        "allow_mismatch": allow_mismatch or None,
    }
    given = {name: value for name, value in options.items() if value is not None}
    return Given(recipe_file, given)


def read_recipe(given: Given) -> Recipe:
    """Returns the recipe of a file, with what the command line says.

    Raises:
        RecipeError: a value is not what it can be, or there are no adapters.
    """
    recipe = dataclasses.replace(
        Recipe.load(given.file) if given.file else Recipe(), **given.options
    )
    if not recipe.adapters:
        raise RecipeError("no adapters: name their folders, or give a recipe that does")
    return recipe


def takes_recipe(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of a recipe in place of its parameter ``recipe``."""
    return _takes(command, "recipe", read_recipe)


def takes_options(command: Callable[..., None]) -> Callable[..., None]:
    """Returns the same for a command that may do without: its parameter ``given`` is a `Given`."""
    return _takes(command, "given", lambda given: given)


def _takes(
    command: Callable[..., None], name: str, read: Callable[[Given], Any]
) -> Callable[..., None]:
    signature = inspect.signature(command)
    parameters: list[inspect.Parameter] = []
    for own in signature.parameters.values():
        options = inspect.signature(read_options).parameters.values()
        parameters += options if own.name == name else [own]

    @functools.wraps(command)
    def run(**options: Any) -> None:
        own = {key: options.pop(key) for key in signature.parameters if key != name}
        command(**{name: read(read_options(**options))}, **own)

    keyword = [x.replace(kind=inspect.Parameter.KEYWORD_ONLY) for x in parameters]
    run.__signature__ = signature.replace(parameters=keyword)  # type: ignore[attr-defined]
    return run
