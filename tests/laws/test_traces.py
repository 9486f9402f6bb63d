"""Merges of one signature are one program, whatever the numbers: a second one compiles nothing."""

import jax
import numpy as np
import pytest
from helpers import modules, plain_merge, random_adapters

import coremerge_jax as cm

SHAPES, RANKS = modules((16, 12)), (2, 4, 2)
# A rule, and the same with other numbers.
RULES = {
    "mean": (cm.mean(), cm.mean()),
    "task_arithmetic": (
        cm.task_arithmetic(weights=(1.0, 0.5, 2.0)),
        cm.task_arithmetic(weights=(0.1, 0.2, 0.3)),
    ),
    "ties": (cm.ties(density=0.4), cm.ties(density=0.7)),
    "tsv of a rank": (cm.tsv(rank=2), cm.tsv(rank=1)),
    "cart": (cm.cart(rank=2, scale=0.7), cm.cart(rank=1, scale=0.5)),
    "svc": (cm.svc(alpha=0.5), cm.svc(alpha=0.7)),
    "dare|ties": (
        cm.chain(cm.dare(drop=0.3), cm.ties()),
        cm.chain(cm.dare(drop=0.5), cm.ties(density=0.9)),
    ),
    "ties of the model": (
        cm.ties(density=0.4, scope="model"),
        cm.ties(density=0.7, scope="model"),
    ),
}


@pytest.fixture
def compiled():
    """The seconds of each program that is compiled, or found in the cache on disk."""
    seconds = []

    def listen(name, duration, **_):
        if name == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seconds
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("name", RULES)
def test_a_second_merge_compiles_nothing(compiled, name):
    first, second = RULES[name]
    one, other = (random_adapters(SHAPES, RANKS, seed) for seed in (0, 1))
    options = {"weights": [1.0, 1.0, 1.0], "scale": 1.0, "key": jax.random.key(0)}
    merged = plain_merge(one, first, **options)
    before = len(compiled)
    changed = {"weights": [1.0, 0.5, 2.0], "scale": {"x0": 2.0, "*": 0.5}}
    again = plain_merge(other, second, **changed, key=jax.random.key(1))
    assert len(compiled) == before
    assert np.any(np.asarray(again["x0"].b) != np.asarray(merged["x0"].b))


@pytest.mark.parametrize(("rule", "programs"), [("tsv", 1), ("mean", 2)])
def test_a_recipe_of_one_signature_compiles_no_more_than_its_merge(compiled, rule, programs):
    # At the automatic scale, the mean takes a second program, for a norm.
    jax.clear_caches()
    cm.recipe.Recipe(rules=(rule,)).run(random_adapters(SHAPES, RANKS, 0))
    assert len(compiled) == programs


@pytest.mark.parametrize("name", ["ties", "tsv of a rank", "dare|ties"])
def test_a_second_merge_of_a_projection_compiles_nothing(compiled, name):
    projected = cm.project(random_adapters(SHAPES, RANKS))
    first, second = RULES[name]
    projected.merge(first, scale=1.0, key=jax.random.key(0))
    before = len(compiled)
    projected.merge(second, scale=0.5, key=jax.random.key(1))
    assert len(compiled) == before


def test_a_program_a_signature(compiled):
    """As many programs as shapes and ranks, however many modules there are."""
    shapes = {f"{kind}{i}": (14, 10 + j) for j, kind in enumerate("qv") for i in range(4)}
    adapters = random_adapters(shapes, (2, 3))
    plain_merge(adapters, cm.mean())
    assert len(compiled) == 2
