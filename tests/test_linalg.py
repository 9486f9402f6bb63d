import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import orthogonal
from hypothesis import given
from hypothesis import strategies as st

from coremerge_jax import linalg

SPECTRA = {
    "distinct": [3.0, 2.0, 1.0, 0.5],
    "coinciding": [2.0, 2.0, 2.0, 1.0],
    "rank-deficient": [3.0, 1.0, 0.0, 0.0],
    "coinciding and rank-deficient": [2.0, 2.0, 0.0, 0.0],
}
SHAPES = [(4, 4), (4, 7), (7, 4)]
spectra = pytest.mark.parametrize("s", SPECTRA.values(), ids=SPECTRA.keys())
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def matrix(s, shape, seed=0):
    rng = np.random.default_rng(seed)
    left, right = (orthogonal(rng, size)[:, : len(s)] for size in shape)
    return (left * np.asarray(s)) @ right.T


@shapes
@spectra
def test_svd_is_one(s, shape):
    x = matrix(s, shape)
    with jax.enable_x64(True):
        u, values, vt = linalg.svd(jnp.asarray(x))
        np.testing.assert_allclose(values, s, atol=1e-12)
        np.testing.assert_allclose((u * values[None]) @ vt, x, atol=1e-12)


MAPS = {
    "isotropic": linalg.isotropic,
    "truncate": lambda x: linalg.truncate(x, 1)[0],
    "partial isometry": lambda x: linalg.truncate(x, 9)[1],
    "inverse square root": lambda x: linalg.inverse_sqrt(linalg.matmul(x, x.T)),
}


@shapes
@spectra
@pytest.mark.parametrize("name", MAPS)
def test_derivatives_are_those_of_finite_differences(name, s, shape):
    """Along curves on which the rank stays the same; elsewhere these maps are not continuous."""
    if name == "truncate" and s[0] == s[1]:
        pytest.skip("truncation between coinciding singular values is not differentiable")
    fn, rng = MAPS[name], np.random.default_rng(1)
    x = matrix(s, shape)
    # x moves to (1 + hX) x (1 + hY): any first-order change that keeps the rank.
    left, right = (rng.standard_normal((size, size)) for size in shape)

    def curve(h):
        return jnp.asarray((np.eye(shape[0]) + h * left) @ x @ (np.eye(shape[1]) + h * right))

    with jax.enable_x64(True):
        step = 1e-6
        difference = (fn(curve(step)) - fn(curve(-step))) / (2 * step)
        _, tangent = jax.jvp(fn, (curve(0),), (jnp.asarray(left @ x + x @ right),))
        scale = np.linalg.norm(difference)
        assert np.linalg.norm(tangent - difference) <= 1e-6 * max(scale, 1)


@shapes
@spectra
def test_forward_and_reverse_derivatives_agree(s, shape):
    rng = np.random.default_rng(2)
    x, tangent, cotangent = matrix(s, shape), rng.standard_normal(shape), rng.standard_normal(shape)
    with jax.enable_x64(True):
        value, forward = jax.jvp(linalg.isotropic, (jnp.asarray(x),), (jnp.asarray(tangent),))
        (reverse,) = jax.vjp(linalg.isotropic, jnp.asarray(x))[1](jnp.asarray(cotangent))
        assert np.isfinite(value).all()
        np.testing.assert_allclose(np.vdot(forward, cotangent), np.vdot(reverse, tangent))


def test_truncation_keeps_what_it_cannot_tell_apart():
    x = jnp.diag(jnp.array([3.0, 2.0, 2.0, 1.0]))
    np.testing.assert_allclose(linalg.truncate(x, 2)[0], jnp.diag(jnp.array([3.0, 2, 2, 0])))


@given(
    x=st.lists(st.floats(0, 2.0**99, width=32), min_size=1, max_size=30),
    k=st.integers(0, 30),
    dtype=st.sampled_from(["float32", "float64", "float16"]),
)
def test_kth_smallest_is_that_of_a_sort(x, k, dtype):
    x = np.minimum(np.asarray(x), 6e4).astype(dtype)
    with jax.enable_x64(True):
        found = linalg.kth_smallest(jnp.asarray(x), jnp.asarray(k, jnp.int32))
    if k <= len(x):
        assert found == (np.sort(x)[k - 1] if k else 0)
