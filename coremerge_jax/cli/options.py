"""The options of a recipe, which the commands that merge have in common."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from coremerge_jax.errors import RecipeError
from coremerge_jax.recipe import DTYPES, EXTRAS, PRECISIONS, Recipe, parse_scale, parse_weights

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


Adapters = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="ADAPTER",
        help="PEFT folders, orbax checkpoints, or Hugging Face ids.",
        show_default=False,
    ),
]
Rules = Annotated[
    list[str] | None,
    _method(
        "--rule",
        metavar="NAME[:key=value,...]",
        help="Merge rule; several are applied in order. "
        f"Default: {' '.join(Recipe.rules)}; see 'coremerge rules'.",
        autocompletion=_complete_rule,
    ),
]
Space = Annotated[
    str | None,
    _method(
        metavar="NAME[:key=value,...]",
        help=f"Where to merge, such as knots, or tucker:rank=16. Default: {Recipe.space}.",
        autocompletion=_complete(*SPACES),
    ),
]
Scale = Annotated[
    list[str] | None,
    _method(
        metavar="[PATTERN=]NUMBER",
        help="Scale of the merged update. With a pattern: of the modules whose path matches, "
        f"the first that does counts. Default: {Recipe.scale}.",
    ),
]
Weights = Annotated[
    str | None,
    _method(metavar="W1,W2,...", help="Weight of each adapter. Default: 1 each."),
]
Seed = Annotated[
    int | None,
    _method(metavar="N", help=f"Seed of random rules (dare). Default: {Recipe.seed}."),
]
Precision = Annotated[
    str | None,
    _method(
        metavar="|".join(PRECISIONS),
        help="Precision of the computation. Default: the best that the device has.",
        autocompletion=_complete(*PRECISIONS),
    ),
]
Rank = Annotated[
    int | None,
    _result(metavar="N", help="Cut the result to this rank. Default: nothing is cut."),
]
Energy = Annotated[
    float | None,
    _result(
        metavar="SHARE",
        help="Cut the result to the fewest directions that hold this share of its squared "
        "norm, such as 0.99. Default: nothing is cut.",
    ),
]
Dtype = Annotated[
    str | None,
    _result(
        metavar="|".join(DTYPES),
        help=f"Number format of the written factors. Default: {Recipe.dtype}.",
        autocompletion=_complete(*DTYPES),
    ),
]
Extras = Annotated[
    str | None,
    _result(
        metavar="|".join(EXTRAS),
        help="What to do with trained weights that are not LoRA factors (heads, biases, "
        f"tokens). Default: {Recipe.extras}.",
        autocompletion=_complete(*EXTRAS[:3], "keep="),
    ),
]
AllowMismatch = Annotated[
    bool,
    run_option("--allow-mismatch", help="Merge even if base models differ or no module is common."),
]
RecipeFile = Annotated[
    Path | None,
    run_option(
        "--recipe",
        metavar="FILE.yaml",
        help="Take adapters and options from a file; those given here replace them.",
    ),
]


def read_recipe(file: Path | None, **options: Any) -> Recipe:
    """The recipe of a file, with what the command line says; options by the names of its fields.

    Raises:
        RecipeError: an option is not what it can be, or there are no adapters.
    """
    parsed = {
        **options,
        "adapters": tuple(options["adapters"] or ()) or None,
        "rules": tuple(options["rules"] or ()) or None,
        "scale": parse_scale(options["scale"]) if options["scale"] else None,
        "weights": parse_weights(options["weights"]) if options["weights"] is not None else None,
        "allow_mismatch": options["allow_mismatch"] or None,
    }
    given = {name: value for name, value in parsed.items() if value is not None}
    recipe = dataclasses.replace(Recipe.load(file) if file else Recipe(), **given)
    if not recipe.adapters:
        raise RecipeError("no adapters: name their folders, or give a recipe that does")
    return recipe
