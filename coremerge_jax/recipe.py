"""Recipes: everything that determines a merge, as text.

A `Recipe` is plain data (strings, numbers, lists), so that it can be written beside a merged
adapter, read back years later and run again. Rules and spaces are written as on the command
line: ``ties:density=0.2,elect=count``.
"""

import dataclasses
import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import yaml

from coremerge_jax.errors import FormatError, RecipeError, unknown
from coremerge_jax.io import untrusted
from coremerge_jax.io.untrusted import is_number, is_whole
from coremerge_jax.lora import DTYPES

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from coremerge_jax.lora import Adapter
    from coremerge_jax.merging.stream import MergeStream
    from coremerge_jax.rules import Chain, Rule
    from coremerge_jax.spaces import Space

PRECISIONS = ("float32", "float64")

EXTRAS = ("error", "first", "mean", "keep=NAME")

_LARGEST = 1e15  # of a range: all whole numbers below are exact

# The most values that a list may have, and that a sweep may try.
MOST = 10_000

_MOST_RULES = 100


def _load_yaml(text: str, label: str) -> Any:
    try:
        return untrusted.parse_yaml(text, label)
    except FormatError as error:
        raise RecipeError(str(error)) from error


# --- Rules and spaces as text ---------------------------------------------------------------
def parse_rule(text: str) -> "Rule":
    """Returns the rule that ``NAME[:key=value,...]`` describes; values are YAML scalars or lists.

    Raises:
        RecipeError: the name, a parameter or a value is not one that exists.
    """
    from coremerge_jax.rules import RULES

    return _build("rule", text, RULES)


def format_rule(rule: "Rule") -> str:
    """Inverts `parse_rule`, with every parameter that has a value written out."""
    from coremerge_jax.rules import RULES

    return _describe("rule", rule, RULES)


def parse_space(text: str) -> "Space":
    """Returns the merge space that ``NAME[:key=value,...]`` describes."""
    from coremerge_jax.spaces import SPACES

    return _build("space", text, SPACES)


def format_space(space: "Space") -> str:
    """Inverts `parse_space`."""
    from coremerge_jax.spaces import SPACES

    return _describe("space", space, SPACES)


def _build(what: str, text: str, table: Mapping[str, Callable[..., Any]]) -> Any:
    name, _, arguments = text.partition(":")
    if name not in table:
        raise unknown(what, name, table)
    parameters = inspect.signature(table[name]).parameters
    values = _parse_arguments(what, text, arguments)
    for key, value in values.items():
        if key not in parameters:
            raise _unknown_parameter(what, name, key, parameters)
        _check_kind(f"{what} {text!r:.200}", key, value, parameters[key].default)
    try:
        return table[name](**values)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{what} {text!r:.200}: {error}") from error


def _unknown_parameter(what: str, name: str, key: object, known: Iterable[str]) -> RecipeError:
    if not known:
        return RecipeError(f"{what} {name!r} has no parameters, got {str(key)!r}")
    return unknown(f"parameter of {what} {name!r}:", key, known)


def _parse_arguments(what: str, text: str, arguments: str) -> dict[str, Any]:
    """Reads ``a=1,b=[2,3]`` as the YAML flow mapping ``{a: 1, b: [2,3]}``."""
    flow, count = re.subn(r"(^|,)\s*(\w+)\s*=", r"\1 \2: ", arguments)
    values = _load_yaml(f"{{{flow}}}", f"{what} {text!r:.200}")
    if len(values) != count:
        raise RecipeError(f"{what} {text!r:.200}: expected NAME:key=value,key=value")
    return {key: _frozen(value) for key, value in values.items()}


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _check_kind(label: str, key: str, value: Any, default: Any) -> None:
    """Refuses text for a number, and the like, where the default tells what is expected."""
    check, expected = _KINDS.get(type(default), (lambda _: True, ""))
    if value is not default and not check(value):
        raise RecipeError(f"{label}: {key} must be {expected}, got {value!r:.200}")


def _describe(what: str, value: Any, table: Mapping[str, Callable[..., Any]]) -> str:
    name = next((name for name, make in table.items() if type(make()) is type(value)), None)
    if name is None:
        raise RecipeError(f"{value!r} is not a {what} that text can describe; it has no name")
    shown = []
    for key, parameter in inspect.signature(table[name]).parameters.items():
        given = getattr(value, key)
        if given is not None or parameter.default is not None:
            shown.append(f"{key}={_format_value(given)}")
    return f"{name}:{','.join(shown)}" if shown else name


