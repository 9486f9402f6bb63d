import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_adapters

import coremerge_jax as cm

BUILDS = {
    "weights": lambda x: (cm.tsv(), {"weights": x}),
    "weights of the rule": lambda x: (cm.ties(weights=x), {}),
    "parameter of the rule": lambda x: (cm.cart(rank=2, scale=x[0]), {}),
    "scale": lambda x: (cm.tsv(), {"scale": {"*.p": x[0], "*": x[1]}}),
}


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_gradients_in_parameters_while_the_adapters_are_constants(build):
    adapters = random_adapters({"x.p": (9, 7), "x.q": (9, 7)}, (2, 3, 3), dtype="float32")

    def loss(x):
        rule, options = build(x)
        merged = cm.merge(adapters, rule, **options)
        return sum(jnp.sum(lora.dense() ** 2) for lora in merged.values())

    x = jnp.asarray([0.8, 1.1, 0.9])
    gradient = jax.jit(jax.grad(loss))(x)
    step = jnp.full(3, 0.02)
    expected = (loss(x + step) - loss(x - step)) / 2
    assert gradient.dtype == x.dtype
    np.testing.assert_allclose(jnp.vdot(gradient, step), expected, rtol=1e-2)
