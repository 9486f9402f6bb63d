"""Core space with balanced factors: what is merged is a function of the updates alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    assert_same,
    distance,
    map_factors,
    modules,
    orthogonal,
    plain_merge,
    random_adapters,
)

import coremerge_jax as cm

BALANCED = cm.core(gauge="balanced")
SHAPES = modules((16, 12))
RULES = {"ties": cm.ties(density=0.4), "sce": cm.sce(density=0.4), "prune": cm.prune(density=0.3)}


def regauged(adapters, seed):
    rng = np.random.default_rng(seed)

    def change(a, b):
        gauge = orthogonal(rng, len(a)) * rng.uniform(0.5, 2, (len(a), 1))
        return gauge @ a, b @ np.linalg.inv(gauge)

    return map_factors(adapters, change)


@pytest.mark.wide
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("ranks", [(2, 4, 2), (6, 5, 6)], ids=str)
def test_only_the_update_matters(name, seed, ranks):
    adapters = random_adapters(SHAPES, ranks, seed)
    merged = plain_merge(adapters, RULES[name], space=BALANCED)
    assert_same(plain_merge(regauged(adapters, seed), RULES[name], space=BALANCED), merged, 1e-8)


def test_balanced_factors_are_already_balanced(seed):
    adapters = random_adapters(SHAPES, (2, 3), seed)

    def balance(a, b):
        u, s, vt = np.linalg.svd(b @ a, full_matrices=False)
        root = np.sqrt(s[: len(a)])
        return root[:, None] * vt[: len(a)], u[:, : len(a)] * root

    given_ = plain_merge(map_factors(adapters, balance), cm.ties(density=0.4))
    assert_same(plain_merge(adapters, cm.ties(density=0.4), space=BALANCED), given_, 1e-8)


def test_spectral_rules_do_not_care():
    adapters = random_adapters({"x": (16, 12)}, (2, 3))
    merged = plain_merge(adapters, cm.tsv())
    assert_same(plain_merge(adapters, cm.tsv(), space=BALANCED), merged, 1e-12)
    with pytest.raises(ValueError, match="gauge='x': expected 'given' or 'balanced'"):
        cm.core(gauge="x")


@pytest.mark.wide
def test_derivative():
    (one, two) = random_adapters({"x": (8, 7)}, (2, 3))
    with jax.enable_x64(True):
        rule = cm.ties(density=0.5)

        @jax.jit
        def merged(scale):
            loras = [one["x"], cm.LoRA(a=two["x"].a * scale, b=two["x"].b)]
            a = jnp.concatenate([lora.a for lora in loras])
            b = jnp.concatenate([lora.b for lora in loras], axis=1)
            return BALANCED.project(a, b, (2, 3)).merge(rule).dense()

        _, found = jax.jit(lambda x: jax.jvp(merged, (x,), (1.0,)))(1.0)
        step = 1e-6
        expected = (merged(1 + step) - merged(1 - step)) / (2 * step)
        assert distance(np.asarray(found), np.asarray(expected)) < 1e-5
