"""Packs and compiled merges: the same as merges of the adapters themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import KEY, distance, narrow, random_adapters, random_inputs, statistics_of

import coremerge_jax as cm

# In "few", ranks add up to more than there are rows.
SHAPES = {"q": (20, 18), "k": (20, 18), "v": (16, 25), "few": (7, 30)}
RANKS = (3, 4, 5)
RULES = {
    "mean": cm.mean(),
    "tsv": cm.tsv(),
    "ties": cm.ties(),
    "ties of the model": cm.ties(scope="model"),
    "dare, ties, isotropize": cm.chain(cm.dare(), cm.ties(), cm.isotropize()),
}
CHOICES = {"all": [0, 1, 2], "two": [2, 0], "one": [1]}


def without(adapter, path):
    return adapter.replace(modules={x: lora for x, lora in adapter.items() if x != path})


@pytest.fixture(scope="module")
def adapters():
    """One of them has no module "v"."""
    first, second, third = random_adapters(SHAPES, RANKS)
    return [first, without(second, "v"), third]


@pytest.fixture(scope="module")
def pack(adapters):
    return cm.pack(adapters)


def largest(found, expected):
    """The largest distance of a module's updates."""
    assert list(found) == list(expected)
    pairs = ((found[path].dense(), expected[path].dense()) for path in expected)
    return max(distance(x, y) for x, y in pairs)


def chosen(adapters, choice):
    return [adapters[t] for t in CHOICES[choice]]


def test_a_pack_has_the_adapters_as_they_are(adapters, pack):
    assert pack.names == ("task0", "task1", "task2")
    assert [x.metadata.name for x in pack[1:]] == ["task1", "task2"]
    for adapter, packed in zip(adapters, pack, strict=True):
        assert packed is pack[packed.metadata.name]
        assert list(packed) == list(adapter)
        for path, lora in adapter.items():
            np.testing.assert_array_equal(packed[path].a, lora.a)
            np.testing.assert_array_equal(packed[path].b, lora.b)


@pytest.mark.parametrize(
    "rule", narrow(RULES, ["tsv"], night=["dare, ties, isotropize", "ties of the model"])
)
@pytest.mark.parametrize("choice", narrow(CHOICES, ["two"], night=["all", "one"]))
def test_merges_of_a_pack_are_those_of_the_adapters(adapters, pack, rule, choice):
    weights = [0.5, 2.0, 1.0][: len(CHOICES[choice])]
    options = {"key": KEY, "weights": weights}
    expected = cm.merge(chosen(adapters, choice), RULES[rule], **options)
    assert largest(cm.merge(chosen(pack, choice), RULES[rule], **options), expected) < 1e-9
    compiled = cm.compile_merge(chosen(pack, choice), RULES[rule], dtype="float64", **options)
    assert largest(compiled.adapter(), expected) < 1e-9


SPACES = {
    "tucker": cm.tucker(rank=4),
    "balanced": cm.core(gauge="balanced"),
    "knots": cm.knots(),
    "full": cm.full(),
}


@pytest.mark.wide
@pytest.mark.parametrize("space", narrow(SPACES, [], night=["balanced", "knots", "tucker"]))
def test_packs_are_merged_in_every_space(adapters, pack, space):
    options = {"space": SPACES[space], "scale": 1.0}
    expected = cm.merge(adapters, cm.ties(), **options)
    assert largest(cm.merge(pack, cm.ties(), **options), expected) < 1e-9
    if SPACES[space].takes_coordinates:
        compiled = cm.compile_merge(pack, cm.ties(), dtype="float64", **options)
        assert largest(compiled.adapter(), expected) < 1e-9
    else:
        with pytest.raises(cm.errors.UnsupportedError, match="merge in core space"):
            cm.compile_merge(pack, cm.ties(), **options)


@pytest.mark.wide
def test_one_more_adapter_and_one_less_give_the_packs_of_these_adapters(adapters, pack):
    extended = cm.pack(adapters[:2]).add(adapters[2])
    fewer = extended.remove("task1")
    again = fewer.add(adapters[1])
    assert again.names == ("task0", "task2", "task1")
    for found, expected in (
        (extended, adapters),
        (fewer, [adapters[0], adapters[2]]),
        (again, [adapters[0], adapters[2], adapters[1]]),
        (pack[1:], adapters[1:]),
    ):
        merged = cm.merge(found, cm.ties(), scale=1.0)
        assert largest(merged, cm.merge(expected, cm.ties(), scale=1.0)) < 1e-9
    sizes = {path: (len(x.left), len(x.right)) for path, x in fewer.coordinates.items()}
    assert sizes == {"q": (8, 8), "k": (8, 8), "v": (8, 8), "few": (8, 8)}


@pytest.mark.wide
def test_adapters_that_are_there_twice_add_no_directions(adapters):
    first, _, third = adapters
    for packed in (
        cm.pack([first, first, third], names=["a", "b", "c"]),
        cm.pack([first], names=["a"]).add(first, name="b").add(third, name="c"),
    ):
        for rule in (cm.tsv(), cm.ties()):
            expected = cm.merge([first, first, third], rule, scale=1.0)
            assert largest(cm.merge(packed, rule, scale=1.0), expected) < 1e-8
            compiled = cm.compile_merge(packed, rule, scale=1.0)
            assert largest(compiled.adapter(), expected) < 1e-6