def _format_value(value: Any) -> str:
    if isinstance(value, str):
        return value if re.fullmatch(r"[A-Za-z_]\w*", value) else json.dumps(value)
    if hasattr(value, "tolist"):
        value = value.tolist()
    return json.dumps(value, separators=(",", ":"))


# --- Recipes --------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that determines a merge. The defaults here are those of the command line.

    Attributes:
        adapters: folders or Hugging Face ids.
        weights: one number per adapter; None is 1 for each.
        rules: applied in order, each as ``NAME[:key=value,...]``.
        space: where to merge, as ``NAME[:key=value,...]``.
        scale: of the merged update: a number, or numbers by pattern of the module path, of which
            the first that matches counts (1 where none does).
        rank: cut every merged module to this rank.
        energy: cut every merged module to the fewest directions that keep this share of its
            squared Frobenius norm.
        dtype: of the written factors.
        seed: of random rules (``dare``).
        precision: of the computation; None lets the library choose.
        extras: what to do with weights that are not low-rank updates: ``error``, ``first``,
            ``mean`` or ``keep=NAME``.
        allow_mismatch: merge adapters of different base models, or without a common module.

    Raises:
        RecipeError: a value is not one that the field can have.
    """

    adapters: tuple[str, ...] = ()
    weights: tuple[float, ...] | None = None
    rules: tuple[str, ...] = ("tsv",)
    space: str = "core"
    scale: float | Mapping[str, float] = 1.0
    rank: int | None = None
    energy: float | None = None
    dtype: str = "float32"
    seed: int = 0
    precision: str | None = None
    extras: str = "error"
    allow_mismatch: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            most = _MOST_RULES if field.name == "rules" else MOST
            if isinstance(value, tuple | Mapping) and len(value) > most:
                raise RecipeError(f"{field.name}: got {len(value)}; at most {most}")
            check, expected = _CHECKS[field.name]
            if not check(value):
                raise RecipeError(f"{field.name} must be {expected}, got {value!r:.200}")
        for name, choices in (("dtype", DTYPES), ("precision", PRECISIONS)):
            value = getattr(self, name)
            if value is not None and value not in choices:
                raise unknown(name, value, choices)
        if self.extras not in EXTRAS[:3] and not re.match("keep=.", self.extras):
            raise unknown("policy for extras", self.extras, EXTRAS)
        if self.weights and self.adapters and len(self.weights) != len(self.adapters):
            raise RecipeError(
                f"weights: got {len(self.weights)} for {len(self.adapters)} adapters; "
                "give one number per adapter, in the same order"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Returns the recipe with these values, and defaults for those that are not given."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise unknown("key", key, known)
        return cls(**{key: _frozen(value) for key, value in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON-like data: every field that has a value, defaults included."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {key: _plain(value) for key, value in values.items() if value is not None}

    @classmethod
    def from_yaml(cls, text: str, label: str = "recipe") -> Self:
        """Returns the recipe that a YAML (or JSON) text holds; ``label`` names it in errors."""
        values = _load_yaml(text, label)
        if not isinstance(values, dict):
            raise RecipeError(f"{label}: expected 'key: value' lines, got {values!r:.60}")
        try:
            return cls.from_dict(values)
        except RecipeError as error:
            raise RecipeError(f"{label}: {error}") from error

    def to_yaml(self) -> str:
        """Inverts `from_yaml`."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads a recipe file. Relative paths of adapters are relative to the file.

        ``owner/name`` is a Hugging Face id where there is no folder ``owner`` beside the file.
        """
        path = Path(path)
        try:
            text = untrusted.read_text(path, untrusted.YAML_SIZE)
        except FormatError as error:
            raise RecipeError(str(error)) from error
        recipe = cls.from_yaml(text, str(path))
        adapters = tuple(_relative_to(path.parent, name) for name in recipe.adapters)
        return dataclasses.replace(recipe, adapters=adapters)

    def build_rule(self) -> "Chain":
        """Returns the rules as one rule."""
        from coremerge_jax.rules import chain

        try:
            return chain(*map(parse_rule, self.rules))
        except ValueError as error:
            raise RecipeError(str(error)) from error

    def check(self) -> None:
        """Checks what construction could not without the library: the rules and the space.

        Raises:
            RecipeError: there is no such rule or space, or the rules cannot be chained.
        """
        self.build_rule()
        parse_space(self.space)

    def explicit(self) -> Self:
        """Returns the recipe with every parameter written out, independent of later defaults."""
        rules = tuple(format_rule(parse_rule(text)) for text in self.rules)
        return dataclasses.replace(self, rules=rules, space=format_space(parse_space(self.space)))

    def stream(
        self,
        adapters: "Sequence[Adapter]",
        *,
        mesh: "Mesh | None" = None,
        max_memory: int | None = None,
    ) -> "MergeStream":
        """Returns the merge of opened adapters; what concerns writing is left to the writer.

        Raises:
            CoreMergeError: see `coremerge_jax.merge`.
        """
        import jax

        from coremerge_jax.merging.merge import merge_stream

        return merge_stream(
            adapters,
            self.build_rule(),
            space=parse_space(self.space),
            weights=self.weights,
            scale=self.scale,
            key=jax.random.key(self.seed),
            precision=self.precision,
            extras=self.extras,
            allow_mismatch=self.allow_mismatch,
            mesh=mesh,
            max_memory=max_memory,
        )

    def run(self, adapters: "Sequence[Adapter]") -> "Adapter":
        """Returns the merged adapter, in memory.

        Raises:
            CoreMergeError: see `coremerge_jax.merge`.
        """
        return self.stream(adapters).collect()


def parse_size(text: str) -> int:
    """Returns the bytes from ``2GiB``, ``1.5GB`` or ``800M``."""
    found = re.fullmatch(r"\s*([\d.]+)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    try:
        number, prefix, binary = found.groups() if found else ("", "", "")
        return int(
            float(number) * (1024 if binary else 1000) ** " kmgt".index(prefix.lower() or " ")
        )
    except (OverflowError, ValueError) as error:
        raise RecipeError(f"size must be like 2GiB or 800MB, got {text!r:.60}") from error


def parse_scale(texts: Sequence[str]) -> float | dict[str, float]:
    """Parses a scale: ``0.9``, or several ``PATTERN=NUMBER``; a bare number is for the rest."""
    scales: dict[str, float] = {}
    for text in texts:
        pattern, _, number = text.rpartition("=")
        try:
            scale = float(number)
        except ValueError as error:
            raise RecipeError(
                f"scale must be a number or PATTERN=NUMBER such as '*.query=0.5', got {text!r:.60}"
            ) from error
        if (pattern or "*") in scales:
            raise RecipeError(f"scale of {pattern or '*'!r} is given twice")
        scales[pattern or "*"] = scale
    if set(scales) == {"*"}:
        return scales["*"]
    rest = {"*": scales.pop("*")} if "*" in scales else {}
    return scales | rest


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
    return [_frozen(value) for value in _load_yaml(f"[{listed}]", f"values {text!r:.200}")]


def parse_weights(text: str) -> tuple[float, ...]:
    """Weights from ``1,0.5,0.5``."""
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError as error:
        raise RecipeError(f"weights must be numbers such as 1,0.5,0.5, got {text!r:.60}") from error


def _relative_to(folder: Path, name: str) -> str:
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(@[^@]+)?", name)
    return name if is_hub_id and not (folder / name).parent.exists() else str(folder / name)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value


def _is_scale(value: object) -> bool:
    if isinstance(value, Mapping):
        named = all(isinstance(k, str) and is_number(v) for k, v in value.items())
        return bool(value) and named
    return is_number(value)


def _is_list_of(check: Callable[[Any], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, tuple) and all(map(check, value))


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value) and "\0" not in value


_KINDS: dict[type, tuple[Callable[[Any], bool], str]] = {
    bool: (lambda v: isinstance(v, bool), "true or false"),
    int: (is_whole, "a whole number"),
    float: (is_number, "a number"),
    str: (_is_text, "a word"),
    type(None): (
        lambda v: is_number(v) or _is_list_of(is_number)(v),
        "numbers",
    ),
}

_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "adapters": (_is_list_of(_is_text), "a list of folders or Hugging Face ids"),
    "weights": (_is_list_of(is_number), "a list of numbers, one per adapter"),
    "rules": (lambda v: _is_list_of(_is_text)(v) and v, "a list of one or more rules"),
    "space": (_is_text, "the name of a merge space"),
    "scale": (_is_scale, "a number, or numbers by pattern of the module path"),
    "rank": (lambda v: is_whole(v) and 0 < v < 2**31, "a whole number above 0"),
    "energy": (lambda v: is_number(v) and 0 < v <= 1, "a number above 0 and at most 1"),
    "dtype": (_is_text, "the name of a dtype"),
    "seed": (
        lambda v: is_whole(v) and 0 <= v < 2**32,
        "a whole number from 0 to 2^32 - 1",
    ),
    "precision": (_is_text, "the name of a dtype"),
    "extras": (_is_text, "the name of a policy"),
    "allow_mismatch": (lambda v: isinstance(v, bool), "true or false"),
}
