"""Batches of requests, each with a merge of its own: the same as one merged adapter a request."""

import jax
import jax.numpy as jnp
import many_devices
import numpy as np
import pytest
from flax import nnx
from helpers import distance, random_adapters
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

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


@pytest.mark.usefixtures("all_devices")
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


def test_adapters_of_one_name_are_told_apart_by_their_values():
    pack = random_adapters(SHAPES, (2, 1), dtype="float32")
    again = [cm.compile_merge(x, cm.tsv()) for x in (pack, random_adapters(SHAPES, (2, 1)))]
    cm.serve.stack([again[0], cm.compile_merge(cm.pack(pack), cm.mean())])  # the same values
    changed = pack[0]["first"].replace(b=2 * pack[0]["first"].b)
    other = [pack[0].replace(modules={**pack[0], "first": changed}), pack[1]]
    for merge in (cm.compile_merge(other, cm.tsv()), again[1]):
        with pytest.raises(cm.errors.MismatchError, match="two adapters are named 'task0'"):
            cm.serve.stack([again[0], merge])
    with pytest.raises(cm.errors.MismatchError, match="of a merge are named 'task0'"):
        cm.serve.stack([cm.compile_merge([pack[0], other[0]], cm.tsv())])


def test_edges_of_batches(stacked):
    factors = stacked["first"]
    given = factors.a, factors.b, factors.cores
    none = cm.serve.apply(jnp.zeros((0, 3, 5)), *given, np.zeros(0, int))
    assert none.shape == (0, 3, 7)
    found = cm.serve.apply(inputs(3, 5), *given, np.asarray([0, 3, -1]))  # there are 3
    assert np.isfinite(found[0]).all()
    assert np.isnan(found[1]).all()
    assert not found[2].any()


