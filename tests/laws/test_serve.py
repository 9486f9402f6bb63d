"""Batches of requests, each with a merge of its own: the same as one merged adapter a request."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import distance, random_adapters
from jax.sharding import Mesh, PartitionSpec

import coremerge_jax as cm

SHAPES = {"first": (7, 5), "second": (4, 7)}
REQUESTS = np.asarray([2, 0, 1, 1, -1, 0], np.int32)


@pytest.fixture(autouse=True)
def _lenient():
    """flax promotes."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def merges():
    """Merges of all adapters of a pack, and of some of them, in another order."""
    pack = cm.pack(random_adapters(SHAPES, (2, 1, 2, 3), dtype="float32"))
    return [
        cm.compile_merge(pack[:3], cm.tsv()),
        cm.compile_merge([pack[2], pack[0]], cm.ties()),
        cm.compile_merge([pack[1]], cm.mean(), scale=2.0),
    ]


@pytest.fixture(scope="module")
def stacked(merges):
    return cm.serve.stack(merges)


def expected(merges, path, x):
    """One adapter after the other."""
    updates = [np.asarray(merge.adapter()[path].dense()) for merge in merges]
    updates.append(np.zeros_like(updates[0]))
    rows = [
        updates[t] @ row.reshape(-1, row.shape[-1]).T for t, row in zip(REQUESTS, x, strict=True)
    ]
    return np.stack(rows).swapaxes(1, 2).reshape(*x.shape[:-1], -1)


def inputs(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(6, 5), (6, 3, 5), (6, 2, 3, 5)])
def test_each_request_gets_its_own_merge(merges, stacked, shape):
    x, factors = inputs(*shape), stacked["first"]
    found = cm.serve.apply(x, factors.a, factors.b, factors.cores, REQUESTS)
    assert found.shape == (*shape[:-1], 7)
    assert distance(found, expected(merges, "first", x)) < 1e-5


def test_adapters_that_no_merge_has_are_left_out(stacked):
    assert {path: x.a.shape for path, x in stacked.items()} == {"first": (5, 5), "second": (5, 7)}
    blocks = np.asarray(stacked["first"].cores) != 0  # ranks 2, 1 and 2
    assert blocks[0].all()
    assert not blocks[1][2].any()
    assert not blocks[1][:, 2].any()
    assert blocks[2].sum() == 1


def test_transformations_of_jax(merges, stacked):
    x, factors = inputs(6, 3, 5), stacked["first"]
    rest = factors.a, factors.b
    whole = expected(merges, "first", x)
    jitted = jax.jit(cm.serve.apply)(x, *rest, factors.cores, REQUESTS)
    assert distance(jitted, whole) < 1e-5
    one = jax.vmap(lambda x, t: cm.serve.apply(x[None], *rest, factors.cores, t[None])[0])
    assert distance(one(x, REQUESTS), whole) < 1e-5
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("requests",))
    spec = PartitionSpec("requests")
    spread = jax.shard_map(
        lambda x, t: cm.serve.apply(x, *rest, factors.cores, t),
        mesh=mesh,
        in_specs=(spec, spec),
        out_specs=spec,
    )
    assert distance(spread(x, REQUESTS), whole) < 1e-5


def test_the_gradient_reaches_the_matrices_of_the_requests_alone(stacked):
    x, factors = inputs(6, 5), stacked["first"]
    requests = np.asarray([0, 0, 2, 0, 0, -1])

    def loss(cores):
        return jnp.sum(cm.serve.apply(x, factors.a, factors.b, cores, requests) ** 2)

    found = np.asarray(jax.grad(loss)(factors.cores))
    assert np.isfinite(found).all()
    assert [bool(np.any(x)) for x in found] == [True, False, True]
    step = 1e-2 * np.random.default_rng(1).standard_normal(found.shape).astype(np.float32)
    change = (loss(factors.cores + step) - loss(factors.cores - step)) / 2
    np.testing.assert_allclose(change, np.sum(found * step), rtol=1e-3)


class Heads(nnx.Module):
    """A layer whose outputs have two axes."""

    def __init__(self, rngs):
        self.inner = nnx.Linear(5, 8, rngs=rngs)

    def __call__(self, x):
        return self.inner(x).reshape(*x.shape[:-1], 2, 4)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(5, 5, rngs=rngs) for _ in range(2)])
        self.heads = Heads(rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.sin(layer(x))
        return self.heads(x)


@pytest.mark.wide
def test_an_nnx_model_serves_merges():
    shapes = {"layers.0": (5, 5), "layers.1": (5, 5), "heads": (8, 5)}
    adapters = random_adapters(shapes, (2, 2), dtype="float32")
    merges = [cm.compile_merge(adapters, rule) for rule in (cm.tsv(), cm.isotropize(), cm.mean())]
    x, base = inputs(6, 3, 5), Model(nnx.Rngs(0))
    rows = []
    for t, row in zip(REQUESTS, x, strict=True):
        model = Model(nnx.Rngs(0))
        if t >= 0:
            for path, lora in merges[t].adapter().items():
                layer = model.heads.inner if path == "heads" else model.layers[int(path[-1])]
                layer.kernel[...] += lora.dense().T
        rows.append(model(row[None])[0])
    requests = cm.serve.attach(base, cm.serve.stack(merges), np.zeros_like(REQUESTS))
    requests[...] = jnp.asarray(REQUESTS)
    found = nnx.jit(lambda model, x: model(x))(base, x)
    assert found.shape == (6, 3, 2, 4)
    assert distance(found, np.stack(rows)) < 1e-5
    assert len(jax.tree.leaves(nnx.state(base, cm.serve.Request))) == 1


@pytest.mark.wide
def test_what_cannot_be_served_is_refused(merges, stacked):
    with pytest.raises(cm.errors.RecipeError, match="got none"):
        cm.serve.stack([])
    with pytest.raises(cm.errors.MismatchError, match="no layer 'first'"):
        cm.serve.attach(Model(nnx.Rngs(0)), stacked, REQUESTS)
    nameless = [x.replace(metadata=cm.Metadata()) for x in random_adapters(SHAPES, (2, 2))]
    with pytest.raises(cm.errors.RecipeError, match="has no name"):
        cm.serve.stack([cm.compile_merge(nameless, cm.tsv())])
    (other,) = random_adapters({"other": (7, 5)}, (2,))
    with pytest.raises(cm.errors.MismatchError, match="two adapters are named 'task0'"):
        cm.serve.stack([merges[0], cm.compile_merge([other], cm.mean())])
    lora = other["other"].replace(kind=cm.Kind("conv2d", kernel=(5, 1, 1)))
    conv = other.replace(modules={"other": lora})
    with pytest.raises(cm.errors.UnsupportedError, match="is of kind conv2d"):
        cm.serve.stack([cm.compile_merge([conv], cm.mean())])
