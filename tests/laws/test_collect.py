"""Gram matrices of modules' inputs, against inputs that are written down as a model runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util
from helpers import distance
from jax.extend import core
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from many_devices import mesh

import coremerge_jax as cm
from coremerge_jax import demo
from coremerge_jax.collecting import collector

WIDTH, LAYERS, BATCH, LENGTH = 12, 2, 4, 3
RANKS = (2, 3, 1)
EXPLICIT = AxisType.Explicit
SHAPES = {"up": (2 * WIDTH, WIDTH), "down": (WIDTH, 2 * WIDTH)}

# Inputs by name of a kind of module, in the order of calls: those that are not traced.
SEEN = {}


def see(name, x):
    if not isinstance(x, jax.core.Tracer):
        SEEN.setdefault(name, []).append(np.asarray(x, np.float64))
    return x


class Block(nnx.Module):
    """Both LoRA modules of flax."""

    def __init__(self, *, rngs):
        self.up = nnx.LoRALinear(WIDTH, 2 * WIDTH, lora_rank=1, rngs=rngs)
        down = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)
        self.down = nnx.LoRA(2 * WIDTH, 1, WIDTH, base_module=down, rngs=rngs)

    def __call__(self, x):
        return x + self.down(see("down", jnp.tanh(self.up(see("up", x)))))


class Model(nnx.Module):
    """A few blocks one after another."""

    def __init__(self, *, rngs):
        self.blocks = nnx.List([Block(rngs=rngs) for _ in range(LAYERS)])

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Scanned(nnx.Module):
    """The blocks of a `Model` as one stack."""

    def __init__(self, model):
        states = [nnx.split(block)[1] for block in model.blocks]
        graph = nnx.split(model.blocks[0])[0]
        self.blocks = nnx.merge(graph, jax.tree.map(lambda *x: jnp.stack(x), *states))

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        @nnx.remat
        def forward(block, x):
            return block(x)

        return forward(self.blocks, x)


def random(rng, *shape, dtype="float32"):
    return rng.standard_normal(shape).astype(dtype)


def adapters_of(shapes, dtype="float32"):
    """One for each of `RANKS`; the last has only every other module."""
    rng = np.random.default_rng(1)
    return [
        cm.Adapter(
            {
                path: cm.LoRA(
                    a=random(rng, r, n, dtype=dtype), b=random(rng, m, r, dtype=dtype) / 8
                )
                for i, (path, (m, n)) in enumerate(shapes.items())
                if t < 2 or i % 2 == 0
            },
            metadata=cm.Metadata(name=f"task{t}"),
        )
        for t, r in enumerate(RANKS)
    ]


def model_adapters(**options):
    paths = {f"blocks.{i}.{name}": SHAPES[name] for name in SHAPES for i in range(LAYERS)}
    return adapters_of(paths, **options)


def batches_of(*shape, count=2, tasks=3):
    rng = np.random.default_rng(2)
    return [[jnp.asarray(random(rng, *shape)) for _ in range(count)] for _ in range(tasks)]


def run(model, x):
    return model(x)


@pytest.fixture
def model():
    return Model(rngs=nnx.Rngs(0))


def with_adapter(model, adapter):
    """The model with an adapter; modules without one get zeros."""
    like = cm.from_nnx(model)
    zeros = {path: jax.tree.map(jnp.zeros_like, lora) for path, lora in like.items()}
    other = nnx.clone(model)
    cm.update_nnx(other, cm.Adapter(zeros | dict(adapter or {})))
    return other


def inputs(model, readers, batches):
    """Inputs of each module and task, ``(tokens, n)``."""
    found = {}
    for t, (reader, several) in enumerate(zip(readers, batches, strict=True)):
        for x in several:
            SEEN.clear()
            with_adapter(model, reader)(x)
            for name, calls in SEEN.items():
                for i, call in enumerate(calls):
                    rows = call.reshape(-1, call.shape[-1])
                    found.setdefault((f"blocks.{i}.{name}", t), []).append(rows)
    return {key: np.concatenate(rows) for key, rows in found.items()}


def assert_inputs(statistics, adapters, expected, tolerance=1e-5):
    """The statistics are those of inputs by module and task."""
    assert {path for path, _ in expected} == set(statistics)
    for path, gram in statistics.items():
        tasks = [t for t, adapter in enumerate(adapters) if path in adapter]
        assert gram.tasks == tuple(tasks)
        assert gram.ranks == tuple(adapters[t][path].rank for t in tasks)
        a = np.concatenate([np.asarray(adapters[t][path].a, np.float64) for t in tasks])
        if gram.squares is None:
            a = np.eye(a.shape[1])
        else:
            np.testing.assert_allclose(gram.squares, (a**2).sum(1), rtol=1e-5)
        for matrix, count, t in zip(gram.matrices, gram.counts, tasks, strict=True):
            z = np.asarray(expected[path, t], np.float64) @ a.T
            assert count == len(z)
            assert distance(np.asarray(matrix), z.T @ z) < tolerance, path


def assert_equal(x, y, tolerance=1e-5):
    assert set(x) == set(y)
    assert x.adapters == y.adapters
    for path, gram in x.items():
        assert (gram.tasks, gram.ranks) == (y[path].tasks, y[path].ranks)
        assert distance(np.asarray(gram.matrices), np.asarray(y[path].matrices)) < tolerance, path
        np.testing.assert_allclose(gram.counts, y[path].counts)


@pytest.mark.parametrize("kind", ["unrolled", "scanned"])
@pytest.mark.parametrize("source", ["own", "base", "merged"])
def test_inputs_of_flax_models(model, kind, source):
    adapters, batches = model_adapters(), batches_of(BATCH, LENGTH, WIDTH)
    merged = cm.merge(adapters, cm.mean())
    readers = {"own": adapters, "base": [None] * 3, "merged": [merged] * 3}[source]
    statistics = cm.collect(
        model if kind == "unrolled" else Scanned(model),
        adapters,
        batches,
        run,
        source=merged if source == "merged" else source,
    )
    assert statistics.source == source
    assert statistics.adapters == ("task0", "task1", "task2")
    assert_inputs(statistics, adapters, inputs(model, readers, batches))


@pytest.mark.wide
def test_all_inputs_and_many_rows(model):
    adapters, batches = model_adapters(), batches_of(BATCH, LENGTH, WIDTH, count=1)
    expected = inputs(model, adapters, batches)
    statistics = cm.collect(model, adapters, batches, run, full=True)
    assert {gram.matrices.shape[1] for gram in statistics.values()} == {WIDTH, 2 * WIDTH}
    assert_inputs(statistics, adapters, expected)
    # As many rows as inputs of "up" (4 * (2 + 3) - 1 > 12), and fewer than those of "down".
    wide = [
        adapter.replace(
            modules={
                path: cm.LoRA(a=np.tile(lora.a, (4, 1)), b=np.tile(lora.b, 4) / 4)
                for path, lora in adapter.items()
            }
        )
        for adapter in adapters[:2]
    ]
    statistics = cm.collect(model, wide, batches[:2], run)
    assert {path for path, gram in statistics.items() if gram.squares is None} == {
        "blocks.0.up",
        "blocks.1.up",
    }
    assert_inputs(statistics, wide, {key: x for key, x in expected.items() if key[1] < 2})


@pytest.mark.wide
def test_halves_add_up_and_adapters_commute(model):
    adapters, batches = model_adapters(), batches_of(BATCH, LENGTH, WIDTH)
    every = cm.collect(model, adapters, batches, run)
    halves = [cm.collect(model, adapters, [[x[i]] for x in batches], run) for i in (0, 1)]
    assert_equal(sum(halves), every)
    order = [2, 0, 1]
    moved = cm.collect(model, [adapters[t] for t in order], [batches[t] for t in order], run)
    rule = cm.regmean()
    first = cm.merge(adapters, rule, statistics=every, scale=1.0)
    other = cm.merge([adapters[t] for t in order], rule, statistics=moved, scale=1.0)
    for path, lora in first.items():
        assert distance(np.asarray(other[path].dense()), np.asarray(lora.dense())) < 1e-4


@pytest.mark.wide
def test_padding_does_not_count(model):
    adapters, batches = model_adapters(), batches_of(BATCH, LENGTH, WIDTH, count=1)
    expected = cm.collect(model, adapters, batches, run)

    def padded(x):
        tokens = jnp.concatenate([x, jnp.full((BATCH, 2, WIDTH), jnp.nan)], axis=1)
        return {"tokens": tokens, "mask": jnp.zeros((BATCH, LENGTH + 2)).at[:, :LENGTH].set(1)}

    def forward(model, batch):
        return model(batch["tokens"])

    def flat(model, batch):
        return model(batch["tokens"].reshape(-1, WIDTH))

    more = [[padded(x) for x in several] for several in batches]
    for one in (forward, flat):
        found = cm.collect(model, adapters, more, one, mask=lambda batch: batch["mask"])
        assert_equal(found, expected)
    with pytest.raises(cm.FormatError, match=r"'blocks\.0\.up' has inputs that are not finite"):
        cm.collect(model, adapters, more, forward)
    with pytest.raises(cm.MismatchError, match=r"'blocks.0.up' has inputs of shape \(3, 4\)"):
        cm.collect(
            model,
            adapters,
            batches,
            lambda model, x: model(x.swapaxes(0, 1)),
            mask=lambda x: jnp.ones(x.shape[:2]),
        )
    # After pooling, an example counts if one of its tokens does.
    weights = jnp.asarray([[1, 0, 0], [0, 0, 0], [0.5, 0.5, 0], [0, 0, 0]])
    pooled = cm.collect(
        model, adapters, batches, lambda model, x: model(x.mean(1)), mask=lambda _: weights
    )
    np.testing.assert_allclose(pooled.counts, 1.5)


LOOPS = {
    "over time": lambda x, w: jax.lax.scan(lambda h, x: (h, x @ w), 0, x.swapaxes(0, 1))[1],
    "over examples": lambda x, w: jax.lax.map(lambda x: x @ w, x),
    "over states": lambda x, w: jax.lax.scan(
        lambda h, x: (h @ w + x, 0), x[:, 0], x.swapaxes(0, 1)
    ),
    "while": lambda x, w: jax.lax.fori_loop(0, 2, lambda i, h: h + x[i] @ w, x[0]),
}


@pytest.mark.parametrize("case", LOOPS)
def test_masks_are_refused_in_loops_over_parts_of_a_batch(case):
    """Also where there are as many examples as tokens, so that the shapes fit."""
    rng = np.random.default_rng(7)
    x, weight = random(rng, 4, 4, 5), random(rng, 5, 5)
    adapters = adapters_of({"layer": (5, 5)})[:1]
    given = {"layer": {"kernel": weight}}, adapters, [[x]]
    for mask in (jnp.ones((4, 4)), jnp.ones(4)):
        with pytest.raises(cm.MismatchError, match="in a loop whose steps"):
            cm.collect(
                *given,
                lambda params, x: LOOPS[case](x, params["layer"]["kernel"]),
                source="base",
                mask=lambda _, mask=mask: mask,
            )


def test_layers_that_share_a_weight_take_masks():
    rng = np.random.default_rng(8)
    x, weight = random(rng, 4, 3, 5), random(rng, 5, 5)
    mask = jnp.asarray([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]])
    adapters = adapters_of({"layer": (5, 5)})[:1]

    def forward(params, x):
        return jax.lax.fori_loop(0, 2, lambda _, x: x @ params["layer"]["kernel"], x)

    found = cm.collect(
        {"layer": {"kernel": weight}}, adapters, [[x]], forward, source="base", mask=lambda _: mask
    )["layer"]
    inputs = np.concatenate([np.asarray(y)[mask > 0] for y in (x, x @ weight)])
    seen = inputs @ adapters[0]["layer"].a.T
    np.testing.assert_allclose(found.matrices[0], seen.T @ seen, rtol=1e-4)
    np.testing.assert_allclose(found.counts, 12)


# --- Ways to write a product ---------------------------------------------------------------------

E, N, H = 3, 2, 5

# The axes of a kernel, how it is stored, how it is multiplied with x, the shape of x, and the
# inputs of each of its modules, (rows, n).
PRODUCTS = {
    "q": ("ioo", (WIDTH, N, H), "btd,dnh->btnh", (4, 3, WIDTH), None),
    "kv": ("ooio", (2, N, WIDTH, H), "btd,cndh->btcnh", (4, 3, WIDTH), None),
    "o": ("iio", (N, H, WIDTH), "btnh,nhd->btd", (4, 3, N, H), None),
    "turned": ("iio", (N, H, WIDTH), "bthn,nhd->btd", (4, 3, H, N), lambda x: x.swapaxes(2, 3)),
    "out_in": ("oi", (7, WIDTH), "btd,fd->btf", (4, 3, WIDTH), None),
    "expert.layers": ("lio", (E, WIDTH, 7), "ebd,edf->ebf", (E, 4, WIDTH), lambda x: x),
    "dense.layers": ("lio", (E, WIDTH, 7), "bd,edf->ebf", (4, WIDTH), lambda x: np.stack([x] * E)),
    "summed.layers": ("lio", (E, WIDTH, 7), "ebd,edf->bf", (E, 4, WIDTH), lambda x: x),
    "second.layers": ("ilo", (WIDTH, E, 7), "bed,def->bef", (4, E, WIDTH), "transposed"),
}


def module_of(name):
    return name.removesuffix(".layers")


def product_setup():
    rng = np.random.default_rng(3)
    params, shapes, axes, x, expected = {}, {}, {}, {}, {}
    for name, (letters, shape, _, given, view) in PRODUCTS.items():
        path = "layers." + module_of(name) if "l" in letters else name
        node = params
        for part in path.split(".")[:-1]:
            node = node.setdefault(part, {})
        node[path.rpartition(".")[2]] = {"kernel": jnp.asarray(random(rng, *shape))}
        axes[path.replace(".", "/")] = letters
        size = {
            x: int(np.prod([n for n, y in zip(shape, letters, strict=True) if y == x]))
            for x in "iol"
        }
        x[name] = jnp.asarray(random(rng, 1, *given)[0])
        seen = np.asarray(x[name])
        if "l" in letters:
            seen = seen.swapaxes(0, 1) if view == "transposed" else view(seen)
            for i in range(E):
                full = f"layers.{i}.{module_of(name)}"
                shapes[full] = size["o"], size["i"]
                expected[full, 0] = seen[i]
        else:
            shapes[path] = size["o"], size["i"]
            expected[path, 0] = (view(seen) if view else seen).reshape(-1, size["i"])
    return params, shapes, axes, x, expected


def kernel(params, name):
    letters = PRODUCTS[name][0]
    path = ("layers." + module_of(name) if "l" in letters else name).split(".")
    return functools.reduce(lambda node, part: node[part], [*path, "kernel"], params)


@pytest.mark.wide
@pytest.mark.parametrize("full", [False, True])
def test_every_order_of_axes(full):
    params, shapes, axes, x, expected = product_setup()

    def forward(params, x):
        return [jnp.einsum(PRODUCTS[name][2], x[name], kernel(params, name)) for name in PRODUCTS]

    (adapter,) = adapters_of(shapes)[:1]
    options = {"axes": axes, "full": full, "source": "base"}
    statistics = cm.collect(params, [adapter], [[x]], forward, **options)
    assert_inputs(statistics, [adapter], expected)


@jax.custom_vjp
def custom(x, w):
    return x @ w


custom.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))


def while_loop(x, w):
    return jax.lax.while_loop(lambda i: i[0] < E, lambda i: (i[0] + 1, i[1] @ w[i[0]]), (0, x))[1]


def heads(x, w):
    """Kernels that are cut, scaled, rounded and put together in another way."""
    moved = w.astype(jnp.bfloat16).astype(jnp.float32) * 0.5 + jnp.ones_like(w)
    left, right = jnp.split(moved, 2, axis=1)
    both = jnp.stack([x @ left[:, ::-1], (right.T @ x.T).T])
    return jnp.concatenate(list(both), axis=1)


# Programs of x (4, WIDTH) and a stack of three kernels; by default each one's inputs are the last
# one's outputs.
PROGRAMS = {
    "unrolled": lambda x, w: functools.reduce(lambda x, i: x @ w[i], range(E), x),
    "scan": lambda x, w: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0],
    "reverse": lambda x, w: jax.lax.scan(lambda x, w: (x @ w, w), x, w[::-1], reverse=True),
    "for": lambda x, w: jax.lax.fori_loop(0, E, lambda i, x: x @ w[i], x),
    "while": while_loop,
    "carried": lambda x, w: jax.lax.scan(
        lambda c, i: ((c[0] @ c[1][i], c[1]), None), (x, w), jnp.arange(E)
    )[0][0],
    "jit and remat": lambda x, w: jax.jit(
        lambda x: jax.lax.scan(jax.checkpoint(lambda x, w: (x @ w, None)), x, w)[0]
    )(x),
    "custom": lambda x, w: functools.reduce(lambda x, i: custom(x, w[i]), range(E), x),
    "cond": lambda x, w: jax.lax.scan(
        lambda x, w: (jax.lax.cond(x.sum() > 1e6, lambda x: x, lambda x: x @ w, x), None), x, w
    )[0],
    "vmap": lambda x, w: jax.vmap(lambda x: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0])(x),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_way_to_run_layers(name):
    rng = np.random.default_rng(4)
    w, x = random(rng, E, WIDTH, WIDTH) / 4, random(rng, 4, WIDTH)
    (adapter,) = adapters_of({f"layers.{i}.lin": (WIDTH, WIDTH) for i in range(E)})[:1]
    expected, y = {}, x
    for i in range(E):
        expected[f"layers.{i}.lin", 0] = y
        y = y @ w[i]

    def forward(params, x):
        return PROGRAMS[name](x, params["layers"]["lin"]["kernel"])

    params = {"layers": {"lin": {"kernel": w}}}
    statistics = cm.collect(params, [adapter], [[x]], forward, source="base", scan_axis=0)
    assert_inputs(statistics, [adapter], expected)


def test_kernels_that_are_moved_and_used_again():
    rng = np.random.default_rng(5)
    w, x = random(rng, WIDTH, WIDTH), random(rng, 4, WIDTH)
    (adapter,) = adapters_of({"lin": (WIDTH, WIDTH)})[:1]

    def forward(params, x):
        return heads(x, params["lin"]["kernel"])

    given = {"lin": {"kernel": w}}, [adapter], [[x]]
    statistics = cm.collect(*given, forward, source="base")
    assert_inputs(statistics, [adapter], {("lin", 0): np.concatenate([x, x])})


def test_experts_that_no_input_reaches():
    rng = np.random.default_rng(6)
    w, x = random(rng, E, WIDTH, 7), random(rng, 4, WIDTH)
    (adapter,) = adapters_of({f"layers.{i}.lin": (7, WIDTH) for i in range(E)})[:1]

    def grouped(params, x):
        tokens = jnp.zeros((E, 4, WIDTH)).at[jnp.asarray([0, 2, 2, 0]), jnp.arange(4)].set(x)
        return jnp.einsum("ebd,edf->ebf", tokens, params["layers"]["lin"]["kernel"])

    def ragged(params, x):
        kernel, sizes = params["layers"]["lin"]["kernel"], jnp.asarray([2, 0, 2])
        return jax.lax.ragged_dot(x[jnp.asarray([0, 3, 1, 2])], kernel, sizes)

    given = {"layers": {"lin": {"kernel": w}}}, [adapter], [[x]]
    rows = {0: x[[0, 3]], 1: x[:0], 2: x[[1, 2]]}
    expected = {(f"layers.{i}.lin", 0): rows[i] for i in range(E)}
    for forward in (grouped, ragged):
        for full in (False, True):
            statistics = cm.collect(*given, forward, source="base", full=full)
            assert_inputs(statistics, [adapter], expected)
    with pytest.raises(cm.MismatchError, match=r"'layers\.0\.lin' has inputs that are sorted"):
        cm.collect(*given, ragged, source="base", mask=lambda x: jnp.ones(len(x)))


def products(program):
    """The number of products in a program, with those of the programs in it."""
    count = 0
    for eqn in program.eqns:
        inner = [x for x in eqn.params.values() if isinstance(x, core.ClosedJaxpr | core.Jaxpr)]
        count += eqn.primitive.name == "dot_general"
        count += sum(products(getattr(x, "jaxpr", x)) for x in inner)
    return count


@pytest.mark.wide
def test_models_run_once(model):
    """One program for all batches, with two products a module more than the model has."""
    adapters, calls = model_adapters(), []

    def forward(model, x):
        calls.append(x)
        return model(x)

    cm.collect(model, adapters, batches_of(BATCH, WIDTH), forward)
    assert len(calls) == 1
    made = collector(model, adapters, run)
    alone, x = made.parameters(0), jnp.ones((BATCH, WIDTH))
    before = products(jax.make_jaxpr(made.plan.forward)(alone, x).jaxpr)
    after = products(jax.make_jaxpr(made.plan.sums)(alone, made.stacks, x).jaxpr)
    assert after == before + 2 * len(made.squares)


# --- Devices and transformations -----------------------------------------------------------------


def explicit(adapters, batches, there=None):
    """Statistics of the first layer, whose inputs may have explicit axes."""
    (adapter,) = adapters[:1]
    module = {"blocks.0.up": adapter["blocks.0.up"]}
    (x, *_), *_ = batches
    w = jnp.ones((WIDTH, 2 * WIDTH))
    if there is not None:
        x, w = (
            jax.device_put(y, NamedSharding(there, P(*p))) for y, p in ((x, ["modules"]), (w, []))
        )
    given = {"blocks": {"0": {"up": {"kernel": w}}}}, [adapter.replace(modules=module)], [[x]]
    return cm.collect(
        *given,
        lambda p, x: jnp.tanh(x) @ p["blocks"]["0"]["up"]["kernel"],
        source="base",
        mask=lambda x: jnp.ones(x.shape[:2]),
    )


@pytest.mark.usefixtures("all_devices")
def test_shared_batches(model):
    adapters, batches = model_adapters(), batches_of(BATCH, LENGTH, WIDTH, count=1)
    expected = cm.collect(model, adapters, batches, run)
    there = mesh(2)
    spread = [
        [jax.device_put(x, NamedSharding(there, P("modules"))) for x in several]
        for several in batches
    ]
    assert_equal(cm.collect(model, adapters, spread, run), expected)
    assert_equal(explicit(adapters, batches), explicit(adapters, batches, mesh(2, mode=EXPLICIT)))
    made = collector(Scanned(model), adapters, run)
    one = [several[0] for several in batches]
    assert_equal(jax.jit(lambda made, one: made(one))(made, one), expected)
    part = jax.shard_map(
        lambda made, one: made(one).psum("modules"),
        mesh=there,
        in_specs=(P(), P("modules")),
        out_specs=P(),
    )
    assert_equal(jax.jit(part)(made, one), expected)
    mapped = jax.vmap(lambda one: made(one).psum("half"), axis_name="half", out_axes=None)
    halves = [x.reshape(2, -1, *x.shape[1:]) for x in one]
    assert_equal(mapped(halves), expected)


@pytest.mark.wide
def test_sums_of_float64():
    with jax.enable_x64(True):
        shapes = {"lin": (7, WIDTH)}
        adapters = adapters_of(shapes, dtype="float64")[:2]
        rng = np.random.default_rng(7)
        params = {"lin": {"kernel": jnp.asarray(random(rng, WIDTH, 7, dtype="float64"))}}
        x = random(rng, 50, WIDTH, dtype="float64")
        found = cm.collect(params, adapters, [[x], [x]], lambda p, x: x @ p["lin"]["kernel"])
        assert found["lin"].matrices.dtype == np.float64
        assert_inputs(found, adapters, {("lin", 0): x, ("lin", 1): x}, 1e-14)


# --- Real models ---------------------------------------------------------------------------------


@pytest.mark.wide
def test_the_demo():
    base = traverse_util.unflatten_dict(dict(demo.base()), sep=".")
    adapters = [cm.load_peft(path) for path in demo.adapters()]
    images = demo.questions("validation")[0][:, :4]

    def forward(params, images):
        return demo.forward(traverse_util.flatten_dict(params, sep="."), images)

    statistics = cm.collect(base, adapters, [[x] for x in images], forward)
    assert (statistics.counts == 4 * 16).all()
    # The first layer's inputs do not depend on adapters.
    alone = cm.collect(base, adapters, [[x] for x in images], forward, source="base")
    for path, gram in statistics.items():
        change = distance(gram.matrices, alone[path].matrices)
        assert (change < 1e-5) == (path in [f"blocks.0.{x}_proj" for x in "qkv"])


class Heads(nnx.Module):
    """Layers that qwix splits in different ways."""

    def __init__(self, rngs):
        self.q_proj = nnx.Einsum("BD,DNH->BNH", (WIDTH, N, H), rngs=rngs)
        self.o_proj = nnx.Einsum("BNH,NHD->BD", (N, H, WIDTH), rngs=rngs)
        self.shared = nnx.Einsum("EBD,EDF->EBF", (E, WIDTH, 7), rngs=rngs)
        self.moe = nnx.LinearGeneral(WIDTH, 7, batch_axis={0: E}, rngs=rngs)

    def __call__(self, x):
        tokens = jnp.stack([jnp.roll(x, i, 0) for i in range(E)])
        o = self.o_proj(jnp.tanh(self.q_proj(x)))
        return o, self.shared(tokens), self.moe(tokens)


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_of_qwix():
    qwix = pytest.importorskip("qwix")
    x = batches_of(BATCH, WIDTH, count=1, tasks=1)[0][0]
    base = Heads(nnx.Rngs(0))
    provider = qwix.LoraProvider(module_path=".*", rank=4, alpha=6.0)
    model = qwix.apply_lora_to_model(base, provider, x, rngs=nnx.Rngs(1))
    adapters = adapters_of(
        {path: lora.shape for path, lora in cm.from_nnx(model, alpha=6.0).items()}
    )
    found = cm.collect(model, adapters, [[x]] * 3, run, alpha=6.0)
    rows = np.asarray(x, np.float64)
    kernel = np.asarray(base.q_proj.kernel[...], np.float64).reshape(WIDTH, N * H)
    tokens = [np.roll(rows, i, 0) for i in range(E)]
    expected = {}
    for t, adapter in enumerate(adapters):
        q = adapter["q_proj"].dense().T if "q_proj" in adapter else 0.0
        inputs = {
            "q_proj": rows,
            "o_proj": np.tanh(rows @ (kernel + q)),
            # One update for all experts: each one's inputs are a part of the module's.
            "shared": np.concatenate([np.kron(np.eye(E)[i], tokens[i]) for i in range(E)]),
            **{f"moe[{i}]": tokens[i] for i in range(E)},
        }
        expected |= {(path, t): inputs[path] for path in adapter}
    assert_inputs(found, adapters, expected)


# --- Errors --------------------------------------------------------------------------------------

SMALL = {"lin": (7, WIDTH)}


def collect_small(forward, shapes=None, adapters=None, batches=None, **options):
    params = {"lin": {"kernel": jnp.ones((WIDTH, 7))}, "conv": {"kernel": jnp.ones((3, 2, 4))}}
    adapters = adapters or adapters_of(shapes or SMALL)[:1]
    batches = [[jnp.ones((4, WIDTH))]] if batches is None else batches
    return cm.collect(params, adapters, batches, forward, **options)


def used(params, x):
    return x @ params["lin"]["kernel"]


@pytest.mark.parametrize(
    ("forward", "error", "message"),
    [
        (lambda _, x: x, cm.MismatchError, "'lin': forward multiplies nothing with its weight"),
        (
            lambda p, x: x @ jnp.abs(p["lin"]["kernel"]),
            cm.UnsupportedError,
            "module 'lin': its weight 'lin/kernel' goes through 'abs'",
        ),
        (
            lambda p, x: x[:, :7] @ p["lin"]["kernel"].T,
            cm.UnsupportedError,
            "multiplied along other axes than its inputs",
        ),
        (
            lambda p, _: p["lin"]["kernel"].T @ p["lin"]["kernel"],
            cm.UnsupportedError,
            "a product with another of the weights",
        ),
        (
            lambda p, _: jax.lax.fori_loop(
                0, 2, lambda _, w: w.T.reshape(w.shape), p["lin"]["kernel"]
            ),
            cm.UnsupportedError,
            "a loop that changes it",
        ),
    ],
)
def test_weights_whose_inputs_are_not_known(forward, error, message):
    with pytest.raises(error, match=message):
        collect_small(forward)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"shapes": {"lni": (7, WIDTH)}}, cm.MismatchError, "no kernel for .*nearest is 'lin/ker"),
        ({"batches": []}, cm.MismatchError, "batches of 0 tasks for 1 adapters"),
        ({"batches": [[]]}, cm.MismatchError, r"batches\[0\] is empty; .*adapter 'task0'"),
        ({"batches": [jnp.ones((4, WIDTH))]}, cm.RecipeError, "is a single batch"),
        ({"batches": {"task0": []}}, cm.RecipeError, "expected a list"),
        ({"source": "mine"}, cm.RecipeError, "source='mine'"),
        ({"alpha": 2.0}, cm.FormatError, "alpha is about LoRA factors"),
    ],
)
def test_arguments_that_do_not_fit(options, error, message):
    with pytest.raises(error, match=message):
        collect_small(used, **options)


@pytest.mark.wide
def test_a_merge_with_more_modules():
    """The merge that reads the inputs may have modules that no adapter has."""
    rng = np.random.default_rng(8)
    params = {x: {"kernel": jnp.asarray(random(rng, WIDTH, WIDTH))} for x in ("one", "two")}
    x = random(rng, 4, WIDTH)
    merge, _, alone = adapters_of({"one": (WIDTH, WIDTH), "two": (WIDTH, WIDTH)})
    alone = alone.replace(modules={"one": alone["one"]})
    found = cm.collect(
        params,
        [alone],
        [[x]],
        lambda params, x: x @ params["two"]["kernel"] @ params["one"]["kernel"],
        source=merge,
    )
    kernel = np.asarray(params["two"]["kernel"]) + merge["two"].dense().T
    assert_inputs(found, [alone], {("one", 0): x @ kernel})


@pytest.mark.wide
def test_adapters_that_do_not_fit(model):
    small = adapters_of(SMALL)[0]
    conv = cm.Kind("conv2d", kernel=(3, 2, 2))
    for adapter, error, message in (
        (
            cm.Adapter({"lin": small["lin"].replace(kind=conv)}),
            cm.UnsupportedError,
            "'lin' is of kind 'conv2d'",
        ),
        (small.replace(extras={"bias": np.ones(3)}), cm.UnsupportedError, "has 1 tensors that"),
    ):
        with pytest.raises(error, match=message):
            collect_small(used, adapters=[adapter])
    batches = batches_of(BATCH, WIDTH, tasks=1)
    with pytest.raises(
        cm.MismatchError, match=r"no LoRA factors for module 'blocks\.0\.upp'; near"
    ):
        cm.collect(model, adapters_of({"blocks.0.upp": (24, 12)})[:1], batches, run)
    with pytest.raises(cm.MismatchError, match=r"is \(20, 12\) \(m, n\) in the adapters, and"):
        cm.collect(model, adapters_of({"blocks.0.up": (20, 12)})[:1], batches, run)


def test_all_modules_of_a_model_are_its_own():
    """Also those that have the names of an optimizer's moments."""

    class Pair(nnx.Module):
        def __init__(self, rngs):
            self.model, self.mu = Block(rngs=rngs), Block(rngs=rngs)

        def __call__(self, x):
            return self.mu(self.model(x))

    adapters = [cm.from_nnx(Pair(nnx.Rngs(seed)), name=str(seed)) for seed in range(3)]
    batches = batches_of(BATCH, WIDTH)
    found = cm.collect(Pair(nnx.Rngs(0)), adapters, batches, run)
    assert set(found) == set(adapters[0]) == {f"{x}.{y}" for x in ("model", "mu") for y in SHAPES}
