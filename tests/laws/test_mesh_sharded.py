"""Sharded arrays, and the communication of eight devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import KEY, assert_same, distance, narrow, plain_merge, plain_stream, random_adapters
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from many_devices import CASES, RANKS, SHAPES, mesh, put

import coremerge_jax as cm
from coremerge_jax.linalg import basis
from coremerge_jax.merging import program
from coremerge_jax.merging.groups import group_modules
from coremerge_jax.merging.stacks import stack_factors
from coremerge_jax.rules import Equivariance, chain

pytestmark = pytest.mark.usefixtures("all_devices")

COLLECTIVE = re.compile(
    r"= (.+?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    r"|collective-broadcast|ragged-all-to-all)(?:-start)?\("
)


MESHES = {"8": mesh(8), "4x2": mesh(4, 2)}
every_mesh = pytest.mark.parametrize("there", MESHES.values(), ids=MESHES)
every_mode = pytest.mark.parametrize(
    "mode", [pytest.param(AxisType.Auto, marks=pytest.mark.wide), AxisType.Explicit]
)


@pytest.fixture
def adapters():
    return random_adapters(SHAPES, RANKS, dtype="float32")


def mesh_of(adapters):
    return jax.tree.leaves(adapters)[0].sharding.mesh


def collectives(adapters, rule, there):
    """What devices tell each other in the compiled program of each stack: kinds and shapes."""
    stream = plain_stream(adapters, rule, mesh=there, key=KEY)
    job, found = stream._job, []
    for batch in stream._batches:
        given = stack_factors(batch, job.present.adapters)
        with job.prepared(batch, *given) as (arrays, settings):
            lowered = program.merge_stack.lower(job.rule, arrays, job.key, settings=settings)
            found += COLLECTIVE.findall(lowered.compile().as_text())
    return found


def test_module_parallel_programs_tell_each_other_nothing(adapters):
    for rule in (cm.chain(cm.tsv(), cm.isotropize()), cm.chain(cm.dare(), cm.ties())):
        assert collectives(adapters, rule, mesh(8)) == []
        assert collectives(put(adapters, mesh(8)), rule, mesh(8)) == []


@pytest.mark.parametrize("rule", [cm.chain(cm.tsv(), cm.isotropize()), cm.ties(), cm.mean()])
def test_spread_modules_tell_each_other_their_gram_matrices(rule):
    adapters = random_adapters({"q": (75, 90)}, RANKS, dtype="float32")
    found = collectives(adapters, rule, mesh(4, 2))
    assert {kind for _, kind in found} <= {"all-reduce"}
    sizes = {size for shape, _ in found for size in re.findall(r"f64\[([\d,]+)\]", shape)}
    grams = set() if rule.equivariance == Equivariance.LINEAR else {"9,9"}
    assert sizes == grams


@every_mode
@every_mesh
def test_factors_that_are_sharded_come_back_so(adapters, there, mode):
    expected = plain_merge(adapters, cm.tsv())
    sharded = put(adapters, mesh(*there.devices.shape, mode=mode))
    merged = plain_merge(sharded, cm.tsv(), mesh=mesh_of(sharded))
    assert_same(merged, expected, 1e-6)
    for path, lora in merged.items():
        for x, like in ((lora.a, sharded[0][path].a), (lora.b, sharded[0][path].b)):
            assert x.sharding.is_equivalent_to(like.sharding, 2)


@every_mode
@every_mesh
def test_inside_jit(adapters, there, mode):
    sharded = put(adapters, mesh(*there.devices.shape, mode=mode))
    same = mesh_of(sharded)
    merge = jax.jit(lambda adapters: plain_merge(adapters, cm.tsv(), mesh=same))
    expected = plain_merge(adapters, cm.tsv())
    assert_same(merge(sharded), expected, 1e-5)
    with jax.set_mesh(same):
        assert_same(merge(sharded), expected, 1e-5)


def test_stacks_go_from_each_device_to_where_they_belong(adapters):
    """All devices exchange parts; none, and not all of them, gets everything."""
    del adapters
    sharded = put(random_adapters({f"q.{i}": (24, 64) for i in range(8)}, RANKS), mesh(8))
    a, _ = stack_factors(group_modules(sharded)[0], sharded)
    assert a.sharding.spec[2] == "modules"
    to = NamedSharding(mesh(8), P("modules"))
    text = jax.jit(lambda x: x, out_shardings=to).lower(a).compile().as_text()
    assert [kind for _, kind in COLLECTIVE.findall(text)] == ["all-to-all"]


def test_arrays_of_one_device_come_back_there(adapters):
    on_one = jax.device_put(adapters, jax.devices()[3])
    merged = plain_merge(on_one, cm.tsv(), mesh=mesh(4, 2))
    assert_same(merged, plain_merge(adapters, cm.tsv()), 1e-6)
    assert {x.device for x in jax.tree.leaves(merged)} == {jax.devices()[3]}


def test_explicitly_sharded_factors_need_a_mesh(adapters):
    sharded = put(random_adapters({"q": (16, 24)}, RANKS), mesh(8, mode=AxisType.Explicit))
    for merge in (cm.merge, jax.jit(cm.merge, static_argnums=1)):
        with pytest.raises(cm.UnsupportedError, match="say with mesh= which devices"):
            merge(sharded, cm.mean())
    alone = jax.make_mesh((1,), ("modules",), axis_types=(AxisType.Explicit,))
    merged = plain_merge(put(adapters, alone), cm.tsv(), mesh=alone)
    assert_same(merged, plain_merge(adapters, cm.tsv()), 1e-6)


@pytest.mark.parametrize("traced", [False, True])
def test_products_of_factors_whose_types_say_where_they_are(traced):
    sharded = put(random_adapters({"q": (16, 24)}, RANKS), mesh(2, 4, mode=AxisType.Explicit))
    lora, like = sharded[0]["q"], random_adapters({"q": (16, 24)}, RANKS)[0]["q"]
    product = (jax.jit(cm.LoRA.dense) if traced else cm.LoRA.dense)(lora)
    assert product.sharding.spec == P("features", None)
    assert distance(np.asarray(product), like.dense()) < 1e-6


def test_all_else_takes_factors_whose_types_say_where_they_are():
    adapters = random_adapters({"q": (16, 24)}, RANKS)
    sharded = put(adapters, mesh(2, 4, mode=AxisType.Explicit))
    assert_same(
        cm.project(sharded).merge(cm.mean(), scale=1.0), plain_merge(adapters, cm.mean()), 1e-6
    )
    cut, _ = cm.truncate(sharded[0], rank=1)
    assert_same(cut, cm.truncate(adapters[0], rank=1)[0], 1e-5)
    for x, like in ((cut["q"].a, sharded[0]["q"].a), (cut["q"].b, sharded[0]["q"].b)):
        assert x.sharding == like.sharding
    found, expected = cm.diagnose(sharded, sharded[0]), cm.diagnose(adapters, adapters[0])
    np.testing.assert_allclose(found.by_adapter("norms"), expected.by_adapter("norms"), rtol=1e-5)
    for traced in (lambda x: cm.project(x), lambda x: cm.truncate(x[0], rank=1)):
        with pytest.raises(cm.UnsupportedError, match="explicit axes"):
            jax.jit(traced)(sharded)


# --- The pure functions, in a user's own shard_map ---------------------------------------------


@pytest.mark.parametrize("name", narrow(["ties", "svc", "tsv"], ["ties"]))
def test_functions_under_shard_map(name):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((8, 9, 70)), rng.standard_normal((8, 66, 9))
    rule = chain(CASES[name])
    elementwise = rule.equivariance == Equivariance.ELEMENTWISE

    def merge(a, b):
        projected = cm.core().project(a, b, RANKS, elementwise=elementwise)
        return projected.merge(rule, key=KEY).dense()

    many = jax.shard_map(
        jax.vmap(merge), mesh=mesh(8), in_specs=(P("modules"), P("modules")), out_specs=P("modules")
    )
    with jax.enable_x64(True):
        assert distance(jax.jit(many)(a, b), jax.jit(jax.vmap(merge))(a, b)) < 1e-12


def spread_merge(rule, axis=None):
    def merge(a, b):
        lora = cm.core().project(a, b, RANKS, elementwise=False, axis=axis).merge(rule)
        return lora.a, lora.b

    specs = P(None, "features"), P("features", None)
    return jax.shard_map(merge, mesh=mesh(1, 8), in_specs=specs, out_specs=specs) if axis else merge


def test_a_gradient_through_spread_modules():
    rng = np.random.default_rng(0)
    a, b, w = (rng.standard_normal(shape) for shape in ((9, 72), (64, 9), (64, 72)))

    def loss(factors, axis):
        new_a, new_b = spread_merge(cm.isotropize(), axis)(*factors)
        return jnp.sum((new_b @ new_a) * w)

    with jax.enable_x64(True):
        gradient = jax.jit(jax.grad(loss), static_argnums=1)
        one, many = (gradient((a, b), axis) for axis in (None, "features"))
    for x, y in zip(one, many, strict=True):
        assert distance(np.asarray(y), np.asarray(x)) < 1e-9


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 3e-6), ("float64", 1e-14)])
def test_bases_of_spread_matrices(dtype, tolerance):
    """As exact as the matrix allows, whatever its condition; copies of columns count once."""
    rtol = 10 * float(np.finfo(dtype).eps)

    def find(x):
        found, coordinates, rank, _ = basis(x, rtol, singular=True, axis="features")
        return found.columns(), coordinates, rank

    specs = P("features"), P(), P()
    with jax.enable_x64(dtype == "float64"):
        spread = jax.jit(
            jax.shard_map(find, mesh=mesh(1, 8), in_specs=P("features"), out_specs=specs)
        )
        for condition in (1, 1e3, 1e6, 1e9):
            x = ill_conditioned(condition).astype(dtype)
            columns, coordinates, rank = map(np.asarray, spread(x))
            s = np.linalg.svd(x.astype(np.float64))[1]
            assert rank == np.sum(s > rtol * s[0])
            assert distance(columns.astype(np.float64) @ coordinates, x) < 10 * tolerance
            gram = columns[:, :rank].T.astype(np.float64) @ columns[:, :rank]
            assert np.abs(gram - np.eye(rank)).max() < tolerance * s[0] / s[rank - 1]
            assert not coordinates[rank:].any()
            assert not coordinates[:, -1].any()


def ill_conditioned(condition):
    rng = np.random.default_rng(0)
    u, _, v = np.linalg.svd(rng.standard_normal((40, 6)), full_matrices=False)
    x = u * np.geomspace(1, 1 / condition, 6) @ v
    return np.concatenate([x, x[:, :2], np.zeros((40, 1))], axis=1)
