"""The page of rules and spaces lists all of them, as the code has them."""

import dataclasses
import re

import pytest
from pages import DOCS

from coremerge_jax.rules import RULES
from coremerge_jax.spaces import SPACES

TEXT = (DOCS / "rules.md").read_text(encoding="utf-8")


def anchor_of(title):
    return title.replace("`", "").replace(" ", "-").lower()


def sections():
    """The text under each heading of the third level, by its anchor."""
    _, *parts = re.split(r"^### (.*)\n", TEXT, flags=re.MULTILINE)
    titles, texts = parts[::2], parts[1::2]
    return dict(zip(map(anchor_of, titles), texts, strict=True))


def table(text):
    """By name: the anchor and the further cells of each row."""
    for line in text.splitlines():
        link, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if found := re.fullmatch(r"\[`(\w+)`\]\(#(.+)\)", link):
            yield found[1], (found[2], *cells)


RULE_ROWS, SPACE_ROWS = (dict(table(text)) for text in TEXT.split("\n## Spaces\n"))


def test_the_table_has_every_rule():
    assert list(RULE_ROWS) == list(RULES)
    for name, (*_, kind, place) in RULE_ROWS.items():
        assert RULES[name].equivariance.name.lower() == kind, name
        assert getattr(RULES[name], "place", "at") == place, name


def test_the_table_has_every_space():
    assert list(SPACE_ROWS) == list(SPACES)
    for name, (*_, lossless) in SPACE_ROWS.items():
        assert SPACES[name].lossless == (lossless == "yes"), name


@pytest.mark.parametrize("name", [*RULES, *SPACES])
def test_parameters_and_defaults_are_told(name):
    anchor, *_ = (RULE_ROWS | SPACE_ROWS)[name]
    text = sections()[anchor]
    numbers = {float(x) for x in re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?:e-?\d+)?", text)}
    for field in dataclasses.fields((RULES | SPACES)[name]):
        assert f"`{field.name}`" in text, field.name
        if isinstance(field.default, int | float) and not isinstance(field.default, bool):
            assert field.default in numbers, field.name
