"""Every rule against a direct implementation of its definition, on dense updates in float64."""

import numpy as np
import pytest
from definitions import cart, dc_merge, flatten, iso_cts, pico, prune, sce, svc, svd, tsv
from helpers import KEY, assert_same, dense, modules, random_adapters

import coremerge_jax as cm

pytestmark = pytest.mark.wide

SHAPES, RANKS = modules((16, 12)), (2, 3, 2)


def updates_of(loras):
    return [dense(lora) for lora in loras]


def direct(fn):
    """A definition that takes updates as one that takes factors."""
    return lambda loras: fn(updates_of(loras))


SIDE = sum(RANKS)
# Rules that do not depend on the basis, in core space; definition on the dense updates.
SPECTRAL = {
    "tsv": (cm.tsv(), direct(tsv)),
    "tsv of rank 1": (cm.tsv(rank=1), direct(lambda x: tsv(x, 1))),
    "cart": (cm.cart(rank=2, scale=0.7), direct(lambda x: cart(x, 2, 0.7))),
    "flatten": (cm.flatten(power=0.5), direct(lambda x: flatten(sum(x), 0.5))),
    "isotropize": (cm.isotropize(), direct(lambda x: flatten(sum(x), 0))),
    "flatten|tsv": (
        cm.chain(cm.flatten(power=0.5), cm.tsv()),
        direct(lambda x: tsv([flatten(y, 0.5) for y in x])),
    ),
    # ⌊0.8 · 7⌋ = 5, round(2 / 3) = 1 direction for each, and 7 - 3 in common.
    "iso_cts": (cm.iso_cts(), direct(lambda x: iso_cts(x, 4, 1))),
    "iso_cts of 3 and 1": (
        cm.iso_cts(common=3, specific=1),
        direct(lambda x: iso_cts(x, 3, 1)),
    ),
    "svc": (cm.svc(), direct(lambda x: svc(sum(x), x))),
    "tsv|svc": (cm.chain(cm.tsv(), cm.svc(alpha=0.1)), direct(lambda x: svc(tsv(x), x, 0.1))),
    "pico": (cm.pico(), lambda x: pico(x, sum)),
    "pico|tsv": (cm.chain(cm.pico(), cm.tsv()), lambda x: pico(x, tsv)),
}
DC = {
    "averaging": (cm.dc_merge(density=0.1), direct(lambda x: dc_merge(x, 0.1, None))),
    "linear": (cm.dc_merge(density=0.3, rho=5.0), direct(lambda x: dc_merge(x, 0.3, 5.0))),
    "one entry": (cm.dc_merge(), direct(lambda x: dc_merge(x, 0.001, None))),
}
# Rules that depend on it, in full space.
ELEMENTWISE = {
    "sce": (cm.sce(density=0.3), direct(lambda x: sce(x, 0.3))),
    "prune": (cm.prune(density=0.3), direct(lambda x: sum(prune(y, 0.3) for y in x))),
}


def check(rule, expected, seed, space, ranks=RANKS):
    adapters = random_adapters(SHAPES, ranks, seed)
    merged = cm.merge(adapters, rule, space=space, key=KEY)
    assert_same(
        merged, {path: expected([adapter[path] for adapter in adapters]) for path in SHAPES}, 1e-9
    )


SPACES = {"core": cm.core(), "full": cm.full(), "knots": cm.knots(scaled=True)}


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", SPECTRAL)
def test_rules_that_do_not_depend_on_the_basis(name, space, seed):
    if ("pico" in name and space == "knots") or (name == "iso_cts" and space == "full"):
        return  # no factors there; the share is of another number of directions
    check(*SPECTRAL[name], seed, SPACES[space])


def test_iso_cts_is_iso_c_where_everything_is_common(seed):
    """In full space, 0.8 of 12 directions are more than the 7 that there are."""
    check(cm.iso_cts(), SPECTRAL["isotropize"][1], seed, cm.full())


