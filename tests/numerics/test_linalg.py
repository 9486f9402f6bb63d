import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import narrow, orthogonal
from hypothesis import given
from hypothesis import strategies as st

from coremerge_jax import linalg
from coremerge_jax.linalg import lapack

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


def conditioned(rng, shape, condition):
    return matrix(np.geomspace(1, 1 / condition, min(shape)), shape, rng.integers(99))


# Small matrices are decomposed directly, larger ones through their Gram matrices where these are
# precise enough: see linalg.
CONDITIONS = [1.5, 1e3, 1e6, 1e8]
SIZES = [(6, 4), (4, 6), (70, 40), (40, 70)]
sizes = pytest.mark.parametrize("shape", SIZES, ids=str)
conditions = pytest.mark.parametrize("condition", CONDITIONS)
kinds = pytest.mark.parametrize("singular", [True, False], ids=["singular", "any"])


@functools.cache
def whole_basis(singular):
    @jax.jit
    def fn(x):
        found, *rest = linalg.basis(x, 1e-12, singular=singular)
        return found.columns(), *rest

    return fn


@sizes
@conditions
@kinds
def test_a_basis_is_orthonormal_and_spans(singular, condition, shape):
    x = conditioned(np.random.default_rng(0), shape, condition)
    with jax.enable_x64(True):
        u, coordinates, size, spread = map(np.asarray, whole_basis(singular)(jnp.asarray(x)))
        noise = 1e-15 * condition + 1e-8 * (condition < 1e4)
        np.testing.assert_allclose(u.T @ u, np.eye(len(u.T)), atol=100 * noise)
        np.testing.assert_allclose(u @ coordinates, x, atol=1e-12)
        np.testing.assert_allclose(u.T @ x, coordinates, atol=100 * noise)
        assert size == min(shape)
        assert 1 <= spread <= 1.01 * condition
        if singular:
            squares = coordinates @ coordinates.T
            np.testing.assert_allclose(squares, np.diag(np.diagonal(squares)), atol=1e-10)
            assert (np.diff(np.diagonal(squares)) <= 0).all()


@kinds
@pytest.mark.parametrize("shape", [(70, 40), (40, 70), (6, 4)], ids=str)
def test_a_basis_ends_at_the_numerical_rank(singular, shape):
    x = matrix([3.0, 2.0, 1.0], shape)
    with jax.enable_x64(True):
        u, coordinates, size, _ = map(np.asarray, whole_basis(singular)(jnp.asarray(x)))
        assert size == 3
        np.testing.assert_array_equal(u[:, 3:], 0)
        np.testing.assert_array_equal(coordinates[3:], 0)
        np.testing.assert_allclose(u @ coordinates, x, atol=1e-12)


def test_a_batch_is_merged_as_its_matrices_are():
    """Some of a batch take the fast way and some the robust one, at two levels of vmap."""
    rng = np.random.default_rng(0)
    x = np.stack([conditioned(rng, (60, 40), c) for c in (2, 1e7, 10, 1e3)]).reshape(2, 2, 60, 40)
    with jax.enable_x64(True):
        for fn in (lambda x: whole_basis(True)(x)[1], linalg.isotropic, linalg.polar):
            fn = jax.jit(fn)
            batched = jax.jit(jax.vmap(jax.vmap(fn)))(jnp.asarray(x))
            for i in np.ndindex(2, 2):
                single = fn(jnp.asarray(x[i]))
                np.testing.assert_allclose(abs(batched[i]), abs(single), atol=1e-9)


@jax.jit
def spectral_maps(x):
    return linalg.polar(x), linalg.isotropic(x), linalg.truncate(x, 2)[0]


@sizes
@conditions
def test_spectral_maps_are_those_of_the_singular_values(condition, shape):
    x = conditioned(np.random.default_rng(0), shape, condition)
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    with jax.enable_x64(True):
        found = jax.device_get(spectral_maps(jnp.asarray(x)))
    expected = u @ vt, s.mean() * u @ vt, (u[:, :2] * s[:2]) @ vt[:2]
    for one, other in zip(found, expected, strict=True):
        assert np.linalg.norm(one - other) <= 1e-6 * np.linalg.norm(other)


