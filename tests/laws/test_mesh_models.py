"""Models and checkpoints that are spread over eight devices."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import many_devices
import numpy as np
import orbax.checkpoint as ocp0
import pytest
from flax import nnx
from helpers import assert_same, plain_merge, random_adapters
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp

import coremerge_jax as cm

pytestmark = pytest.mark.usefixtures("all_devices")

LAYERS = {f"layers.{i}.x": (32, 16) for i in range(4)}
SPECS = {
    "layers": P("x"),
    "inputs": P(None, ("x", "y")),
    "outputs": P(None, None, "y", "x"),
    "both": P(None, "y", "x"),
    "replicated": P(),
}
LORA = {"lora_rank": 2, "lora_alpha": 8}


def mesh(mode=AxisType.Auto, shape=(4, 2)):
    return jax.make_mesh(shape, ("x", "y"), axis_types=(mode, mode))


def layers(dtype="float32"):
    """Kernels of stacked layers, with two axes of outputs."""
    kernel = np.random.default_rng(0).standard_normal((4, 16, 4, 8))
    return {"layers": {"x": {"kernel": kernel.astype(dtype)}, "norm": np.ones(16, np.float32)}}


def put(tree, sharding):
    """On all devices; what has one axis, replicated."""
    whole = NamedSharding(sharding.mesh, P())
    return jax.tree.map(lambda x: jax.device_put(x, sharding if x.ndim > 1 else whole), tree)


def kernel_of(tree):
    return tree["layers"]["x"]["kernel"]


@pytest.fixture
def adapter():
    return random_adapters(LAYERS, [2], dtype="float32")[0]


def test_there_are_eight():
    assert jax.device_count() == 8


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit])
def test_shardings_stay(adapter, mode, spec, donate):
    expected = cm.fold_tree(layers(), adapter, scale=0.5)
    params = put(layers(), NamedSharding(mesh(mode), SPECS[spec]))
    sharding = kernel_of(params).sharding
    folded = cm.fold_tree(params, adapter, scale=0.5, donate=donate)
    assert kernel_of(folded).sharding == sharding
    assert folded["layers"]["norm"] is params["layers"]["norm"]
    assert kernel_of(params).is_deleted() == donate
    np.testing.assert_allclose(kernel_of(folded), kernel_of(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit])
def test_inside_jit_each_device_computes_its_part(adapter, mode, spec):
    params = put(layers("bfloat16"), NamedSharding(mesh(mode), SPECS[spec]))
    fold = jax.jit(cm.fold_tree, donate_argnums=0)
    program = fold.lower(params, adapter).compile()
    assert "all-gather" not in program.as_text()
    expected = cm.fold_tree(layers("bfloat16"), adapter)
    before = kernel_of(params)
    after = kernel_of(fold(params, adapter))
    assert before.is_deleted()
    assert after.sharding.is_equivalent_to(before.sharding, after.ndim)
    np.testing.assert_allclose(
        after.astype(jnp.float32), kernel_of(expected).astype(np.float32), rtol=2**-7
    )


@pytest.mark.parametrize("spec", [P("x"), P(None, "x")])
@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit])
def test_factors_that_are_sharded_too(adapter, mode, spec):
    there = mesh(mode, (2, 4))
    params = put(layers(), NamedSharding(there, P(None, "x", "y")))
    sharded = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(there, spec)), adapter)
    expected = kernel_of(cm.fold_tree(layers(), adapter))
    for fold in (cm.fold_tree, jax.jit(cm.fold_tree)):
        folded = kernel_of(fold(params, sharded))
        np.testing.assert_allclose(folded, expected, rtol=1e-5, atol=1e-6)


def test_a_merge_is_folded_where_the_model_is(adapter):
    merged = plain_merge([adapter, adapter], cm.mean())
    params = put(layers(), NamedSharding(mesh(), SPECS["both"]))
    folded, expected = cm.fold_tree(params, merged), cm.fold_tree(layers(), adapter)
    np.testing.assert_allclose(kernel_of(folded), kernel_of(expected), rtol=1e-4, atol=1e-5)


def factors(adapter):
    """As qwix stacks layers, sharded over the inputs and outputs."""
    a = np.stack([lora.a.T for lora in adapter.values()])
    b = np.stack([lora.b.T / 4 for lora in adapter.values()])
    there = mesh()
    return {
        "layers": {
            "x": {
                "w_lora_a": jax.device_put(a, NamedSharding(there, P(None, ("x", "y")))),
                "w_lora_b": jax.device_put(b, NamedSharding(there, P("x", None, "y"))),
            }
        }
    }


def write_v0(path, tree, **options):
    with ocp0.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree, **options)


@pytest.mark.parametrize("write", [ocp.save, write_v0])
def test_sharded_factors_are_read(adapter, tmp_path, write):
    write(tmp_path / "c", factors(adapter), custom_metadata={"lora": LORA})
    found = cm.open_orbax(tmp_path / "c")
    assert_same(found, adapter, 1e-7)
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(dict(found)))


def restore_v1(path, abstract):
    return ocp.load(path, abstract)


def restore_v0(path, abstract):
    (item,) = (file.parent for file in path.glob("*/_METADATA"))
    with ocp0.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(item, abstract)


@pytest.mark.parametrize("restore", [restore_v1, restore_v0])
@pytest.mark.parametrize(
    "sharding",
    [
        NamedSharding(mesh(shape=(8, 1)), P(None, "x")),
        NamedSharding(mesh(shape=(2, 4)), P("x", "y")),
        NamedSharding(mesh(AxisType.Explicit), P()),
    ],
    ids=["8", "2 x 4", "replicated"],
)
def test_what_is_written_is_restored_with_any_sharding(adapter, tmp_path, restore, sharding):
    cm.save_orbax(adapter, tmp_path / "adapter")
    tree = ocp.metadata(tmp_path / "adapter").metadata

    def want(leaf):
        fits = all(n % 8 == 0 for n in leaf.shape[1:2])
        there = sharding if fits else NamedSharding(sharding.mesh, P())
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=there)

    restored = restore(tmp_path / "adapter", jax.tree.map(want, tree))["layers"]["x"]
    a = np.stack([lora.a.T for lora in adapter.values()])
    b = np.stack([lora.b.T for lora in adapter.values()])
    assert restored["lora_a"].sharding == sharding
    np.testing.assert_array_equal(restored["lora_a"], a)
    np.testing.assert_array_equal(restored["lora_b"], b)


def test_a_sharded_base_in_a_checkpoint(adapter, tmp_path):
    params = put(layers(), NamedSharding(mesh(), SPECS["both"]))
    ocp.save(tmp_path / "base", params)
    cm.apply_adapter(adapter, tmp_path / "base", tmp_path / "out")
    sharding = NamedSharding(mesh(shape=(2, 4)), P("y", "x"))
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=sharding if x.ndim > 1 else NamedSharding(mesh(), P())
        ),
        layers(),
    )
    restored = kernel_of(ocp.load(tmp_path / "out", abstract))
    assert restored.sharding == sharding
    np.testing.assert_array_equal(restored, kernel_of(cm.fold_tree(layers(), adapter)))


def sharded_model(mode):
    """A model with factors whose inputs and outputs are on all devices."""
    model = nnx.LoRA(32, 4, 16, rngs=nnx.Rngs(0))
    rng, there = np.random.default_rng(0), mesh(mode)
    for variable, spec in ((model.lora_a, P("x", "y")), (model.lora_b, P("y", "x"))):
        value = rng.standard_normal(variable.shape).astype(np.float32)
        variable.set_value(jax.device_put(value, NamedSharding(there, spec)))
    return nnx.Dict(up=model)


@pytest.mark.parametrize(
    ("source", "rank"), [("devices", 4), ("host", 4), ("host", 5), ("host", 6)]
)
@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit])
def test_factors_of_a_model_stay_where_they_are(mode, source, rank):
    model = sharded_model(mode)
    adapter = cm.from_nnx(model)
    up = adapter["up"]
    assert up.a.sharding.device_set == up.b.sharding.device_set == set(jax.devices())
    assert up.a.addressable_shards[0].data.shape == (2, 8)
    host = jax.tree.map(np.asarray, adapter)
    if source == "host":
        wider = [(0, rank - 4), (0, 0)]
        a, b = np.pad(host["up"].a, wider), np.pad(host["up"].b, wider[::-1])
        adapter = cm.Adapter({"up": cm.LoRA(a, b)})
    cm.update_nnx(model, adapter)
    a, b = (x.get_value() for x in (model.up.lora_a, model.up.lora_b))
    axis = "y" if rank % 2 == 0 else None
    assert a.sharding.spec == P("x", axis)
    assert b.sharding.spec == P(axis, "x")
    expected = host["up"].b @ host["up"].a
    np.testing.assert_allclose((np.asarray(a) @ np.asarray(b)).T, expected, rtol=1e-4, atol=1e-5)


def test_factors_of_a_model_inside_jit():
    model = sharded_model(AxisType.Auto)

    @nnx.jit
    def double(model):
        adapter = cm.from_nnx(model)
        cm.update_nnx(model, jax.tree.map(lambda x: 2 * x, adapter))

    before = np.asarray(model.up.lora_a.get_value())
    double(model)
    after = model.up.lora_a.get_value()
    np.testing.assert_array_equal(after, 2 * before)
    assert after.sharding.is_equivalent_to(NamedSharding(mesh(), P("x", "y")), 2)


@pytest.mark.parametrize("spec", [P("x"), P(None, None, "x", "y")])
@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit])
def test_stacks_that_are_sharded_anywhere_are_taken_apart(mode, spec):
    rng = np.random.default_rng(0)
    shapes = {"w_lora_a": (4, 16, 2), "w_lora_b": (4, 2, 8, 8)}
    host = {
        "layers": {"q": {key: rng.standard_normal(x).astype("f4") for key, x in shapes.items()}}
    }
    there = mesh(mode)
    tree = jax.tree.map(
        lambda x: jax.device_put(x, NamedSharding(there, P(*spec[: x.ndim - 1]))), host
    )
    found, expected = (cm.from_tree(x, alpha=2, scan_axis=0) for x in (tree, host))
    assert_same(found, expected, 1e-7)
    for back in (cm.to_tree(x, tree, alpha=2, scan_axis=0) for x in (found, expected)):
        for x, y in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
            assert x.sharding == y.sharding
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit])
def test_heads_that_are_sharded_are_joined(mode):
    rng = np.random.default_rng(0)
    shapes = {"w_lora_a": (16, 2), "w_lora_b": (2, 8, 4)}
    host = {"layers_0": {"q": {k: rng.standard_normal(x).astype("f4") for k, x in shapes.items()}}}
    specs = {16: P("x"), 2: P(None, "x", None)}
    tree = jax.tree.map(
        lambda x: jax.device_put(x, NamedSharding(mesh(mode), specs[x.shape[0]])), host
    )
    found, expected = (cm.from_tree(x, alpha=2) for x in (tree, host))
    assert_same(found, expected, 1e-7)
    for back in (cm.to_tree(x, tree, alpha=2) for x in (found, expected)):
        for x, y in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
            assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
            np.testing.assert_array_equal(x, y)


@pytest.mark.nightly
def test_checkpoints_of_one_device_and_for_one(adapter, tmp_path):
    """Another process, of one device, writes what is read here, and reads what is written here."""
    environment = many_devices.environment(1, COREMERGE_TEST_FOLDER=str(tmp_path))

    def there(code):
        subprocess.run([sys.executable, "-c", HEADER + code], env=environment, check=True)

    cm.save_peft(adapter, tmp_path / "peft")
    there("cm.save_orbax(cm.load_peft(folder / 'peft'), folder / 'one')")
    assert_same(cm.open_orbax(tmp_path / "one"), adapter, 1e-7)
    ocp.save(tmp_path / "eight", factors(adapter), custom_metadata={"lora": LORA})
    ocp.save(tmp_path / "base", put(layers(), NamedSharding(mesh(), SPECS["both"])))
    there(
        "adapter = cm.open_orbax(folder / 'eight')\n"
        "cm.save_peft(adapter, folder / 'back')\n"
        "report = cm.apply_adapter(adapter, folder / 'base', folder / 'out')\n"
        "assert set(report.modules) == set(adapter.outline)\n"
        "assert all(np.isfinite(module.rounding_loss) for module in report.modules.values())"
    )
    assert_same(cm.load_peft(tmp_path / "back"), adapter, 1e-7)
    restored = kernel_of(ocp.load(tmp_path / "out", layers()))
    expected = kernel_of(cm.fold_tree(layers(), adapter))
    np.testing.assert_allclose(restored, expected, rtol=1e-5, atol=1e-6)


HEADER = """
import os, pathlib, jax, numpy as np, coremerge_jax as cm
folder = pathlib.Path(os.environ["COREMERGE_TEST_FOLDER"])
assert jax.device_count() == 1
"""
