import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_adapters

import coremerge_jax as cm


def test_adapter_is_a_mapping_in_order():
    (adapter,) = random_adapters({"z": (3, 4), "a": (5, 4)}, [2])
    assert list(adapter) == ["z", "a"]
    assert adapter["a"].shape == (5, 4)
    assert "z" in adapter
    assert len(adapter) == 2
    assert repr(adapter) == "Adapter('task0', 2 modules, rank 2)"


def test_adapter_is_a_pytree_in_order():
    (adapter,) = random_adapters({"z": (3, 4), "a": (5, 4)}, [2])
    adapter = adapter.replace(extras={"head": np.ones(2)})
    doubled = jax.tree.map(lambda x: 2 * x, adapter)
    assert list(doubled) == ["z", "a"]
    assert doubled.metadata == adapter.metadata
    np.testing.assert_array_equal(doubled["z"].a, 2 * adapter["z"].a)
    np.testing.assert_array_equal(doubled.extras["head"], 2 * np.ones(2))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(adapter)]
    assert paths == ["['z'].a", "['z'].b", "['a'].a", "['a'].b", "['head']"]


def test_adapter_passes_through_jit_and_abstract_evaluation():
    (adapter,) = random_adapters({"z": (3, 4)}, [2], dtype="float32")
    out = jax.jit(lambda adapter: adapter)(adapter)
    np.testing.assert_array_equal(out["z"].b, adapter["z"].b)
    assert jax.eval_shape(lambda adapter: adapter["z"].dense(), adapter).shape == (3, 4)


def test_dense_is_the_product():
    lora = cm.LoRA(a=jnp.ones((2, 3), jnp.bfloat16), b=jnp.full((4, 2), 0.5))
    np.testing.assert_array_equal(lora.dense(), np.ones((4, 3)))
    assert (lora.rank, lora.shape, lora.dtype) == (2, (4, 3), jnp.float32)


@pytest.mark.parametrize(
    ("a", "b"), [((2, 3), (4, 3)), ((5, 2, 3), (4, 2)), ((5, 2, 3), (6, 4, 2))]
)
def test_factors_must_fit(a, b):
    with pytest.raises(cm.FormatError, match="do not fit"):
        cm.LoRA(a=np.ones(a), b=np.ones(b))


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({}, "no modules"),
        ({"q": np.ones((2, 2))}, "'q': expected a LoRA, got ndarray"),
        ({"q": cm.LoRA(a=np.ones((1, 2, 3)), b=np.ones((1, 4, 2)))}, "'q': factors must be"),
        ({"q": cm.LoRA(a=np.ones(3), b=np.ones(3))}, "'q': factors must be matrices"),
    ],
)
def test_adapters_are_checked_when_made(modules, message):
    with pytest.raises(cm.FormatError, match=message):
        cm.Adapter(modules)