def test_steps_at_the_wrong_place_are_refused():
    adapters = random_adapters(SHAPES, RANKS)
    with pytest.raises(ValueError, match="put it behind the rule that merges"):
        cm.merge(adapters, cm.chain(cm.svc(), cm.tsv()))
    for others in ([cm.tsv()], [cm.prune()], [cm.flatten()]):
        with pytest.raises(ValueError, match=r"pico\(\).* must be the first part"):
            cm.chain(*others, cm.pico())  # they change, or lose, the factors that it looks at
    with pytest.raises(ValueError, match="which only core and full space have"):
        cm.merge(adapters, cm.pico(), space=cm.knots())


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", DC)
@pytest.mark.parametrize("ranks", [(2, 3, 2), (3, 3, 3)], ids=str)
def test_dc_merge(name, space, seed, ranks):
    """Padding of ranks is not counted, nor what a space has beyond the adapters' directions."""
    check(*DC[name], seed, SPACES[space], ranks)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_rules(name, seed):
    check(*ELEMENTWISE[name], seed, cm.full())


def test_sce_keeps_as_many_entries_as_it_says():
    cores = np.random.default_rng(0).standard_normal((2, 5, 4)).astype("float32")
    for density, number in ((0.04, 0), (0.05, 1), (0.3, 6), (0.99, 19), (1.0, 20)):
        merged = cm.sce(density=density)(cores)
        assert np.count_nonzero(merged) == number, density
    np.testing.assert_array_equal(cm.sce()(cores[:1]), cores[0])


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("density", [0.01, 0.2, 1.0])
def test_ties_of_the_model_keeps_as_many_entries_as_it_says(precision, density, seed):
    """One more than ⌊density · d⌋ over all modules, as the smallest kept is the threshold."""
    (adapter,) = random_adapters(SHAPES, [12], seed)
    rule = cm.ties(density=density, scope="model")
    merged = cm.merge([adapter], rule, space=cm.full(), precision=precision)
    size = sum(m * n for m, n in SHAPES.values())
    kept = sum(np.count_nonzero(dense(lora)) for lora in merged.values())
    assert kept == min(int(density * size) + 1, size)


def hooi(updates, rank, beta, iterations=200):
    """Tucker's subspaces of the dense updates."""
    norms = np.array([np.linalg.norm(x) for x in updates])
    x = [
        u / n * (beta * n + (1 - beta) * norms.mean()) for u, n in zip(updates, norms, strict=True)
    ]
    left, right = svd(np.hstack(x), rank)[0], svd(np.hstack([y.T for y in x]), rank)[0]
    for _ in range(iterations):
        left = svd(np.hstack([y @ right for y in x]), rank)[0]
        right = svd(np.hstack([y.T @ left for y in x]), rank)[0]
    return left, right


@pytest.mark.parametrize("beta", [0.25, 1.0])
def test_tucker(beta, seed):
    """Also an elementwise rule: its coordinates are singular vectors, up to signs."""
    adapters = random_adapters(SHAPES, RANKS, seed)
    updates = {path: [dense(adapter[path]) for adapter in adapters] for path in SHAPES}
    subspaces = {path: hooi(x, 3, beta) for path, x in updates.items()}
    space = cm.tucker(rank=3, beta=beta, tolerance=0.0, iterations=200)
    for rule, direct in (
        (cm.task_arithmetic(), sum),
        (cm.tsv(rank=1), lambda x: tsv(x, 1)),
        (cm.prune(density=0.4), lambda x: sum(prune(y, 0.4) for y in x)),
    ):
        merged = cm.merge(adapters, rule, space=space)
        assert all(lora.rank == 3 for lora in merged.values())
        expected = {
            path: left @ direct([left.T @ x @ right for x in updates[path]]) @ right.T
            for path, (left, right) in subspaces.items()
        }
        assert_same(merged, expected, 1e-6)
