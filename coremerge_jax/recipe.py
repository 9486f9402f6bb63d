"""Recipes: everything that determines a merge, as text.

A `Recipe` is plain data (strings, numbers, lists), so that it can be written beside a merged
adapter, read back years later and run again. Rules and spaces are written as on the command
line: ``ties:density=0.2,elect=count``. `Recipe.resolve` parses them, once.

A field of a recipe is declared here alone: its default and help in `Recipe`, all else in a row of
`OPTIONS`. This module does not import JAX, so that help and usage errors come at once.
"""

import dataclasses
import functools
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import yaml

from coremerge_jax import declared
from coremerge_jax.errors import FormatError, RecipeError, unknown
from coremerge_jax.io import untrusted
from coremerge_jax.io.formats import merge_targets
from coremerge_jax.io.packs.pack_record import expand
from coremerge_jax.io.untrusted import Kind, is_number, is_whole
from coremerge_jax.merging.limits import Limit

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from coremerge_jax.lora import Adapter
    from coremerge_jax.merging.checks import Scale
    from coremerge_jax.merging.metric import InputMetric
    from coremerge_jax.merging.statistics import Statistics
    from coremerge_jax.merging.stream import MergeStream
    from coremerge_jax.rules import Chain, Rule
    from coremerge_jax.spaces import Space

DTYPES = ("float32", "bfloat16", "float16")  # those of `lora`, which imports JAX

PRECISIONS = ("float32", "float64")

EXTRAS = ("error", "first", "mean", "drop", "keep=ADAPTER")

MISSING_STATISTICS = ("error", "tsv")

MOST = 10_000  # values in a list, and values that a sweep may try

_MOST_RULES = 100


def _is_list_of(check: Callable[[Any], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, tuple) and all(map(check, value))


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value) and "\0" not in value


def _is_scale(value: object) -> bool:
    if isinstance(value, Mapping):
        named = all(isinstance(k, str) and _is_scale(v) for k, v in value.items())
        return bool(value) and named and not any(isinstance(v, Mapping) for v in value.values())
    return is_number(value) or value == "auto"


# Kinds of the parameters of rules and spaces, by the type of their defaults.
_PARAMETERS: dict[type, Kind] = {
    bool: untrusted.SWITCH,
    int: (is_whole, "a whole number"),
    float: (is_number, "a number"),
    str: (_is_text, "a word"),
    type(None): (lambda v: is_number(v) or _is_list_of(is_number)(v), "numbers"),
}


# --- Rules and spaces as text ---------------------------------------------------------------
def parse_rule(text: str) -> "Rule":
    """Returns the rule that ``NAME[:key=value,...]`` describes; values are YAML scalars or lists.

    Raises:
        RecipeError: the name, a parameter or a value does not exist.
    """
    call = read_rule(text)
    from coremerge_jax.rules import RULES

    return call.made_of(RULES)


def read_rule(text: str) -> "Call":
    """Reads the description of a rule, without JAX."""
    return _read("rule", text, {name: x.defaults for name, x in declared.rules().items()})


def format_rule(rule: "Rule") -> str:
    """Inverts `parse_rule`, with every parameter that has a value written out."""
    from coremerge_jax.rules import RULES

    return _describe("rule", rule, RULES)


def parse_space(text: str) -> "Space":
    """Returns the merge space that ``NAME[:key=value,...]`` describes."""
    call = read_space(text)
    from coremerge_jax.spaces import SPACES

    return call.made_of(SPACES)


def read_space(text: str) -> "Call":
    """Reads the description of a space, without JAX."""
    return _read("space", text, {name: x.defaults for name, x in declared.spaces().items()})


def format_space(space: "Space") -> str:
    """Inverts `parse_space`."""
    from coremerge_jax.spaces import SPACES

    return _describe("space", space, SPACES)


def build(what: str, text: str, table: Mapping[str, Callable[..., Any]]) -> Any:
    """Returns the object that ``NAME[:key=value,...]`` describes.

    Args:
        what: the noun for such objects in messages.
        text: the description.
        table: functions that make the objects, by name.

    Raises:
        RecipeError: the name, a parameter or a value does not exist.
    """
    defaults = {name: declared.describe(make).defaults for name, make in table.items()}
    return _read(what, text, defaults).made_of(table)