@pytest.mark.parametrize(
    ("of_a", "of_b", "dtype"), [(0.1, 1, "bfloat16"), (1e-3, 1, "float32"), (1, 1e-3, "float32")]
)
def test_nearly_equal_factors_in_bfloat16(of_a, of_b, dtype):
    """The matrices have large entries then, and are not rounded, nor what they multiply."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((4, 64)), rng.standard_normal((64, 4))
    adapters = [
        cm.Adapter(
            {
                "q": cm.LoRA(
                    a=a + of_a * rng.standard_normal(a.shape),
                    b=b + of_b * rng.standard_normal(b.shape),
                )
            },
            metadata=cm.Metadata(name=name),
        )
        for name in "xyz"
    ]
    merge = cm.compile_merge(adapters, cm.tsv())
    factors = cm.serve.stack([merge], dtype=dtype)["q"]
    assert factors.a.dtype == factors.b.dtype == dtype
    assert factors.cores.dtype == jnp.float32
    x = jnp.asarray(rng.standard_normal((8, 64)), jnp.bfloat16)
    found = cm.serve.apply(x, factors.a, factors.b, factors.cores, np.zeros(8, int))
    expected = np.asarray(x, np.float64) @ np.asarray(merge.adapter()["q"].dense()).T
    assert found.dtype == jnp.bfloat16
    assert distance(np.asarray(found, np.float64), expected) < 0.03


class Shared(nnx.Module):
    def __init__(self, layer):
        self.one, self.two = layer, nnx.Dict(again=layer)

    def __call__(self, x):
        return self.two.again(self.one(x))


def _merge_of(path, m, n):
    return cm.serve.stack([cm.compile_merge(random_adapters({path: (m, n)}, (2,)), cm.mean())])


def test_a_layer_that_is_used_twice():
    merges, x = _merge_of("one", 5, 5), inputs(6, 5)
    model, plain = (Shared(nnx.Linear(5, 5, rngs=nnx.Rngs(0))) for _ in range(2))
    factors = merges["one"]
    plain.one.kernel[...] += (factors.b @ factors.cores[0] @ factors.a).T
    cm.serve.attach(model, merges, np.zeros(6, int))
    assert model.one is model.two.again
    assert distance(model(x), plain(x)) < 1e-5


def test_layers_that_cannot_be_replaced_are_refused():
    rngs = nnx.Rngs(0)

    class Plain(nnx.Module):
        def __init__(self):
            self.layers = nnx.data({"a": nnx.Linear(5, 5, rngs=rngs)})

    with pytest.raises(cm.errors.MismatchError, match=r"use nnx.Dict or nnx.List"):
        cm.serve.attach(Plain(), _merge_of("layers.a", 5, 5), np.zeros(6, int))
    with pytest.raises(cm.errors.MismatchError, match="the model itself"):
        cm.serve.attach(nnx.Linear(5, 5, rngs=rngs), _merge_of("", 5, 5), np.zeros(6, int))


def test_layers_that_do_not_fit_are_refused():
    class One(nnx.Module):
        def __init__(self, layer):
            self.layer = layer

    rngs = nnx.Rngs(0)
    for layer, m, n, message in (
        (nnx.LinearGeneral(8, 8, axis=(1,), rngs=rngs), 8, 8, r"inputs along axes \(1,\)"),
        (nnx.Linear(8, 4, rngs=rngs), 6, 8, "for adapters of 6 outputs"),
        (nnx.Linear(8, 4, rngs=rngs), 4, 6, "for adapters of 6 inputs"),
    ):
        model = One(layer)
        cm.serve.attach(model, _merge_of("layer", m, n), np.zeros(6, int))
        with pytest.raises(cm.errors.MismatchError, match=message):
            model.layer(inputs(6, 8, 8))


def test_outputs_keep_their_dtype():
    class One(nnx.Module):
        def __init__(self):
            self.layer = nnx.Linear(5, 5, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))

    model = One()
    cm.serve.attach(model, _merge_of("layer", 5, 5), np.zeros(6, int))
    assert model.layer(inputs(6, 5)).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("equation", "shape", "kernel", "update"),
    [
        ("BTD,NDH->BTNH", (6, 3, 5), (2, 5, 4), "NHD"),
        ("BTD,NDH->BNTH", (6, 3, 5), (2, 5, 4), "NHD"),
        ("BSD,CKDH->CBSKH", (6, 3, 5), (2, 2, 5, 3), "CKHD"),
        ("BTNH,NHD->BTD", (6, 2, 2, 4), (2, 4, 5), "DNH"),
        ("BNTH,NHD->BTD", (6, 2, 2, 4), (2, 4, 5), "DNH"),
        ("...D,DF->...F", (6, 3, 5), (5, 4), "FD"),
    ],
)
def test_layers_with_an_equation(equation, shape, kernel, update):
    class One(nnx.Module):
        def __init__(self):
            self.layer = nnx.Einsum(equation, kernel, rngs=nnx.Rngs(0))

    letters = equation.split(",")[1].split("->")[0]
    sizes = dict(zip(letters, kernel, strict=True))
    outputs = [x for x in update if x in equation.split("->")[1]]
    m, n = (int(np.prod([sizes[x] for x in y])) for y in (outputs, update[len(outputs) :]))
    merges = _merge_of("layer", m, n)
    factors, x, model = merges["layer"], inputs(*shape), One()
    dense = (factors.b @ factors.cores[0] @ factors.a).reshape([sizes[x] for x in update])
    dense = jnp.einsum(f"{update}->{letters}", dense)
    expected = model.layer(x) + jnp.einsum(equation, x, dense)
    cm.serve.attach(model, merges, np.zeros(6, int))
    assert distance(model.layer(x), expected) < 1e-5


@pytest.mark.parametrize("equation", ["BTD,TDF->BTF", "TD,DF->F", "BT,BF->TF"])
def test_equations_that_are_no_products_with_a_kernel_are_refused(equation):
    with pytest.raises(cm.errors.MismatchError, match="equation"):
        cm.serve._einsum_axes(equation, 3)


@pytest.mark.parametrize("axis", [(-2, -1), "model", None])
def test_axes_of_a_layer(axis):
    class Layer(nnx.Module):
        def __init__(self):
            self.inner = nnx.LinearGeneral((1, 5), 7, axis=(-2, -1), rngs=nnx.Rngs(0))
            self.axis = axis

        def __call__(self, x):
            return self.inner(x)

    class One(nnx.Module):
        def __init__(self):
            self.layer = Layer()

    x, model, merges = inputs(6, 1, 5), One(), _merge_of("layer", 7, 5)
    factors = merges["layer"]
    expected = model.layer(x) + x[:, 0] @ (factors.b @ factors.cores[0] @ factors.a).T
    cm.serve.attach(model, merges, np.zeros(6, int))
    assert distance(model.layer(x), expected) < 1e-5


@pytest.mark.parametrize("spread", [("x", "requests"), ("x",), ("requests",), ("a", "x")])
@pytest.mark.usefixtures("all_devices")
def test_arguments_on_a_mesh_with_explicit_axes(merges, stacked, spread):
    there = many_devices.mesh(2, mode=AxisType.Explicit)
    given = {**vars(stacked["first"]), "x": inputs(6, 3, 5), "requests": REQUESTS}
    for name in spread:
        split = PartitionSpec("modules") if name in ("x", "requests") else PartitionSpec()
        given[name] = jax.device_put(given[name], NamedSharding(there, split))
    whole = expected(merges, "first", inputs(6, 3, 5))
    for function in (cm.serve.apply, jax.jit(cm.serve.apply)):
        assert distance(function(**given), whole) < 1e-5
