"""Definitions of Tucker space and of numbers of entries; those of rules are in `cases.py`."""

import numpy as np
import pytest
from definitions import prune, svd, tsv
from helpers import assert_same, dense, distance, modules, plain_merge, random_adapters

import coremerge_jax as cm
from coremerge_jax.merging.trimming import BITS, find_thresholds

pytestmark = pytest.mark.wide

SHAPES, RANKS = modules((16, 12)), (2, 3, 2)


def test_steps_at_the_wrong_place_are_refused():
    adapters = random_adapters(SHAPES, RANKS)
    with pytest.raises(ValueError, match="put it behind the rule that merges"):
        plain_merge(adapters, cm.chain(cm.svc(), cm.tsv()))
    for others in ([cm.tsv()], [cm.prune()], [cm.flatten()]):
        with pytest.raises(ValueError, match=r"pico\(\).* must be the first part"):
            cm.chain(*others, cm.pico())  # they change, or lose, the factors that it looks at
    with pytest.raises(ValueError, match="which only core and full space have"):
        plain_merge(adapters, cm.pico(), space=cm.knots())


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
    merged = plain_merge([adapter], rule, space=cm.full(), precision=precision)
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
        merged = plain_merge(adapters, rule, space=space)
        assert all(lora.rank == 3 for lora in merged.values())
        expected = {
            path: left @ direct([left.T @ x @ right for x in updates[path]]) @ right.T
            for path, (left, right) in subspaces.items()
        }
        assert_same(merged, expected, 1e-6)


@pytest.mark.parametrize(
    ("name", "shape", "count"),
    [
        *(("tsv", shape, count) for shape, count in (((2, 32), 3), ((8, 64), 9), ((5, 4), 7))),
        *((name, (2, 32), 3) for name in ("iso_cts", "dc_merge", "cart", "ties")),
    ],
)
def test_more_adapters_than_directions_are_no_zeros(name, shape, count):
    adapters = random_adapters({"score": shape}, [2] * count)
    for space in (cm.core(), cm.tucker(rank=2)):
        merged = plain_merge(adapters, getattr(cm, name)(), space=space)
        assert np.linalg.norm(dense(merged["score"])) > 0.01


def test_tsv_of_more_adapters_than_directions_takes_one_of_each():
    adapters = random_adapters({"score": (2, 32)}, [2, 2, 1])
    updates = [dense(adapter["score"]) for adapter in adapters]
    expected = tsv(updates, rank=1)
    assert distance(dense(plain_merge(adapters, cm.tsv())["score"]), expected) < 1e-6


@pytest.mark.parametrize("case", ["one", "equal", "orthogonal"])
def test_dc_merge_keeps_entries_that_are_equal(case):
    """Ties are exact in theory, so rounding must not decide: permutations commute."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((12, 3)) @ rng.standard_normal((3, 10))
    updates = [x] * (1 + (case == "equal"))
    if case == "orthogonal":
        left, right = (np.linalg.qr(rng.standard_normal((k, 6)))[0] for k in (12, 10))
        updates = [left[:, :3] @ right[:, :3].T, 2 * left[:, 3:] @ right[:, 3:].T]

    def merged(rows, columns):
        adapters = [
            cm.Adapter({"q": cm.LoRA(a=u[rows][:, columns], b=np.eye(12))}) for u in updates
        ]
        return dense(plain_merge(adapters, cm.dc_merge(density=0.05), scale=1)["q"])

    plain = merged(np.arange(12), np.arange(10))
    assert np.linalg.norm(plain) > 0.1
    for _ in range(3):
        rows, columns = rng.permutation(12), rng.permutation(10)
        assert distance(merged(rows, columns), plain[rows][:, columns]) < 1e-6


def test_thresholds_over_more_entries_than_int32_counts():
    """Batches of 10⁹ entries: 80 % of magnitude 1, 20 % of magnitude 2."""

    def passes(known, shift):
        for _ in range(3):
            digits = np.zeros((1, 2**BITS), np.int32)
            for value, number in ((1.0, 800_000_000), (2.0, 200_000_000)):
                bits = int(np.float64(value).view(np.uint64)) >> int(shift)
                if bits >> BITS == int(known[0]) >> int(shift) >> BITS:
                    digits[0, bits & (2**BITS - 1)] += number
            yield digits, np.array([1_000_000_000], np.int32)

    rule = cm.ties(density=0.1, scope="model")
    found = find_thresholds(rule, 1, passes, lambda *x: x, np.dtype(np.float64), [])
    assert 1 < np.asarray(found)[0] <= 2