@jax.jit
def isotropic_maps(x, tangent):
    """Maps a factored matrix, and the same as a dense one; with derivatives."""
    dense = lambda x: linalg.isotropic(x.dense())  # noqa: E731
    return jax.jvp(linalg.isotropic, (x,), (tangent,)), jax.jvp(dense, (x,), (tangent,))


@pytest.mark.parametrize("overlap", [0.0, 0.5, 1.0])
def test_factored_matrices_are_mapped_as_dense_ones(overlap):
    """Also where the factors are not orthonormal, so that the blocks tell nothing."""
    rng = np.random.default_rng(0)
    left, right = orthogonal(rng, 8)[:, :6], orthogonal(rng, 7)[:, :6]
    left = np.concatenate([left[:, :3], overlap * left[:, :3] + (1 - overlap) * left[:, 3:]], 1)
    blocks = rng.standard_normal((2, 3, 3))
    with jax.enable_x64(True):
        x = linalg.Factored(jnp.asarray(left), jnp.asarray(blocks), jnp.asarray(right))
        tangent = jax.tree.map(lambda y: jnp.asarray(rng.standard_normal(y.shape)), x)
        (value, found), (whole, expected) = isotropic_maps(x, tangent)
        np.testing.assert_allclose(value, whole, atol=1e-9)
        np.testing.assert_allclose(found, expected, atol=1e-6)


@kinds
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_derivatives_of_bases_are_those_of_finite_differences(singular, shape):
    """For functions of the basis that its choice does not change, and of singular vectors."""
    rng = np.random.default_rng(1)
    x, dx = conditioned(rng, shape, 3.0), rng.standard_normal(shape)
    y = rng.standard_normal((shape[0], 3))

    @jax.jit
    def fn(x):
        u, coordinates, _, _ = whole_basis(singular)(x)
        projected = linalg.matmul(u, linalg.matmul(u.T, jnp.asarray(y)))
        squares = linalg.matmul(coordinates, coordinates.T)
        return projected, jnp.diagonal(squares) if singular else linalg.matmul(u, coordinates)

    with jax.enable_x64(True):
        step = 1e-6
        ahead, back = fn(jnp.asarray(x + step * dx)), fn(jnp.asarray(x - step * dx))
        _, tangents = jax.jit(lambda *x: jax.jvp(fn, *x))((jnp.asarray(x),), (jnp.asarray(dx),))
        for one, other, tangent in zip(ahead, back, tangents, strict=True):
            difference = (one - other) / (2 * step)
            scale = max(np.linalg.norm(difference), 1)
            assert np.linalg.norm(tangent - difference) <= 1e-6 * scale


MAPS = {
    "isotropic": linalg.isotropic,
    "truncate": lambda x: linalg.truncate(x, 1)[0],
    "partial isometry": lambda x: linalg.truncate(x, 9)[1],
    "polar": linalg.polar,
}


@functools.cache
def programs(name):
    """The map, and its derivative at a point along a tangent."""
    fn = MAPS[name]
    return jax.jit(fn), jax.jit(lambda x, tangent: jax.jvp(fn, (x,), (tangent,))[1])


@shapes
@spectra
@pytest.mark.parametrize("name", MAPS)
def test_derivatives_are_those_of_finite_differences(name, s, shape):
    """Along curves on which the rank stays the same; elsewhere these maps are not continuous."""
    if name == "truncate" and s[0] == s[1]:
        pytest.skip("truncation between coinciding singular values is not differentiable")
    (fn, derivative), rng = programs(name), np.random.default_rng(1)
    x = matrix(s, shape)
    # x moves to (1 + hX) x (1 + hY): any first-order change that keeps the rank.
    left, right = (rng.standard_normal((size, size)) for size in shape)

    def curve(h):
        return jnp.asarray((np.eye(shape[0]) + h * left) @ x @ (np.eye(shape[1]) + h * right))

    with jax.enable_x64(True):
        step = 1e-6
        difference = (fn(curve(step)) - fn(curve(-step))) / (2 * step)
        tangent = derivative(curve(0), jnp.asarray(left @ x + x @ right))
        scale = np.linalg.norm(difference)
        assert np.linalg.norm(tangent - difference) <= 1e-6 * max(scale, 1)


