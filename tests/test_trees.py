"""Trees of parameters to adapters and back."""

import numpy as np
import pytest

import coremerge_jax as cm


def qwix_tree(rank, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "layers": {
            str(i): {
                "w_lora_a": rng.standard_normal((8, rank)).astype(np.float32),
                "w_lora_b": rng.standard_normal((rank, 6)).astype(np.float32),
            }
            for i in range(2)
        }
    }


def test_factors_have_the_rank_that_the_scale_is_of():
    """qwix's alpha is of one rank: others would silently have another scale."""
    tree = qwix_tree(rank=2)
    adapter = cm.from_tree(tree, alpha=8)
    merged = cm.merge([adapter, cm.from_tree(qwix_tree(2, seed=1), alpha=8)], cm.mean())
    with pytest.raises(cm.MismatchError, match=r"'layers\.0' has rank 4, .* alpha / 2; truncate"):
        cm.to_tree(merged, tree, alpha=8)
    larger = cm.to_tree(merged, tree, alpha=8, rank=4)
    smaller = cm.to_tree(cm.truncate(merged, rank=1)[0], tree, alpha=8)
    assert smaller["layers"]["0"]["w_lora_a"].shape == (8, 2)
    for again, expected in (
        (cm.from_tree(larger, alpha=8), merged),
        (cm.from_tree(smaller, alpha=8), cm.truncate(merged, rank=1)[0]),
    ):
        for path, lora in expected.items():
            np.testing.assert_allclose(again[path].dense(), lora.dense(), rtol=1e-5, atol=1e-6)
