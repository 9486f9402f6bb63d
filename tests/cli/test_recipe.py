"""Recipes and rules as text: round trips, and what is refused."""

import dataclasses
import inspect
import json
import math

import pytest
import typer.main
from hypothesis import given
from hypothesis import strategies as st

from coremerge_jax import cli, lora
from coremerge_jax.cli.options import parse_scale, parse_size, parse_values, parse_weights
from coremerge_jax.errors import RecipeError
from coremerge_jax.io.peft.writer import save_peft
from coremerge_jax.merging import statistics
from coremerge_jax.merging.merge import merge_stream
from coremerge_jax.merging.projected import project
from coremerge_jax.recipe import (
    DTYPES,
    MISSING_STATISTICS,
    OPTIONS,
    Recipe,
    format_rule,
    format_space,
    parse_rule,
    parse_space,
)
from coremerge_jax.rules import RULES, cart, dare, isotropize, task_arithmetic, ties, tsv
from coremerge_jax.spaces import SPACES

numbers = st.floats(allow_nan=False, allow_infinity=False, width=64)
scales = numbers | st.just("auto")
weights = st.none() | st.lists(numbers, min_size=1, max_size=4).map(tuple)
rules = st.one_of(
    st.sampled_from([make() for make in RULES.values()]),
    st.builds(task_arithmetic, weights=weights),
    st.builds(
        ties,
        density=st.floats(1e-12, 1),
        elect=st.sampled_from(["sum", "count"]),
        reduce=st.sampled_from(["mean", "sum", "max"]),
        scope=st.sampled_from(["module", "model"]),
        weights=weights,
    ),
    st.builds(dare, drop=st.floats(0, 1, exclude_max=True)),
    st.builds(cart, rank=st.integers(1, 99) | st.floats(1e-9, 1), scale=numbers),
)


@given(rules)
def test_rule_survives_text(rule):
    assert parse_rule(format_rule(rule)) == rule


@pytest.mark.parametrize("name", RULES)
def test_text_of_a_rule_names_every_parameter_that_has_a_value(name):
    text = format_rule(RULES[name]())
    for parameter in inspect.signature(RULES[name]).parameters.values():
        assert (f"{parameter.name}=" in text) == (parameter.default is not None)


@pytest.mark.parametrize("name", SPACES)
def test_space_survives_text(name):
    assert parse_space(format_space(SPACES[name]())) == SPACES[name]()


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("tsv", tsv()),
        ("tsv:", tsv()),
        ("ties:density=0.5,elect=count", ties(density=0.5, elect="count")),
        ("ties: density = 0.5, elect = count", ties(density=0.5, elect="count")),
        ("ties:density=1e-3", ties(density=1e-3)),
        ("task_arithmetic:weights=[1, 0.5]", task_arithmetic(weights=(1, 0.5))),
        ("task_arithmetic:weights=null", task_arithmetic()),
        ("cart:rank=16", cart(rank=16)),
        ("isotropize", isotropize()),
    ],
)
def test_parses(text, rule):
    assert parse_rule(text) == rule


