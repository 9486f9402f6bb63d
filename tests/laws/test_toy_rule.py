"""A rule that is defined here, once it is in `RULES`, is a rule like every other."""

import json

import commands
import flax.struct
import jax.numpy as jnp
import numpy as np
import pytest
from cases import SPECTRAL, Case, of_updates
from helpers import KEY, dense, plain_stream, random_adapters
from test_invariants import PLACES, RANKS, laws_of

import coremerge_jax as cm
from coremerge_jax import rules
from coremerge_jax.recipe import format_rule, parse_rule
from coremerge_jax.rules import Equivariance, Rule
from coremerge_jax.rules.rule import dense as dense_cores

pytestmark = pytest.mark.wide


@flax.struct.dataclass(kw_only=True)
class Toy(Rule):
    """Multiplies the sum of all updates by a number."""

    equivariance = Equivariance.ORTHOGONAL
    gain: float = 2.0

    def merge(self, cores, *, key, context):
        del key, context
        return self.gain * jnp.sum(dense_cores(cores), axis=0)


TOY = Case(
    "toy",
    Toy(gain=3.0),
    SPECTRAL,
    of_updates(lambda x: 3.0 * sum(x)),
    zero_is_absent=True,
)


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setitem(rules.RULES, "toy", Toy)


def test_its_text_is_read_and_written():
    assert parse_rule("toy:gain=3") == Toy(gain=3)
    assert parse_rule(format_rule(Toy(gain=3.0))) == Toy(gain=3.0)
    with pytest.raises(cm.RecipeError, match="gain"):
        parse_rule("toy:loss=3")


def test_the_command_line_has_it(tmp_path, capsys):
    adapters = random_adapters({"q": (8, 6)}, (2, 3), dtype="float32")
    paths = [tmp_path / str(t) for t in range(len(adapters))]
    for adapter, path in zip(adapters, paths, strict=True):
        cm.save_peft(adapter, path)
    assert commands.run("rules", "--json") == 0
    assert json.loads(capsys.readouterr().out)["rules"]["toy"]["parameters"] == {"gain": 2.0}
    merge = ["merge", *paths, "-o", tmp_path / "out", "--rule", "toy:gain=3", "--scale", "1"]
    assert commands.run(*merge, "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["cost"]["programs"] == 1
    assert commands.run(*merge) == 0
    merged = cm.load_peft(tmp_path / "out")["q"]
    expected = 3 * sum(dense(adapter["q"]) for adapter in adapters)
    np.testing.assert_allclose(dense(merged), expected, atol=1e-5)
    assert commands.run("verify", tmp_path / "out") == 0


def test_it_has_a_cost_and_is_projected():
    adapters = random_adapters({"q": (8, 6)}, (2, 3))
    (cost,) = plain_stream(adapters, TOY.rule).costs()
    assert cost.work > 0
    merged = cm.project(adapters).merge(TOY.rule, scale=1.0, key=KEY)
    np.testing.assert_allclose(dense(merged["q"]), TOY.definition([x["q"] for x in adapters]))


def test_its_row_is_under_all_laws_of_its_kind():
    checked = set()
    for law, space, ranks in laws_of(TOY):
        if space in PLACES and ranks == RANKS[0]:
            law.check(TOY, PLACES[space], ranks, seed=0)
            checked.add(law.check.__name__)
    assert {"order_of_adapters_is_irrelevant", "equals_its_definition"} < checked
    assert len(checked) > 10
