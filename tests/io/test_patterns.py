"""Patterns of a configuration: the results of `re`, in bounded time."""

import re
import warnings

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from coremerge_jax.io.patterns import Patterns

letters = st.sampled_from(["a", "b", "1", "_", "é"])
atoms = (
    letters
    | st.sampled_from(
        [
            ".",
            r"\.",
            "[ab]",
            "[^a]",
            "[a-b1]",
            r"[^\w]",
            r"\d",
            r"\W",
            r"\s",
            r"\b",
            r"\B",
            "^",
            "$",
        ]
    )
    | st.sampled_from([r"\A", r"\Z", "\n"])
)
patterns = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map("".join),
        st.lists(inner, min_size=2, max_size=3).map("|".join),
        st.builds("({})".format, inner),
        st.builds("(?:{}|)".format, inner),
        st.builds("(?={})".format, inner),
        st.builds("(?!{})".format, inner),
        st.builds(
            "(?:{}){}".format,
            inner,
            st.sampled_from(["*", "+", "?", "*?", "+?", "{2}", "{1,3}", "{,2}", "{2,}"]),
        ),
        st.builds("{}{}".format, atoms.filter(lambda x: x not in "^$"), st.sampled_from("*+?")),
    ),
    max_leaves=10,
)
# Not "", where \B matches in `regex` and, before Python 3.14, not in `re`: no module is called so.
names = st.text(st.sampled_from("ab1_.é\n"), min_size=1, max_size=9) | st.text(
    "ab.", min_size=1, max_size=9
)


@settings(max_examples=20 * settings.default.max_examples)
@given(st.lists(patterns, max_size=3, unique=True), st.lists(names, min_size=1, max_size=5))
def test_results_are_those_of_re(chosen, names):
    with warnings.catch_warnings(action="ignore"):
        compiled = {}
        for pattern in chosen:
            try:
                compiled[pattern] = re.compile(rf"(.*\.)?({pattern})$")
            except re.error:
                with pytest.raises(ValueError, match="broken pattern"):
                    Patterns([pattern])
    try:
        found = Patterns(compiled)
    except ValueError as error:  # those that are too large to be run
        assume("nested more" not in str(error) and "counts above" not in str(error))
        raise
    for name in names:
        expected = next((pattern for pattern, x in compiled.items() if x.match(name)), None)
        assert found.first(name) == expected


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+(a+)+x",
        "(a|a)+x",
        "(a|aa)+x",
        "(.*)*(.*)*(.*)*x",
        "(a*)*b|(a*)*c",
        "(?=(a+)+x)a",
        "a?" * 30 + "a" * 40 + "x",
    ],
)
def test_no_pattern_takes_more_than_its_time(pattern, monkeypatch):
    monkeypatch.setattr("coremerge_jax.io.patterns._SECONDS", 0.1)
    try:
        found = Patterns([pattern]).first("m." + "a" * 60 + "!")
    except ValueError:
        found = None  # refused, which is right as well
    assert found is None


def test_a_pattern_of_exponential_time_is_refused(monkeypatch):
    monkeypatch.setattr("coremerge_jax.io.patterns._SECONDS", 0.1)
    with pytest.raises(ValueError, match="takes too long; name the modules"):
        Patterns(["(a|a)+x"]).first("a" * 60)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "broken pattern '('"),
        ("[[:alpha:]]", "broken pattern"),
        ("a{99999999999}", "broken pattern"),
        ("(?i)a", "broken pattern"),
        (r"\p{L}", "broken pattern"),
        ("(a){e<=1}", "a brace that is no count"),
        ("((a{1000}){1000}){1000}", "counts above"),
        ("(?:(?:(?:a?){30}){30}){30}x", "counts above"),
        ("(" * 300 + "a" + ")+" * 300 + "x", "nested more than 6 deep"),
        ("a" * 2000, "pattern of 2000 characters"),
    ],
)
def test_patterns_that_are_refused(pattern, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        Patterns([pattern])
    assert len(str(caught.value)) < 400


def test_many_names_and_as_many_patterns():
    paths = [f"model.layers.{i}.q_proj" for i in range(300)]
    found = Patterns([path.replace(".", r"\.") for path in paths])
    assert all(found.first(path) == path.replace(".", r"\.") for path in paths)


def test_too_many_patterns_are_refused(monkeypatch):
    monkeypatch.setattr("coremerge_jax.io.patterns._COUNT", 10)
    with pytest.raises(ValueError, match="11; at most 10"):
        Patterns(f"layer{i}" for i in range(11))