@dataclasses.dataclass(frozen=True)
class Call:
    """The parts of a text ``NAME[:key=value,...]``.

    Attributes:
        what: the noun for such objects in messages.
        text: the text.
        name: of the function that makes the object.
        values: its arguments.
    """

    what: str
    text: str
    name: str
    values: Mapping[str, Any]

    def made_of(self, table: Mapping[str, Callable[..., Any]]) -> Any:
        """Returns the object, made by the function of a table.

        Raises:
            RecipeError: the function refuses a value.
        """
        try:
            return table[self.name](**self.values)
        except (TypeError, ValueError) as error:
            raise RecipeError(f"{self.what} {self.text!r:.200}: {error}") from error


def _read(what: str, text: str, table: Mapping[str, Mapping[str, Any]]) -> Call:
    """Reads a text, given the defaults of the parameters by name.

    Raises:
        RecipeError: the name, a parameter or a value does not exist.
    """
    name, _, arguments = text.partition(":")
    if name not in table:
        raise unknown(what, name, table)
    defaults = table[name]
    values = _parse_arguments(what, text, arguments)
    for key, value in values.items():
        if not defaults:
            raise RecipeError(f"{what} {name!r} has no parameters, got {str(key)!r}")
        if key not in defaults:
            raise unknown(f"parameter of {what} {name!r}:", key, defaults)
        default = defaults[key]
        test, expected = _PARAMETERS.get(type(default), (lambda _: True, ""))
        if value is not default and not test(value):
            raise RecipeError(f"{what} {text!r:.200}: {key} must be {expected}, got {value!r:.200}")
    return Call(what, text, name, values)


def _parse_arguments(what: str, text: str, arguments: str) -> dict[str, Any]:
    """Reads ``a=1,b=[2,3]`` as the YAML flow mapping ``{a: 1, b: [2,3]}``."""
    flow, count = re.subn(r"(^|,)\s*(\w+)\s*=", r"\1 \2: ", arguments)
    values = load_yaml(f"{{{flow}}}", f"{what} {text!r:.200}")
    if len(values) != count:
        raise RecipeError(f"{what} {text!r:.200}: expected NAME:key=value,key=value")
    return {key: frozen(value) for key, value in values.items()}


def load_yaml(text: str, label: str) -> Any:
    """Returns the content of a YAML text; ``label`` names it in errors.

    Raises:
        RecipeError: the text is not YAML, or exceeds a limit of `untrusted`.
    """
    try:
        return untrusted.parse_yaml(text, label)
    except FormatError as error:
        raise RecipeError(str(error)) from error


def frozen(value: Any) -> Any:
    """Returns a value with tuples in place of its lists."""
    return tuple(map(frozen, value)) if isinstance(value, list) else value


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
class Option:
    """Declaration of a field of `Recipe`, which is an option of the command line too.

    Attributes:
        test: returns True for a value that the field can have.
        expected: words for such a value.
        metavar: placeholder for the value in help.
        passed_to: functions that take the value as an argument of the field's name.
        panel: heading of the option in help.
        flag: name of the option, where it is not the field's.
        off: name of the option that switches off what is on by default.
        unset: meaning of None, for help.
        choices: words that the value can be; ``keep=ADAPTER`` stands for any adapter.
        most: largest length of a list or mapping.
    """

    test: Callable[[Any], bool]
    expected: str
    metavar: str | None = None
    passed_to: tuple[str, ...] = ()
    panel: str = "Method"
    flag: str | None = None
    off: str | None = None
    unset: str | None = None
    choices: tuple[str, ...] = ()
    most: int = MOST

    def check(self, name: str, value: Any) -> None:
        """Refuses a value that the field cannot have.

        Raises:
            RecipeError: naming the field, its value and what is expected.
        """
        if isinstance(value, tuple | Mapping) and len(value) > self.most:
            raise RecipeError(f"{name}: got {len(value)}; at most {self.most}")
        if not self.test(value):
            raise RecipeError(f"{name} must be {self.expected}, got {value!r:.200}")
        keeps = "keep=ADAPTER" in self.choices and re.match("keep=.", value)
        if self.choices and value not in self.choices and not keeps:
            raise unknown(name, value, self.choices)