@jax.jit
def forward_and_reverse(x, tangent, cotangent):
    value, forward = jax.jvp(linalg.isotropic, (x,), (tangent,))
    return value, forward, jax.vjp(linalg.isotropic, x)[1](cotangent)[0]


@shapes
@spectra
def test_forward_and_reverse_derivatives_agree(s, shape):
    rng = np.random.default_rng(2)
    x, tangent, cotangent = matrix(s, shape), rng.standard_normal(shape), rng.standard_normal(shape)
    with jax.enable_x64(True):
        given = map(jnp.asarray, (x, tangent, cotangent))
        value, forward, reverse = jax.device_get(forward_and_reverse(*given))
        assert np.isfinite(value).all()
        np.testing.assert_allclose(np.vdot(forward, cotangent), np.vdot(reverse, tangent))


def test_truncation_keeps_what_it_cannot_tell_apart():
    x = jnp.diag(jnp.array([3.0, 2.0, 2.0, 1.0]))
    np.testing.assert_allclose(linalg.truncate(x, 2)[0], jnp.diag(jnp.array([3.0, 2, 2, 0])))


@pytest.mark.parametrize("seed", [1427, 1897])
def test_svd_where_divide_and_conquer_fails(seed):
    """LAPACK's gesdd does not converge on these."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((200, 90)) * np.geomspace(1, 1e-3, 90)) @ rng.standard_normal(
        (90, 170)
    )
    with jax.enable_x64(True):
        u, s, v = jax.jit(lapack.svd)(jnp.asarray(x))
        np.testing.assert_allclose((u * s[None, :]) @ v.T, x, atol=1e-12)
        np.testing.assert_allclose(lapack.singular_values(jnp.asarray(x)), s, atol=1e-12)


def _polar_cases():
    """Yields names, singular values and shapes; each matrix is larger than `GRAM_SIZE`."""
    flat = np.linspace(0.9, 1, 80)
    yield "alike", flat, (80, 80)
    yield "one large", np.r_[1.7, flat[:79]], (80, 80)
    yield "condition 30", np.geomspace(1, 1 / 30, 80), (80, 80)
    yield "condition 1e6", np.geomspace(1, 1e-6, 80), (80, 80)
    yield "no full rank", np.r_[flat[:50], np.zeros(30)], (80, 80)
    yield "tall", flat, (120, 80)
    yield "wide", flat, (80, 300)
    yield "wide, no full rank", np.r_[flat[:50], np.zeros(30)], (80, 300)
    yield "wide, condition 1e6", np.geomspace(1, 1e-6, 80), (80, 300)
    yield "zero", np.zeros(80), (80, 90)


@pytest.mark.parametrize(
    ("dtype", "s", "shape"),
    [
        pytest.param(dtype, s, shape, id=f"{name}, {dtype}")
        for name, s, shape in _polar_cases()
        for dtype in ("float32", "float64")
        if dtype == "float64" or "1e6" not in name  # in float32, that is noise
    ],
)
def test_polar_factors_are_those_of_the_singular_vectors(dtype, s, shape):
    (p, q), rng = shape, np.random.default_rng(0)
    u, v = orthogonal(rng, p)[:, :80], orthogonal(rng, q)[:, :80]
    live = s > 0
    with jax.enable_x64(True):
        x = jnp.asarray((u * s) @ v.T, dtype)
        found = np.asarray(jax.jit(linalg.polar)(x), np.float64)
    least = s[live].min() if live.any() else 1
    expected = u[:, live] @ v[:, live].T
    assert np.abs(found - expected).max() < 200 * float(jnp.finfo(dtype).eps) / least


def test_polar_factors_where_the_power_method_misses_the_largest_singular_value():
    """Its vector is orthogonal to the start; the polar factor of a definite matrix is 1."""
    x = np.eye(80)
    root_sum, root_difference = np.sqrt(0.1), np.sqrt(1.9)
    x[:2, :2] = [[root_sum + root_difference, root_sum - root_difference]] * 2
    x[1, :2] = x[1, 1::-1]
    x[:2, :2] /= 2
    with jax.enable_x64(True):
        found = jax.jit(linalg.polar)(jnp.asarray(x))
    np.testing.assert_allclose(found, np.eye(80), atol=1e-12)


every_kth_smallest = jax.jit(jax.vmap(linalg.kth_smallest, (None, 0)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("size", [1, 12])
@given(data=st.data())
def test_kth_smallest_is_that_of_a_sort(size, dtype, data):
    """Holds for any nonnegative floats: subnormal ones, equal ones and infinity among them."""
    unsigned = f"uint{8 * jnp.dtype(dtype).itemsize}"
    infinity = int(np.asarray(np.inf, jnp.dtype(dtype)).view(unsigned))
    bits = st.integers(0, infinity) | st.sampled_from([0, 1, infinity])
    drawn = data.draw(st.lists(bits, min_size=size, max_size=size))
    x = np.asarray(drawn, unsigned).view(jnp.dtype(dtype))
    with jax.enable_x64(True):
        found = every_kth_smallest(jnp.asarray(x), jnp.arange(size + 1, dtype=jnp.int32))
        found = np.asarray(found).view(unsigned)
    np.testing.assert_array_equal(found, np.sort(np.asarray([0, *drawn], unsigned)))


LARGE = {
    "normal": lambda rng: rng.standard_normal((300, 400)),
    "mostly zeros": lambda rng: rng.standard_normal((300, 400)) * (rng.random((300, 400)) < 0.1),
    "few values": lambda rng: rng.integers(0, 3, (300, 400)).astype(float),
    "ascending": lambda _: np.arange(120_000.0).reshape(300, 400),
    "one above all": lambda _: np.where(np.arange(120_000) == 7, 1e300, 1e-300),
    "of many magnitudes": lambda rng: np.exp(100 * rng.standard_normal((300, 400))),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", narrow(LARGE, ["normal", "few values"]))
def test_kth_smallest_of_many(name, dtype):
    """A sample of the entries brackets it, or misleads."""
    with np.errstate(over="ignore"):
        x = np.abs(LARGE[name](np.random.default_rng(0))).astype(dtype)
    places = [0, 1, 2, 300, 60_000, 96_123, x.size - 1, x.size]
    with jax.enable_x64(True):
        found = every_kth_smallest(jnp.asarray(x), jnp.asarray(places, jnp.int32))
    ordered = np.concatenate([[0], np.sort(x.ravel())]).astype(dtype)
    np.testing.assert_array_equal(found, ordered[places])


def _coinciding():
    rng = np.random.default_rng(3)
    return orthogonal(rng, 5)[:, :3] @ orthogonal(rng, 4)[:, :3].T


DIFFERENTIATED = {
    "polar, singular values coincide": (linalg.polar, _coinciding()),
    "flattened": (lambda x: linalg.flattened(x, 0.5), None),
    "basis": (lambda x: linalg.basis(x, 1e-12, singular=True)[1], None),
}


@pytest.mark.parametrize("name", narrow(DIFFERENTIATED, DIFFERENTIATED, night=["flattened"]))
def test_second_derivatives_are_right_also_in_loops(name):
    fn, point = DIFFERENTIATED[name]
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((5, 5)), rng.standard_normal((4, 4))
    point = rng.standard_normal((5, 4)) if point is None else point

    def value(t):
        # Along changes that keep the rank.
        x = (jnp.eye(5) + t * left) @ jnp.asarray(point) @ (jnp.eye(4) + t * right)
        found = jax.lax.map(linalg.in_loop(fn), x[None])[0]
        return jnp.sum(found**2 * probe) + jnp.sum(found * probe)

    with jax.enable_x64(True):
        left, right = jnp.asarray(left), jnp.asarray(right)
        shape = jax.eval_shape(fn, jnp.asarray(point)).shape
        probe = jnp.asarray(rng.standard_normal(shape))
        found = jax.jit(lambda t: [f(jax.jacrev(value))(t) for f in (jax.jacfwd, jax.jacrev)])(0.0)
        slope, step = jax.jit(jax.grad(value)), 1e-6
        expected = (slope(step) - slope(-step)) / (2 * step)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
