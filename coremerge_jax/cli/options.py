"""The options of a recipe, which the commands that merge have in common, and texts as values."""

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from coremerge_jax import declared
from coremerge_jax.errors import RecipeError
from coremerge_jax.recipe import MOST, OPTIONS, Recipe, frozen, load_yaml

_LARGEST = 1e15  # in a range: all smaller whole numbers are exact

search_option = partial(typer.Option, show_default=False, rich_help_panel="Search")

run_option = partial(typer.Option, show_default=False, rich_help_panel="Run")

Force = Annotated[bool, run_option("--force", help="Replace OUT if it exists.")]

BASE_CONFIG = (
    "With --to gguf: config.json of the base model, its folder, or its GGUF file. Default: the "
    "folder that the adapter names as its base model."
)

Json = Annotated[bool, run_option("--json", help="Print the result as JSON.")]


# --- Texts as values ------------------------------------------------------------------------
def parse_size(text: str) -> int:
    """Returns the number of bytes that ``2GiB``, ``1.5GB`` or ``800M`` describes."""
    found = re.fullmatch(r"\s*([\d.]+)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    try:
        number, prefix, binary = found.groups() if found else ("", "", "")
        return int(
            float(number) * (1024 if binary else 1000) ** " kmgt".index(prefix.lower() or " ")
        )
    except (OverflowError, ValueError) as error:
        raise RecipeError(f"size must be like 2GiB or 800MB, got {text!r:.60}") from error


def parse_count(text: str) -> int:
    """Returns the number that ``2.5M``, ``800k`` or ``1_000_000`` describes."""
    found = re.fullmatch(r"\s*(\d[\d_]{0,30}(?:\.\d{1,30})?)\s*([kmb]?)\s*", text, re.IGNORECASE)
    if not found:
        raise RecipeError(f"a number of parameters must be like 2.5M or 800k, got {text!r:.60}")
    number, prefix = found.groups()
    return int(Decimal(number) * 1000 ** " kmb".index(prefix.lower() or " "))


def parse_scale(texts: Sequence[str]) -> float | str | dict[str, float | str]:
    """Parses ``0.9`` or ``auto``, or several ``PATTERN=NUMBER``; a bare one is of the rest."""
    scales: dict[str, float | str] = {}
    for text in texts:
        pattern, _, number = text.rpartition("=")
        try:
            scale = number if number == "auto" else float(number)
        except ValueError as error:
            raise RecipeError(
                f"scale must be a number, auto, or PATTERN=NUMBER such as '*.query=0.5', got "
                f"{text!r:.60}"
            ) from error
        if (pattern or "*") in scales:
            raise RecipeError(f"scale of {pattern or '*'!r} is given twice")
        scales[pattern or "*"] = scale
    if set(scales) == {"*"}:
        return scales["*"]
    rest = {"*": scales.pop("*")} if "*" in scales else {}
    return scales | rest  # the first pattern that matches counts


def parse_weights(text: str) -> tuple[float, ...]:
    """Parses weights such as ``1,0.5,0.5``."""
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError as error:
        raise RecipeError(f"weights must be numbers such as 1,0.5,0.5, got {text!r:.60}") from error


def parse_values(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Parses values to try, ``NAME=V1,V2,...`` or ``NAME=START:STOP:STEP``, by name."""
    values: dict[str, list[Any]] = {}
    for text in texts:
        name, _, listed = text.partition("=")
        if not name or not listed:
            raise RecipeError(f"values must be like scale=0.5,1 or scale=0.5:2:0.5, got {text!r}")
        if name in values:
            raise RecipeError(f"values of {name!r} are given twice")
        values[name] = _parse_range(text, listed) if ":" in listed else _parse_list(text, listed)
    return values


def _parse_range(text: str, listed: str) -> list[Any]:
    """Parses a range in decimals, so that 0.1:0.3:0.1 ends with 0.3."""
    try:
        start, stop, step = map(Decimal, listed.split(":"))
        steps = (stop - start) / step
        small = all(abs(x) < _LARGEST for x in (start, stop, step))
    except (ArithmeticError, ValueError) as error:
        raise RecipeError(f"a range must be like 0.1:2:0.1, got {text!r:.200}") from error
    if not small:
        raise RecipeError(f"a range must have numbers below {_LARGEST:.0e}, got {text!r:.200}")
    if steps >= MOST:
        raise RecipeError(
            f"a range of {steps + 1:.6g} values is too long: at most {MOST}, got {text!r:.200}"
        )
    if steps < 0:
        raise RecipeError(f"a range must go from its first to its second number, got {text!r:.200}")
    numbers = [start + i * step for i in range(int(steps) + 1)]
    whole = all(x == int(x) for x in (start, step))
    return [int(x) if whole else float(x) for x in numbers]


def _parse_list(text: str, listed: str) -> list[Any]:
    if listed.count(",") >= MOST:
        raise RecipeError(
            f"values {text[:60]!r}…: {listed.count(',') + 1} values; at most {MOST} can be tried"
        )
    return list(map(frozen, load_yaml(f"[{listed}]", f"values {text!r:.200}")))


# --- The options of a recipe ----------------------------------------------------------------
# Type on the command line and parser of the fields that have a text form of their own.
_PARSED: Mapping[str, tuple[Any, Callable[[Any], Any]]] = {
    "adapters": (list[str], tuple),
    "parameters": (str, parse_count),
    "rules": (list[str], tuple),
    "scale": (list[str], parse_scale),
    "statistics": (list[str], tuple),
    "weights": (str, parse_weights),
}


@dataclasses.dataclass(frozen=True)
class Given:
    """Fields of a recipe that were given on the command line.

    Attributes:
        file: the recipe file, if any.
        options: values of fields, which replace those of the file.
    """

    file: Path | None
    options: Mapping[str, Any]

    def recipe(self) -> Recipe:
        """Returns the recipe.

        Raises:
            RecipeError: a value is not one that its field can have, or there are no adapters.
        """
        start = Recipe.load(self.file) if self.file else Recipe()
        recipe = dataclasses.replace(start, **self.options)
        if not recipe.adapters:
            raise RecipeError("no adapters: name their folders, or give a recipe that does")
        return recipe


def takes_recipe(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of a recipe in place of its parameter ``given``, a `Given`."""
    signature = inspect.signature(command)
    parameters: list[inspect.Parameter] = []
    for own in signature.parameters.values():
        parameters += _recipe_parameters() if own.name == "given" else [own]

    @functools.wraps(command)
    def run(*, recipe_file: Path | None, **values: Any) -> None:
        own = {name: values.pop(name) for name in signature.parameters if name != "given"}
        options = {
            name: _PARSED[name][1](value) if name in _PARSED else value
            for name, value in values.items()
            if value not in (None, []) and (value is not False or OPTIONS[name].off)
        }
        command(given=Given(recipe_file, options), **own)

    keyword = [x.replace(kind=inspect.Parameter.KEYWORD_ONLY) for x in parameters]
    run.__signature__ = signature.replace(parameters=keyword)  # type: ignore[attr-defined]  # read by typer
    return run


def _recipe_parameters() -> list[inspect.Parameter]:
    helps = _helps()
    parameters = [_parameter(field, helps) for field in dataclasses.fields(Recipe)]
    file = run_option(
        "--recipe",
        metavar="FILE.yaml",
        help="File with adapters and options; those on the command line replace them.",
    )
    return [*parameters, _keyword("recipe_file", Annotated[Path | None, file], None)]


def _parameter(field: dataclasses.Field, helps: Mapping[str, str]) -> inspect.Parameter:
    """Returns the parameter of a command for a field of a recipe."""
    name, option = field.name, OPTIONS[field.name]
    text = helps.get(name, "")
    if name == "adapters":
        argument = typer.Argument(metavar=option.metavar, help=text, show_default=False)
        return _keyword(name, Annotated[list[str] | None, argument], None)
    is_flag, flag = field.type in (bool, bool | None), _flag(option.flag or name)
    if not is_flag:
        default = " ".join(field.default) if isinstance(field.default, tuple) else field.default
        text += f" Default: {option.unset or default}."
    info = typer.Option(
        f"{flag}/{_flag(option.off)}" if option.off else flag,
        metavar=option.metavar,
        help=text,
        show_default=False,
        rich_help_panel=option.panel,
        autocompletion=_completion(name),
    )
    if is_flag:
        return _keyword(name, Annotated[bool | None, info], None)
    kind: Any = _PARSED[name][0] if name in _PARSED else field.type
    return _keyword(name, Annotated[kind | None, info], None)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, annotation=annotation, default=default)


def _helps() -> dict[str, str]:
    """Returns help by field: the entries of the attributes in the docstring of `Recipe`."""
    section = (inspect.getdoc(Recipe) or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
    texts = {name: " ".join(text.replace("``", "'").split()) for name, text in entries}
    return {name: text[0].upper() + text[1:] for name, text in texts.items()}


def _completion(name: str) -> Callable[[str], list[str]] | None:
    def complete(incomplete: str) -> list[str]:
        tables = {"rules": declared.rules, "space": declared.spaces}
        choices = list(tables[name]()) if name in tables else OPTIONS[name].choices
        return [x.removesuffix("ADAPTER") for x in choices if x.startswith(incomplete)]

    return complete if name in ("rules", "space") or OPTIONS[name].choices else None
