"""Keras layers with LoRA: their own forward passes are the oracle."""

import os

import jax
import numpy as np
import pytest
from helpers import distance

import coremerge_jax as cm

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")]

WIDTH, RANK, ALPHA = 6, 2, 8.0
RNG = np.random.default_rng(0)
FLOATS = RNG.standard_normal((5, WIDTH)).astype(np.float32)
TOKENS = np.arange(7)


@pytest.fixture
def keras():
    os.environ["KERAS_BACKEND"] = "jax"
    with jax.numpy_rank_promotion("allow"):
        yield pytest.importorskip("keras")


def layer(keras, kind):
    """A layer whose factors have values, and an input."""
    layers = {
        "dense": (keras.layers.Dense(4), FLOATS),
        "einsum": (keras.layers.EinsumDense("bd,ndh->bnh", output_shape=(3, 4)), FLOATS),
        "embedding": (keras.layers.Embedding(7, WIDTH), TOKENS),
    }
    found, x = layers[kind]
    found.build(x.shape)
    found.enable_lora(RANK, lora_alpha=ALPHA)
    for weight in found.weights:
        weight.assign(RNG.standard_normal(weight.shape).astype(np.float32))
    return found, x


def tree(layer, factors):
    """The weights of a layer by their paths in Keras."""
    weights = {weight.path: weight.numpy() for weight in layer.weights}
    return {path: value for path, value in weights.items() if ("lora_" in path) == factors}


@pytest.mark.parametrize("kind", ["dense", "einsum", "embedding"])
def test_update_is_what_the_layer_adds(keras, kind):
    module, x = layer(keras, kind)
    with_update = module(x)
    adapter = cm.from_tree(tree(module, factors=True), alpha=ALPHA)
    assert list(adapter) == [module.name]
    assert adapter[module.name].rank == RANK
    folded = cm.fold_tree(tree(module, factors=False), adapter)
    for weight in module.weights:
        value = folded.get(weight.path)
        weight.assign(np.zeros(weight.shape) if value is None else value)
    assert distance(np.asarray(module(x)), np.asarray(with_update)) < 1e-6


@pytest.mark.parametrize("kind", ["dense", "einsum", "embedding"])
def test_peft_and_back_changes_no_bit(keras, kind, tmp_path):
    factors = tree(layer(keras, kind)[0], factors=True)
    cm.save_peft(cm.from_tree(factors, alpha=ALPHA), tmp_path / "peft")
    back = cm.to_tree(cm.load_peft(tmp_path / "peft"), factors, alpha=ALPHA)
    for key, value in factors.items():
        np.testing.assert_array_equal(back[key], value)