def test_whole_rank_stays_whole():
    assert isinstance(parse_rule("cart:rank=16").rank, int)
    assert isinstance(parse_rule(format_rule(cart(rank=1.0))).rank, float)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tvs", "unknown rule 'tvs'; did you mean 'tsv'?"),
        ("", "unknown rule ''; expected one of: mean, "),
        ("slerp", "unknown rule 'slerp'; expected one of: mean, "),
        ("isotropize:rank=3", "rule 'isotropize' has no parameters, got 'rank'"),
        ("ties:densty=0.2", "unknown parameter of rule 'ties': 'densty'; did you mean 'density'?"),
        ("ties:density", "rule 'ties:density': expected NAME:key=value,key=value"),
        ("ties:0.2", "rule 'ties:0.2': expected NAME:key=value,key=value"),
        ("ties:density=", "density must be a number, got None"),
        ("ties:density=high", "density must be a number, got 'high'"),
        ("ties:density=true", "density must be a number, got True"),
        ("ties:density=.nan", "density must be a number, got nan"),
        ("ties:density=2", "rule 'ties:density=2': density=2: expected a share in (0, 1]"),
        ("ties:elect=cont", "rule 'ties:elect=cont': elect='cont': expected 'sum' or 'count'"),
        ("ties:density=0.2,density=0.3", "'density' is given twice"),
        ("ties:weights=[1,", "rule 'ties:weights=[1,'"),
        ("tsv:rank=[1,2]", "rule 'tsv:rank=[1,2]': rank=(1, 2): expected a whole number"),
        ("task_arithmetic:weights=much", "weights must be numbers, got 'much'"),
        ("task_arithmetic:weights=[1,x]", "weights must be numbers, got (1, 'x')"),
    ],
)
def test_refuses_rule(text, message):
    with pytest.raises(RecipeError) as error:
        parse_rule(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_refuses_space():
    with pytest.raises(RecipeError, match="unknown space 'cores'; did you mean 'core'"):
        parse_space("cores")


names = st.text("abc*./-äλ'\" ", min_size=1, max_size=8)
recipes = st.builds(
    Recipe,
    adapters=st.lists(names, max_size=3).map(tuple),
    rules=st.lists(rules.map(format_rule), min_size=1, max_size=3).map(tuple),
    space=st.sampled_from(list(SPACES)),
    scale=scales | st.dictionaries(names, scales, min_size=1, max_size=3),
    rank=st.none() | st.integers(1, 512),
    energy=st.none() | st.floats(0, 1, exclude_min=True),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    seed=st.integers(0, 2**32 - 1),
    precision=st.sampled_from([None, "float32", "float64"]),
    extras=st.sampled_from(["error", "first", "mean", "keep=a b"]),
    allow_other_base=st.booleans(),
    allow_disjoint=st.booleans(),
).flatmap(
    lambda recipe: st.lists(
        numbers, min_size=len(recipe.adapters), max_size=len(recipe.adapters)
    ).map(lambda weights: dataclasses.replace(recipe, weights=tuple(weights) or None))
)


@given(recipes)
def test_recipe_survives_yaml_and_json(recipe):
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert Recipe.from_yaml(json.dumps(recipe.to_dict())) == recipe
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@given(recipes)
def test_order_of_patterns_survives(recipe):
    if isinstance(recipe.scale, dict):
        assert list(Recipe.from_yaml(recipe.to_yaml()).scale) == list(recipe.scale)


def test_text_of_a_recipe():
    text = Recipe(adapters=("a", "b"), rules=("ties:density=0.2", "isotropize")).to_yaml()
    assert text == (
        "adapters:\n- a\n- b\nrules:\n- ties:density=0.2\n- isotropize\nspace: core\nscale: auto\n"
        "uniform_rank: true\ndtype: float32\nseed: 0\nextras: error\nmissing_statistics: error\n"
        "allow_other_base: false\nallow_disjoint: false\n"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "recipe: expected 'key: value' lines, got None"),
        ("- a", "recipe: expected 'key: value' lines, got ['a']"),
        ("rule: [tsv]", "recipe: unknown key 'rule'; did you mean 'rules'?"),
        ("rules: tsv", "recipe: rules must be a list of one or more rules, got 'tsv'"),
        ("rules: []", "rules must be a list of one or more rules"),
        ("adapters: [1]", "adapters must be a list of folders or Hugging Face ids, got (1,)"),
        ("weights: [1, x]", "weights must be a list of numbers, one per adapter, got (1, 'x')"),
        ("scale: big", "scale must be a number or auto, or such by pattern"),
        ("scale: {q: big}", "scale must be a number or auto, or such by pattern"),
        ("scale: {q: {k: 1}}", "scale must be a number or auto, or such by pattern"),
        ("statistics: folder", "statistics must be a list of folders"),
        ("scale:\n  *.q: 1", "recipe, line 2: "),
        ("scale: .inf", "scale must be a number"),
        ("rank: 0", "rank must be a whole number above 0, got 0"),
        ("rank: 1.5", "rank must be a whole number above 0, got 1.5"),
        ("rank: true", "rank must be a whole number above 0, got True"),
        ("energy: 0", "energy must be a number above 0 and at most 1, got 0"),
        ("energy: 99", "energy must be a number above 0 and at most 1, got 99"),
        ("dtype: bfloat", "unknown dtype 'bfloat'; did you mean 'bfloat16'?"),
        ("precision: double", "unknown precision 'double'; expected one of: float32, float64"),
        ("seed: -1", "seed must be a whole number"),
        ("seed: null", "seed must be a whole number"),
        ("extras: avg", "unknown extras 'avg'; expected one of: error, first, mean"),
        ("allow_disjoint: 1", "allow_disjoint must be true or false, got 1"),
        ("seed: 1\nseed: 2", "recipe, line 1: 'seed' is given twice"),
        ("rules: [", "recipe, line 1: "),
        ("a\0", "recipe: "),
    ],
)
def test_refuses_recipe(text, message):
    with pytest.raises(RecipeError) as error:
        Recipe.from_yaml(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_refuses_weights_of_more_or_fewer_adapters():
    recipe = Recipe.from_yaml("{adapters: [a, b], weights: [1]}")
    for check in (recipe.expanded, recipe.resolve):
        with pytest.raises(RecipeError, match="weights: got 1 for 2 adapters"):
            check()


def test_alias_hint():
    with pytest.raises(RecipeError, match="in quotes"):
        Recipe.from_yaml("scale:\n  *.q: 1")


def test_paths_are_relative_to_the_file(tmp_path):
    (tmp_path / "here" / "a").mkdir(parents=True)
    file = tmp_path / "recipe.yaml"
    file.write_text("adapters: [x, here/a, ./org/b, org/name, /abs]")
    assert Recipe.load(file).adapters == (
        str(tmp_path / "x"),
        str(tmp_path / "here/a"),
        str(tmp_path / "org/b"),
        "org/name",
        "/abs",
    )


def test_load_names_the_file(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("sede: 1")
    with pytest.raises(RecipeError, match=r"recipe\.yaml: unknown key 'sede'; did you mean 'seed'"):
        Recipe.load(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not a text file"):
        Recipe.load(file)


@pytest.mark.parametrize(
    ("texts", "scale"),
    [
        (["0.9"], 0.9),
        (["*.q=0.5"], {"*.q": 0.5}),
        (["0.9", "*.q=0.5"], {"*.q": 0.5, "*": 0.9}),
        (["*.q=0.5", "*.k=1e-1"], {"*.q": 0.5, "*.k": 0.1}),
    ],
)
def test_scale(texts, scale):
    assert parse_scale(texts) == scale
    if isinstance(scale, dict):
        assert list(parse_scale(texts)) == list(scale)


@pytest.mark.parametrize("texts", [["big"], ["*.q=big"], ["*.q="], [""], ["1", "2"]])
def test_refuses_scale(texts):
    with pytest.raises(RecipeError, match="scale"):
        parse_scale(texts)


def test_weights():
    assert parse_weights("1, 0.5,2e-1") == (1, 0.5, 0.2)
    with pytest.raises(RecipeError, match="weights must be numbers such as"):
        parse_weights("1;2")


def test_chain_of_two_merges_is_refused():
    with pytest.raises(RecipeError, match="merges once"):
        Recipe(rules=("tsv", "mean")).resolve()


def test_a_range_ends_with_its_last_number():
    assert parse_values(["scale=0.1:0.3:0.1"]) == {"scale": [0.1, 0.2, 0.3]}
    assert parse_values(["rank=8:2:-3"]) == {"rank": [8, 5, 2]}
    assert len(parse_values(["scale=1:10000:1"])["scale"]) == 10_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scale=0:1e9:1e-3", "a range of 1.00000e+12 values is too long: at most 10000"),
        ("scale=0:1:1e-400", "a range of 1.00000e+400 values is too long"),
        ("scale=0:1:1e-999999", "a range of"),
        ("scale=0:10000:1", "a range of 10001 values is too long"),
        ("scale=0:1:0", "a range must be like 0.1:2:0.1"),
        ("scale=0:1:-1", "from its first to its second number"),
        ("scale=0:nan:1", "a range must be like 0.1:2:0.1"),
        ("scale=snan:1:1", "a range must be like 0.1:2:0.1"),
        ("scale=0:inf:1", "a range must have numbers below 1e+15"),
        ("scale=0:inf:inf", "a range must be like 0.1:2:0.1"),
        ("scale=0:1:inf", "a range must have numbers below 1e+15"),
        ("scale=1e999999:1e999999:1", "a range must have numbers below 1e+15"),
        ("scale=0:1:2:3", "a range must be like 0.1:2:0.1"),
        ("scale=" + "1," * 1_000_000, "1000001 values; at most 10000"),
        ("scale=[[[", "values 'scale=[[['"),
        ("scale=*x", "an alias"),
    ],
)
def test_refuses_values(text, message):
    with pytest.raises(RecipeError) as error:
        parse_values([text])
    assert message in str(error.value)
    assert len(str(error.value)) < 500
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rules": ["tsv"] * 100_000}, "rules: got 100000; at most 100"),
        ({"adapters": ["a"] * 10_001}, "adapters: got 10001; at most 10000"),
        ({"scale": {f"{i}": 1 for i in range(10_001)}}, "scale: got 10001; at most 10000"),
        ({"rank": 10**4000}, "rank must be a whole number above 0"),
        ({"rank": 2**31}, "rank must be a whole number above 0"),
        ({"seed": 10**4000}, "seed must be a whole number"),
        ({"weights": [10**400]}, "weights must be a list of numbers"),
        ({"weights": [math.nan]}, "weights must be a list of numbers"),
        ({"scale": math.inf}, "scale must be a number"),
        ({"scale": {"q": math.nan}}, "scale must be a number"),
        ({"adapters": ["a\0b"]}, "adapters must be a list of folders"),
    ],
)
def test_refuses_extreme_values(values, message):
    with pytest.raises(RecipeError) as error:
        Recipe.from_dict(values)
    assert message in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("text", ["9" * 400, "1e400GB", "-1GB", "..", "1..2", ""])
def test_refuses_size(text):
    with pytest.raises(RecipeError, match="size must be like"):
        parse_size(text)


# --- Fields as options -----------------------------------------------------------------------


def test_every_field_is_declared_and_goes_somewhere():
    functions = {"merge_stream": merge_stream, "project": project, "save_peft": save_peft}
    assert list(OPTIONS) == [field.name for field in dataclasses.fields(Recipe)]
    for name, option in OPTIONS.items():
        parsed = ("adapters", "rules", "space", "seed", "to", "statistics")
        assert option.passed_to or name in parsed
        for function in option.passed_to:
            assert name in inspect.signature(functions[function]).parameters


def test_names_that_are_known_without_jax_are_those_of_the_library():
    assert DTYPES == lora.DTYPES
    assert statistics.MISSING == MISSING_STATISTICS


def test_every_option_has_help():
    for command in typer.main.get_command(cli.app).commands.values():
        for parameter in command.params:
            assert parameter.help.rstrip().endswith("."), f"{command.name} {parameter.name}"
