import numpy as np
import pytest
from helpers import dense, distance, random_adapters
from hypothesis import given
from hypothesis import strategies as st

import coremerge_jax as cm

SHAPES = {"q": (12, 9), "v": (6, 9)}


@pytest.mark.parametrize("rank", [1, 3, 50])
@given(seed=st.integers(0, 2**31))
def test_is_the_best_approximation(seed, rank):
    """Equal to a cut of the dense update's own decomposition, and its energy is what is left."""
    (adapter,) = random_adapters(SHAPES, [8], seed)
    cut, kept = cm.truncate(adapter, rank=rank)
    for path, lora in cut.items():
        u, s, vt = np.linalg.svd(dense(adapter[path]), full_matrices=False)
        assert lora.rank == min(rank, 8, *lora.shape)
        assert distance(dense(lora), (u[:, :rank] * s[:rank]) @ vt[:rank]) < 1e-10
        np.testing.assert_allclose(kept[path], np.sum(s[:rank] ** 2) / np.sum(s**2))
        np.testing.assert_allclose(lora.b.T @ lora.b, lora.a @ lora.a.T, atol=1e-9)


@pytest.mark.parametrize("energy", [0.3, 0.9, 1.0])
@given(seed=st.integers(0, 2**31))
def test_keeps_the_energy_with_the_fewest_directions(seed, energy):
    (adapter,) = random_adapters(SHAPES, [5], seed)
    cut, kept = cm.truncate(adapter, energy=energy)
    for path, lora in cut.items():
        s = np.linalg.svd(dense(adapter[path]), compute_uv=False)
        assert kept[path] >= energy * (1 - 1e-12)
        assert np.sum(s[: lora.rank - 1] ** 2) < energy * np.sum(s**2)


def test_a_zero_update_keeps_one_direction():
    adapter = cm.Adapter({"q": cm.LoRA(a=np.zeros((3, 4)), b=np.zeros((5, 3)))})
    cut, kept = cm.truncate(adapter, energy=0.9)
    assert (cut["q"].rank, kept["q"]) == (1, 1.0)


def test_keeps_what_is_not_a_module():
    (adapter,) = random_adapters(SHAPES, [5])
    adapter = adapter.replace(extras={"head": np.ones(2)})
    cut, _ = cm.truncate(adapter, rank=2)
    assert list(cut) == list(adapter)
    assert cut.metadata == adapter.metadata
    assert list(cut.extras) == ["head"]


@pytest.mark.parametrize("budget", [{}, {"rank": 0}, {"energy": 0.0}, {"energy": 1.1}])
def test_refuses_an_impossible_budget(budget):
    (adapter,) = random_adapters(SHAPES, [5])
    with pytest.raises(ValueError, match=r"expected|needs"):
        cm.truncate(adapter, **budget)
