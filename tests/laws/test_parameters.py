"""Parameters of rules and spaces: what is out of range is refused where it is given."""

import dataclasses

import numpy as np
import pytest
from cases import CASES, SPACES, WITH_INPUTS, WITHOUT_INPUTS

import coremerge_jax as cm
from coremerge_jax import rules, spaces

pytestmark = pytest.mark.wide

NEVER = [float("nan"), float("inf"), -float("inf"), "0.5", 1j, np.float32("nan"), [1], 2**31]
WORDS = {"elect", "reduce", "scope", "gauge", "scaled", "weights"}
MADE = {**rules.RULES, **spaces.SPACES}
EVERY = [(name, field.name) for name, make in MADE.items() for field in dataclasses.fields(make)]


@pytest.mark.parametrize(("name", "field"), EVERY, ids=map(".".join, EVERY))
def test_what_is_out_of_range_is_refused(name, field):
    values = (CASES | SPACES | WITH_INPUTS)[name].refused.get(field, [])
    assert values or field in WORDS, "a parameter without a test"
    for value in [*values, *([] if field in WORDS else NEVER)]:
        with pytest.raises(cm.RecipeError, match=rf"{field}.*: expected"):
            MADE[name](**{field: value})


def test_what_is_in_range_is_taken():
    cm.core(rtol=0)
    cm.tsv(rank=np.int64(2))
    cm.cart(rank=np.int32(2), scale=-1)
    cm.flatten(power=0)
    cm.ties(density=np.float32(0.5), weights=(1, 0.5))
    cm.tucker(rank=1, beta=0, iterations=1, tolerance=0)


def test_every_rule_and_space_has_a_row():
    """The row says which laws, definitions and derivatives are tested."""
    assert set(rules.RULES) <= set(CASES) | set(WITH_INPUTS)
    assert set(spaces.SPACES) <= set(SPACES)
    for name, make in WITHOUT_INPUTS.items():
        assert isinstance(CASES[name].rule, make), name
        assert CASES[name].definition or CASES[name].kind, name