def _choice(choices: tuple[str, ...], *passed_to: str, **more: Any) -> Option:
    expected, metavar = f"one of {', '.join(choices)}", "|".join(choices)
    return Option(_is_text, expected, metavar, passed_to, choices=choices, **more)


_MERGE = ("merge_stream", "project")

OPTIONS: Mapping[str, Option] = {
    "adapters": Option(_is_list_of(_is_text), "a list of folders or Hugging Face ids", "ADAPTER"),
    "weights": Option(
        _is_list_of(is_number),
        "a list of numbers, one per adapter",
        "W1,W2,...",
        _MERGE,
        unset="1 each",
    ),
    "rules": Option(
        lambda v: _is_list_of(_is_text)(v) and len(v) > 0,
        "a list of one or more rules",
        "NAME[:key=value,...]",
        flag="rule",
        most=_MOST_RULES,
    ),
    "space": Option(_is_text, "the name of a merge space", "NAME[:key=value,...]"),
    "scale": Option(
        _is_scale,
        "a number or auto, or such by pattern of the module path",
        "[PATTERN=]NUMBER|auto",
        ("merge_stream",),
    ),
    "rank": Option(
        lambda v: is_whole(v) and 0 < v < 2**31,
        "a whole number above 0",
        "N",
        ("save_peft",),
        panel="Result",
        unset="nothing is cut",
    ),
    "energy": Option(
        lambda v: is_number(v) and 0 < v <= 1,
        "a number above 0 and at most 1",
        "SHARE",
        ("save_peft",),
        panel="Result",
        unset="nothing is cut",
    ),
    "budget": Option(
        lambda v: is_number(v) and 1 <= v < 2**31,
        "a number of at least 1",
        "N",
        ("save_peft",),
        panel="Result",
        unset="nothing is cut",
    ),
    "parameters": Option(
        lambda v: is_whole(v) and 0 < v < 2**63,
        "a whole number above 0",
        "N[k|M|B]",
        ("save_peft",),
        panel="Result",
        unset="nothing is cut",
    ),
    "uniform_rank": Option(
        *untrusted.SWITCH, None, ("save_peft",), panel="Result", off="mixed_ranks"
    ),
    "dtype": _choice(DTYPES, "save_peft", panel="Result"),
    "to": Option(
        _is_text,
        "the name of a format",
        "|".join(merge_targets()),
        panel="Result",
        unset="peft, or the format of all adapters",
    ),
    "seed": Option(
        lambda v: is_whole(v) and 0 <= v < 2**32, "a whole number from 0 to 2^32 - 1", "N"
    ),
    "precision": _choice(PRECISIONS, *_MERGE, unset="the best that the device has"),
    "extras": _choice(EXTRAS, *_MERGE, panel="Result"),
    "statistics": Option(
        lambda v: _is_list_of(_is_text)(v) and len(v) > 0,
        "a list of folders",
        "DIR",
        unset="none",
    ),
    "missing_statistics": _choice(MISSING_STATISTICS, "merge_stream", "project"),
    "allow_other_base": Option(*untrusted.SWITCH, None, _MERGE, panel="Run"),
    "allow_disjoint": Option(*untrusted.SWITCH, None, _MERGE, panel="Run"),
    "base_model": Option(
        _is_text, "a text", "NAME", ("merge_stream",), panel="Result", unset="the adapters' own"
    ),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that determines a merge. The defaults here are those of the command line.

    Attributes:
        adapters: folders, files or Hugging Face ids of adapters: of PEFT, kohya, diffusers, MLX or
            orbax.
        weights: factor of each adapter's updates, before anything else.
        rules: merge rules, applied in order; ``coremerge rules`` lists them.
        space: merge space, such as ``knots`` or ``tucker:rank=16``.
        scale: factor of the merged update, 1 for the plain rule; or factors by pattern of the
            module path, of which the first that matches counts. Where none is given, it is
            ``auto``: chosen by the rule, the number of adapters and the norms of their updates.
        rank: largest rank of a merged module; a higher one is cut.
        energy: share of each merged module's squared Frobenius norm, such as 0.99; the module is
            cut to the fewest directions that keep it. With ``statistics``, all cuts go by the norm
            of the module's outputs on these inputs.
        budget: mean rank of the merged modules, in place of ``rank``; each gets the rank that is
            best for the energy of all together. The merge is computed twice.
        parameters: number of entries of all merged factors, such as 2.5M; like ``budget``.
        uniform_rank: give all merged modules one rank, the largest, filled up with zeros, as
            llama.cpp and Ollama need it; or let each have its own, in a smaller file. Default: one
            rank, but their own with ``budget`` and ``parameters``.
        dtype: number format of the written factors.
        to: format of the merged adapter.
        seed: seed of rules that draw random numbers (``dare``).
        precision: precision of the computation.
        extras: policy for trained weights that are not LoRA factors (heads, biases, tokens):
            refuse them, unless all are equal; take the first adapter's, their mean, or those of
            one adapter, by name, folder or number from 1 on; or leave them out.
        statistics: folders of ``coremerge collect`` with the statistics of unlabelled inputs, which
            ``regmean`` needs, and by which modules are cut; several are added up.
        missing_statistics: what to do with modules without statistics: refuse them, or merge them
            by ``tsv``.
        allow_other_base: merge even if the adapters name different base models.
        allow_disjoint: merge even if an adapter has no module in common with the others.
        base_model: name of the base model in the result.

    Raises:
        RecipeError: a value is not one that the field can have.
    """

    adapters: tuple[str, ...] = ()
    weights: tuple[float, ...] | None = None
    rules: tuple[str, ...] = ("tsv",)
    space: str = "core"
    scale: float | str | Mapping[str, float | str] = "auto"
    rank: int | None = None
    energy: float | None = None
    budget: float | None = None
    parameters: int | None = None
    uniform_rank: bool | None = None
    dtype: str = "float32"
    to: str | None = None
    seed: int = 0
    precision: str | None = None
    extras: str = "error"
    statistics: tuple[str, ...] | None = None
    missing_statistics: str = "error"
    allow_other_base: bool = False
    allow_disjoint: bool = False
    base_model: str | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None or field.default is not None:
                OPTIONS[field.name].check(field.name, value)
        # Its default depends on the limit, which options may replace.
        if self.uniform_rank is (not self.limit.whole_model):
            object.__setattr__(self, "uniform_rank", None)

    @property
    def limit(self) -> Limit:
        """The limit of the result's size."""
        return Limit(self.rank, self.energy, self.budget, self.parameters)

    def value(self, name: str) -> Any:
        """Returns the value of a field, or the default that other fields give it."""
        if name == "uniform_rank" and self.uniform_rank is None:
            return not self.limit.whole_model
        return getattr(self, name)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Returns the recipe with these values, and defaults for those that are not given."""
        for key in values:
            if key not in OPTIONS:
                raise unknown("key", key, OPTIONS)
        return cls(**{key: frozen(value) for key, value in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON-like data: every field that has a value, defaults included."""
        values = {name: self.value(name) for name in OPTIONS}
        return {key: _plain(value) for key, value in values.items() if value is not None}

    @classmethod
    def from_yaml(cls, text: str, label: str = "recipe") -> Self:
        """Returns the recipe that a YAML (or JSON) text holds; ``label`` names it in errors."""
        values = load_yaml(text, label)
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

        ``owner/name`` is a Hugging Face id if there is no folder ``owner`` beside the file.
        """
        path = Path(path)
        try:
            text = untrusted.read_text(path, untrusted.YAML_SIZE)
        except FormatError as error:
            raise RecipeError(str(error)) from error
        recipe = cls.from_yaml(text, str(path))
        adapters = tuple(_relative_to(path.parent, name) for name in recipe.adapters)
        statistics = recipe.statistics and tuple(str(path.parent / x) for x in recipe.statistics)
        extras = recipe.extras
        if (kept := extras.removeprefix("keep=")) in recipe.adapters:
            extras = f"keep={adapters[recipe.adapters.index(kept)]}"
        return dataclasses.replace(recipe, adapters=adapters, extras=extras, statistics=statistics)

    def expanded(self) -> Self:
        """Returns the recipe with the adapters of each pack in its place.

        Raises:
            FormatError: a pack is broken.
            RecipeError: there is not one weight per adapter.
        """
        adapters = expand(self.adapters)
        if self.weights and adapters and len(self.weights) != len(adapters):
            raise RecipeError(
                f"weights: got {len(self.weights)} for {len(adapters)} adapters; "
                "give one number per adapter, in the same order"
            )
        return dataclasses.replace(self, adapters=adapters)

    def check(self) -> None:
        """Checks names and parameters of the rules and the space, without JAX.

        Raises:
            RecipeError: one does not exist, or a value is of another kind.
        """
        for text in self.rules:
            read_rule(text)
        read_space(self.space)

    def resolve(self) -> "Resolved":
        """Parses the rules and the space, and expands packs.

        Raises:
            CoreMergeError: as `expanded`.
            RecipeError: a rule or space does not exist, or the rules cannot be chained.
        """
        from coremerge_jax.rules import chain

        recipe = self.expanded()
        rules, space = tuple(map(parse_rule, self.rules)), parse_space(self.space)
        explicit = dataclasses.replace(
            recipe, rules=tuple(map(format_rule, rules)), space=format_space(space)
        )
        return Resolved(recipe, explicit, chain(*rules), space)

    def run(self, adapters: "Sequence[Adapter]") -> "Adapter":
        """Returns the merge of opened adapters, in memory.

        Raises:
            CoreMergeError: as `coremerge_jax.merge`.
        """
        return self.resolve().stream(adapters).collect()


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A recipe whose rules and space are parsed: what every run of a merge takes.

    Attributes:
        recipe: the recipe as given.
        explicit: the recipe with every parameter written out, independent of later defaults.
        rule: its rules as one.
        space: its merge space.
    """

    recipe: Recipe
    explicit: Recipe
    rule: "Chain"
    space: "Space"

    def with_rule(self, rule: "Chain", scale: "Scale") -> Self:
        """Returns the same with another rule and scale."""
        rules = tuple(map(format_rule, rule.rules))
        recipe, explicit = (
            dataclasses.replace(x, rules=rules, scale=scale) for x in (self.recipe, self.explicit)
        )
        return dataclasses.replace(self, recipe=recipe, explicit=explicit, rule=rule)

    @functools.cached_property
    def statistics(self) -> "Statistics | None":
        """The statistics of inputs, read from their folders; None if the recipe names none."""
        from coremerge_jax.io.statistics_files import sum_statistics

        return sum_statistics(self.recipe.statistics) if self.recipe.statistics else None

    def metric(self, adapters: "Sequence[Adapter]") -> "InputMetric | None":
        """Returns the metric by which the merge of opened adapters is cut; None if by no inputs.

        Raises:
            CoreMergeError: as `coremerge_jax.merge`.
        """
        if self.recipe.limit.nothing or self.statistics is None:
            return None
        from coremerge_jax.merging.metric import input_metric

        return input_metric(self.statistics, adapters, self.recipe.weights)

    def arguments_of(self, function: str) -> dict[str, Any]:
        """Returns the arguments of a library function that are fields of the recipe, by name."""
        names = [name for name, option in OPTIONS.items() if function in option.passed_to]
        return {name: self.recipe.value(name) for name in names}

    def stream(
        self,
        adapters: "Sequence[Adapter]",
        *,
        mesh: "Mesh | None" = None,
        max_memory: int | None = None,
    ) -> "MergeStream":
        """Returns the merge of opened adapters, before the cuts and the dtype of the written file.

        Args:
            adapters: as in `coremerge_jax.merge_stream`.
            mesh: as in `coremerge_jax.merge_stream`.
            max_memory: bytes, as in `coremerge_jax.merge_stream`.

        Raises:
            CoreMergeError: as `coremerge_jax.merge`.
        """
        import jax

        from coremerge_jax.merging.merge import merge_stream

        return merge_stream(
            adapters,
            self.rule,
            space=self.space,
            # Making a key compiles two small programs.
            key=jax.random.key(self.recipe.seed) if self.rule.needs_key else None,
            mesh=mesh,
            max_memory=max_memory,
            statistics=self.statistics,
            **self.arguments_of("merge_stream"),
        )


def _relative_to(folder: Path, name: str) -> str:
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)+(@[^@]+)?", name)
    local = (folder / name).exists() or (folder / Path(name).parts[0]).exists()
    return name if is_hub_id and not local else str(folder / name)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value