@pytest.mark.wide
def test_statistics_of_inputs_serve_packs(adapters, pack):
    statistics = statistics_of(adapters, random_inputs(adapters))
    expected = cm.merge(adapters, cm.regmean(), statistics=statistics)
    assert largest(cm.merge(pack, cm.regmean(), statistics=statistics), expected) < 1e-9


@pytest.mark.wide
def test_compiled_merges_are_matrices_between_stacked_factors(adapters, pack):
    expected = cm.merge(adapters, cm.tsv())
    compiled = cm.compile_merge(pack, cm.tsv())
    for path, core in compiled.cores.items():
        loras = [adapter[path] for adapter in adapters if path in adapter]
        b, a = np.hstack([x.b for x in loras]), np.vstack([x.a for x in loras])
        assert core.shape == (len(a), len(a))
        assert core.dtype == np.float32
        assert distance(b @ core @ a, expected[path].dense()) < 1e-6
    assert compiled.nbytes == 4 * (3 * 12**2 + 8**2)


def test_linear_merges_are_compiled_to_numbers_on_the_diagonal(pack):
    compiled = cm.compile_merge(
        pack, cm.mean(), scale=3.0, weights=[1.0, 2.0, 0.0], space=cm.core()
    )
    expected = np.repeat([1.5, 3.0], RANKS[:2])
    np.testing.assert_allclose(compiled.cores["q"], np.diag(expected), rtol=1e-6)


@pytest.mark.wide
def test_compiling_merges_of_a_pack_reads_no_factors(adapters, monkeypatch):
    given = [without(adapter, "few") for adapter in adapters]
    pack, expected = cm.pack(given), cm.compile_merge(given, cm.ties())

    def never(*_):
        raise AssertionError("factors were read")

    for packed in pack:
        monkeypatch.setattr(packed, "read", never)
    for path, core in cm.compile_merge(pack, cm.ties()).cores.items():
        assert distance(core, expected.cores[path]) < 1e-6


@pytest.mark.wide
def test_ill_conditioned_factors_are_lifted_to_orthonormal_rows(adapters):
    first, second, _ = adapters
    steep = np.logspace(0, -5, 3)
    modules = {x: lora.replace(a=lora.a * steep[:, None]) for x, lora in first.items()}
    given = [first.replace(modules=modules), second]
    expected = cm.merge(given, cm.tsv())
    found = cm.compile_merge(given, cm.tsv(), dtype="float64").adapter()
    assert largest(found, expected) < 1e-9
    a = found["q"].a
    np.testing.assert_allclose(a @ a.T, np.eye(len(a)), atol=1e-9)


@pytest.mark.wide
def test_what_cannot_be_packed_is_refused(adapters, pack):
    with pytest.raises(cm.errors.RecipeError, match="two adapters are named 'task0'"):
        cm.pack([adapters[0], adapters[0]])
    with pytest.raises(cm.errors.RecipeError, match="did you mean 'task1'"):
        pack["tsk1"]
    with pytest.raises(cm.errors.MismatchError, match="the only one"):
        cm.pack(adapters[:1]).remove("task0")
    with pytest.raises(cm.errors.RecipeError, match="got 1 for 3"):
        cm.pack(adapters, names=["one"])
    broken = adapters[0]["q"].replace(a=np.full_like(adapters[0]["q"].a, np.nan))
    broken = adapters[0].replace(modules={**adapters[0], "q": broken})
    for make in (lambda: cm.pack([broken, adapters[1]]), lambda: pack[1:].add(broken)):
        with pytest.raises(cm.errors.FormatError, match=r"'task0', module 'q': A has NaN"):
            make()

    def traced(x):
        lora = adapters[0]["q"].replace(a=x)
        cm.pack([adapters[0].replace(modules={"q": lora})])
        return jnp.sum(x)

    with pytest.raises(cm.errors.UnsupportedError, match="cannot be packed"):
        jax.jit(traced)(adapters[0]["q"].a)


@pytest.mark.wide
@pytest.mark.parametrize("ratio", [1e-4, 1e-8, 1e-12])
def test_large_adapters_of_a_pack_do_not_change_merges_of_the_others(ratio):
    """Also where they were removed, or were there before the others."""
    large, one, two = random_adapters({"q": (24, 20)}, (4, 3, 3), dtype="float32")
    steep = ratio * np.logspace(0, -3, 3).astype(np.float32)
    one, two = (
        x.replace(modules={"q": x["q"].replace(b=x["q"].b * sizes)})
        for x, sizes in ((one, steep), (two, np.float32(ratio)))
    )
    whole = cm.pack([large, one, two])
    built = cm.pack([one, large]).add(two)
    again = cm.pack([one, large]).remove("task0").add(two)
    for rule in (cm.tsv(), cm.chain(cm.tsv(), cm.isotropize()), cm.ties()):
        expected = cm.merge([one, two], rule)
        for given in (whole[1:], whole.remove("task0"), [built[0], built[2]], again):
            assert largest(cm.merge(given, rule), expected) < 1e-6


def test_an_adapter_of_a_pack_given_twice(adapters, pack):
    twice = [0, 1, 2, 0, 1]
    expected = cm.merge([adapters[t] for t in twice], cm.tsv())
    assert largest(cm.merge([pack[t] for t in twice], cm.tsv()), expected) < 1e-6


def test_names_that_are_numbers_stay_different(adapters):
    nameless = [x.replace(metadata=cm.Metadata()) for x in adapters]
    pack = cm.pack(nameless)
    assert pack.names == ("1", "2", "3")
    assert pack.remove("1").add(nameless[0]).names == ("2", "3", "1")
