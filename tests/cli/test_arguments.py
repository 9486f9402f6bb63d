"""Wrong arguments in memory are refused in one line that names them."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import KEY, assert_same, random_adapters

import coremerge_jax as cm
from coremerge_jax import search

SHAPES, RANKS = {"q": (6, 5)}, (2, 2)
ADAPTERS = random_adapters(SHAPES, RANKS, dtype="float32")
RULE = cm.mean()
NAN, INFINITE = float("nan"), float("inf")

WRONG = {
    "adapter alone": ({"adapters": ADAPTERS[0]}, r"single adapter; expected a list"),
    "path": ({"adapters": ["a", "b"]}, r"adapters\[0\]: expected an adapter, got 'a'; read files"),
    "text for adapters": ({"adapters": "a"}, "expected a list of adapters, got 'a'"),
    "number for adapters": ({"adapters": 3}, "expected a list of adapters, got 3"),
    "space as text": ({"space": "core"}, r"space='core' is text; write it as an object, core\(\)"),
    "misspelt space": ({"space": "cor"}, "nearest is 'core'"),
    "space not called": ({"space": cm.full}, "the class full; call it"),
    "number for space": ({"space": 3}, "expected a merge space"),
    "weights by name": ({"weights": {"a": 1.0, "b": 2.0}}, "weights: got dict; expected a list"),
    "text for weights": ({"weights": "12"}, "weights: got '12'; expected a list"),
    "text among weights": ({"weights": ["1", 2]}, r"weights\[0\]='1': expected a number"),
    "one weight": ({"weights": 0.5}, "weights=0.5: expected a list"),
    "too many weights": ({"weights": [1, 2, 3]}, "3 weights for 2 adapters"),
    "NaN weight": ({"weights": [1, NAN]}, r"weights\[1\]=nan: expected a finite number"),
    "infinite weight": ({"weights": np.array([INFINITE, 1])}, r"weights\[0\]=inf"),
    "weight on device": ({"weights": jnp.array([1, NAN])}, r"weights\[1\]=nan"),
    "table of weights": ({"weights": np.ones((2, 2))}, r"weights\[0\]=ndarray: expected a number"),
    "weight of many digits": ({"weights": [10**5000, 1]}, r"weights\[0\]=int of 16610 bits"),
    "huge weight": ({"weights": [10**400, 1]}, r"weights\[0\]=1000.*expected a finite number"),
}
FOR_MERGE = {
    "text for scale": ({"scale": "1"}, "scale='1': expected a number"),
    "NaN scale": ({"scale": NAN}, "scale=nan: expected a finite number"),
    "list for scale": ({"scale": [1.0]}, "scale=list: expected a number"),
    "NaN scale by pattern": ({"scale": {"*": NAN}}, r"scale of '\*'=nan"),
    "scale of no pattern": ({"scale": {3: 1.0}}, "scale of 3: expected a pattern"),
    "rule as text": ({"rule": "tsv"}, "expected a merge rule.*several in one chain.*got 'tsv'"),
    "rules in a list": ({"rule": [cm.tsv()]}, "make one of several by chain"),
    "rule not called": ({"rule": cm.tsv}, "the class tsv; call it"),
    "number for rule": ({"rule": 3}, "expected a merge rule"),
    "function of another shape": ({"rule": lambda cores: cores}, "gave shape .* expected"),
    "seed for key": ({"key": 0}, r"key: expected jax\.random\.key\(seed\), got 0"),
    "precision": ({"precision": "half"}, "precision='half': expected"),
    "extras": ({"extras": 3}, "extras=3: expected"),
    "mesh": ({"mesh": 8}, "mesh: expected a jax.sharding.Mesh, got int"),
    "NaN in a rule's array": ({"rule": cm.cart(scale=jnp.asarray(NAN))}, "scale=nan"),
    "a rule without a value": ({"rule": cm.ties(density=None)}, "density is None"),
}


@pytest.mark.parametrize("name", [*WRONG, *FOR_MERGE])
def test_a_wrong_argument_is_named(name):
    given, match = (WRONG | FOR_MERGE)[name]
    with pytest.raises(cm.CoreMergeError, match=match) as found:
        cm.merge(**{"adapters": ADAPTERS, "rule": RULE} | given)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("name", WRONG)
def test_as_it_is_by_project(name):
    given, match = WRONG[name]
    with pytest.raises(cm.CoreMergeError, match=match):
        cm.project(**{"adapters": ADAPTERS} | given)


def test_as_it_is_by_what_is_projected():
    projected = cm.project(ADAPTERS)
    for given, match in (
        ({"weights": {"q": [1, NAN]}}, r"weights of 'q'\[1\]=nan"),
        ({"weights": [1, "2"]}, r"weights\[1\]='2'"),
        ({"weights": {"k": [1, 1]}}, "weights of 'k': there is no such module"),
        ({"rule": "tsv"}, "expected a merge rule"),
    ):
        with pytest.raises(cm.CoreMergeError, match=match):
            projected.merge(**{"rule": RULE} | given)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: cm.truncate("x", rank=1), "adapter: expected an adapter"),
        (lambda: cm.truncate(ADAPTERS[0], rank=1.5), "rank=1.5: expected a whole number"),
        (lambda: cm.truncate(ADAPTERS[0], rank="2"), "rank='2': expected a whole number"),
        (lambda: cm.truncate(ADAPTERS[0], energy=NAN), "energy=nan: expected a finite"),
        (lambda: cm.diagnose("x"), "expected a list of adapters"),
        (lambda: cm.diagnose(ADAPTERS, "x"), "merged: expected an adapter"),
        (lambda: cm.verify(3), "expected an adapter or its path, got 3"),
        (lambda: cm.verify(ADAPTERS[0], 3), "sources: expected a list"),
        (lambda: cm.verify(ADAPTERS[0], ADAPTERS, recipe="tsv"), "recipe: expected a mapping"),
        (lambda: cm.from_function(len, "linea"), "equivariance='linea': expected one of"),
    ],
)
def test_as_it_is_elsewhere(call, match):
    with pytest.raises(cm.CoreMergeError, match=match):
        call()


def test_weights_on_a_device_are_weights():
    expected = cm.merge(ADAPTERS, RULE, weights=[1.0, 0.5])
    for weights in (np.array([1.0, 0.5]), jnp.array([1.0, 0.5]), (1, np.float32(0.5))):
        assert_same(cm.merge(ADAPTERS, RULE, weights=weights), expected, 1e-6)


# --- What is in the factors -----------------------------------------------------------------


def spoiled(value, factor="a", on_device=False):
    adapter = copy.deepcopy(ADAPTERS[1])
    getattr(adapter["q"], factor)[0, 1] = value
    return [ADAPTERS[0], jax.tree.map(jnp.asarray, adapter) if on_device else adapter]


@pytest.mark.parametrize("value", [NAN, INFINITE])
@pytest.mark.parametrize("rule", [cm.mean(), cm.tsv(), cm.ties()], ids=["mean", "tsv", "ties"])
def test_values_that_are_not_finite_are_refused_by_name(rule, value, capfd):
    for factor, on_device in (("a", False), ("b", True)):
        adapters = spoiled(value, factor, on_device)
        with pytest.raises(cm.FormatError, match=r"'task1', module 'q': [AB] has NaN"):
            cm.merge(adapters, rule)
    assert capfd.readouterr() == ("", "")  # nor does LAPACK complain


def test_as_they_are_by_all_that_reads_them():
    adapters = spoiled(NAN)
    for call in (
        lambda: cm.project(adapters),
        lambda: cm.truncate(adapters[1], rank=1),
        lambda: cm.diagnose(adapters),
    ):
        with pytest.raises(cm.FormatError, match="'task1', module 'q': A has NaN or inf"):
            call()


def test_a_merge_that_overflows_is_refused():
    for merge in (cm.merge, lambda x, rule, **more: cm.project(x).merge(rule, **more)):
        with pytest.raises(cm.MismatchError, match="module 'q': the merged update overflows"):
            merge(ADAPTERS, RULE, scale=1e39)


@pytest.mark.parametrize("shapes", [((0, 5), (6, 0)), ((2, 0), (6, 2)), ((2, 5), (0, 2))])
def test_factors_without_entries_are_refused(shapes):
    a, b = map(np.zeros, shapes)
    with pytest.raises(cm.FormatError, match=r"module 'q': a: .* have no entries"):
        cm.Adapter({"q": cm.LoRA(a=a, b=b)})


def test_a_space_refuses_ranks_that_are_not_those_of_the_factors():
    lora = ADAPTERS[0]["q"]
    for ranks in ((), (0, 2), (1, 2)):
        with pytest.raises(cm.MismatchError, match="that add up"):
            cm.full().project(jnp.asarray(lora.a), jnp.asarray(lora.b), ranks)


@pytest.mark.parametrize("rule", [cm.mean(), cm.tsv()], ids=["mean", "tsv"])
def test_a_merge_knows_which_adapters_have_an_effect(rule):
    dead = jax.tree.map(np.zeros_like, ADAPTERS[1])
    stream = cm.merge_stream([ADAPTERS[0], dead], rule)
    stream.collect()
    assert (stream.effects.idle, stream.effects.nothing) == ([1], False)
    stream = cm.merge_stream([dead, dead], rule)
    stream.collect()
    assert (stream.effects.idle, stream.effects.nothing) == ([0, 1], True)


# --- Transfers and copies -------------------------------------------------------------------

ENTRIES = {
    "merge": lambda x: cm.merge(x, cm.ties(), weights=[1, 0.5], scale=0.5),
    "merge with a key": lambda x: cm.merge(x, cm.dare(), key=KEY),
    "merge over all modules": lambda x: cm.merge(x, cm.ties(scope="model")),
    "project": lambda x: cm.project(x, weights=[1, 0.5]).merge(RULE, weights=[1, 2], scale=0.5),
    "truncate": lambda x: cm.truncate(x[0], rank=1),
    "dense": lambda x: x[0]["q"].dense(),
    "fold_tree": lambda x: cm.fold_tree({"q": {"kernel": x[0]["q"].dense().T}}, x[0]),
    "diagnose": lambda x: cm.diagnose(x),
    "sweep": lambda x: search.sweep(x, RULE, lambda _: 1.0, {"scale": [0.5, 1.0]}),
    "fit": lambda x: search.fit(lambda m, _: jnp.sum(m["q"].dense()), x, RULE, [np.zeros(1)]),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_transfers_are_not_by_accident(name):
    for adapters in (ADAPTERS, jax.tree.map(jnp.asarray, ADAPTERS)):
        with jax.transfer_guard("disallow"):
            ENTRIES[name](adapters)


def test_what_is_plain_can_be_pickled_and_copied():
    projected = cm.project(ADAPTERS)
    sweep = search.sweep(projected, RULE, lambda _: 1.0, {"scale": [0.5]})
    merged = cm.merge(ADAPTERS, RULE)
    diagnosis = cm.diagnose(ADAPTERS)
    for twin in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        assert_same(twin(projected).merge(RULE), merged, 1e-6)
        assert_same(twin(merged), merged, 0)
        assert twin(merged).metadata == merged.metadata
        assert twin(sweep) == sweep
        assert twin(diagnosis).to_dict() == diagnosis.to_dict()
        assert twin(cm.chain(cm.tsv(), cm.isotropize())) == cm.chain(cm.tsv(), cm.isotropize())
