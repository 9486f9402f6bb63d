import jax
import jax.numpy as jnp
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


def test_traced_factors_are_cut_to_a_rank_alike():
    (adapter,) = random_adapters(SHAPES, [5], dtype="float32")
    expected, shares = cm.truncate(adapter, rank=2)
    cut, kept = jax.jit(lambda adapter: cm.truncate(adapter, rank=2))(adapter)
    for path, lora in expected.items():
        assert cut[path].rank == 2
        assert distance(dense(cut[path]), dense(lora)) < 1e-5
        np.testing.assert_allclose(
            cut[path].b.T @ cut[path].b, cut[path].a @ cut[path].a.T, atol=1e-4
        )
        np.testing.assert_allclose(kept[path], shares[path], rtol=1e-5)
    zero, kept = jax.jit(lambda adapter: cm.truncate(adapter, rank=9))(
        jax.tree.map(np.zeros_like, adapter)
    )
    assert not dense(zero["q"]).any()
    assert kept["q"] == 1


def test_the_energy_of_traced_factors_is_refused():
    (adapter,) = random_adapters(SHAPES, [5], dtype="float32")
    with pytest.raises(cm.UnsupportedError, match=r"energy=0.9 with traced factors: .* give rank="):
        jax.jit(lambda adapter: cm.truncate(adapter, energy=0.9))(adapter)


def test_derivatives_of_a_cut_are_those_of_the_update():
    (adapter,), (way,) = (random_adapters({"q": (6, 5)}, [4], seed) for seed in (0, 1))
    probe = np.random.default_rng(2).standard_normal((6, 5))

    def loss(adapter):
        cut, kept = cm.truncate(adapter, rank=2)
        return jnp.vdot(cut["q"].dense(), jnp.asarray(probe)) + kept["q"]

    def dense_loss(x):
        u, s, vt = np.linalg.svd(x)
        kept = np.sum(s[:2] ** 2) / np.sum(s**2)
        return np.vdot((u[:, :2] * s[:2]) @ vt[:2], probe) + kept

    with jax.enable_x64(True):
        slope, gradient = jax.jit(lambda x, d: (jax.jvp(loss, (x,), (d,))[1], jax.grad(loss)(x)))(
            adapter, way
        )
    step = 1e-6
    ends = [
        dense_loss(dense(jax.tree.map(lambda x, d, h=h: x + h * d, adapter, way)["q"]))
        for h in (step, -step)
    ]
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / (2 * step), rtol=1e-6)
    products = jax.tree.map(np.vdot, gradient, way)
    np.testing.assert_allclose(sum(jax.tree.leaves(products)), slope, rtol=1e-9)
