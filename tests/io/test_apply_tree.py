"""Adapters folded into orbax checkpoints: what is changed, what is not, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp0
import pytest
from flax import nnx
from helpers import dense, distance, random_adapters
from orbax.checkpoint import v1 as ocp

import coremerge_jax as cm
from coremerge_jax.io.peft.writer import save_peft

LAYERS, EMBED, HEADS, HEAD_DIM = 3, 16, 2, 4
SHAPES = {
    f"model.layers.{i}.{name}": shape
    for i in range(LAYERS)
    for name, shape in {
        "self_attn.q_proj": (HEADS * HEAD_DIM, EMBED),
        "self_attn.o_proj": (EMBED, HEADS * HEAD_DIM),
        "mlp.down_proj": (EMBED, 24),
    }.items()
}
NAMES = {"names": "maxtext-llama3.1", "head_dim": HEAD_DIM}


@pytest.fixture
def adapter():
    return random_adapters(SHAPES, [2], dtype="float32")[0]


@pytest.fixture
def maxtext():
    """The parameters of a Llama as MaxText has them, layers along axis 1, and more beside them."""
    rng = np.random.default_rng(0)

    def kernel(*shape):
        return {"kernel": {"value": rng.standard_normal(shape).astype(jnp.bfloat16)}}

    attention = {
        "query": kernel(EMBED, LAYERS, HEADS, HEAD_DIM),
        "out": kernel(HEADS, LAYERS, HEAD_DIM, EMBED),
    }
    norm = {"scale": {"value": np.ones((EMBED, LAYERS), np.float32)}}
    layers = {"self_attention": attention, "mlp": {"wo": kernel(24, LAYERS, EMBED)}, "norm": norm}
    params = {"decoder": {"layers": layers}, "token_embedder": kernel(50, EMBED)}
    return {"params": {"params": params}, "step": 7, "opt_state": None, "more": [np.arange(3), {}]}


def save(path, tree, **custom):
    wide = (np.int64, np.float64)
    keep = lambda x: not np.ndim(x) or x.dtype in wide  # noqa: E731
    ocp.save(path, jax.tree.map(lambda x: x if keep(x) else jnp.asarray(x), tree), **custom)
    return path


def test_what_a_base_says_of_its_layers_counts(tmp_path):
    """As many layers as inputs."""
    (adapter,) = random_adapters({f"layers.{i}.x": (8, 3) for i in range(3)}, [2], dtype="float32")
    base = {"layers": {"x": {"kernel": np.zeros((3, 3, 8), np.float32)}}}
    save(tmp_path / "base", base)
    with pytest.raises(cm.FormatError, match="stacked along axis 0 or 1"):
        cm.apply_adapter(adapter, tmp_path / "base", tmp_path / "out")
    save(tmp_path / "told", base, custom_metadata={"scan_layers": True, "param_scan_axis": 1})
    cm.apply_adapter(adapter, tmp_path / "told", tmp_path / "out")
    found = load(tmp_path / "out")["layers"]["x"]["kernel"]
    np.testing.assert_allclose(found[:, 2], dense(adapter["layers.2.x"]).T, rtol=1e-5, atol=1e-6)


def load(path):
    """On the host."""
    found = ocp.metadata(path).metadata
    shape = lambda x: np.empty(x.shape, x.dtype) if hasattr(x, "shape") else x  # noqa: E731
    return ocp.load(path, jax.tree.map(shape, found))


def rotary(dense):
    """Outputs of the query as MaxText's Llama has them: pairs beside each other, over √head_dim."""
    heads = dense.reshape(HEADS, 2, HEAD_DIM // 2, -1).swapaxes(1, 2).reshape(dense.shape)
    return heads / np.sqrt(HEAD_DIM)


def test_scanned_layers_of_maxtext(adapter, maxtext, tmp_path):
    save(tmp_path / "base", maxtext, custom_metadata={"mine": {"x": [1, 2]}})
    cm.save_peft(adapter, tmp_path / "adapter")
    merged = cm.open_peft(tmp_path / "adapter")
    told = {"sources": [{"name": "math"}]}
    out = tmp_path / "out"
    report = cm.apply_adapter(merged, tmp_path / "base", out, scale=0.5, provenance=told, **NAMES)

    expected = jax.tree.map(lambda x: x, maxtext)
    layers = expected["params"]["params"]["decoder"]["layers"]
    updates = {path: 0.5 * dense(lora) for path, lora in adapter.items()}
    losses = {}
    for ours, theirs, shape, change in (
        ("self_attention.query", "self_attn.q_proj", (EMBED, HEADS, HEAD_DIM), rotary),
        ("self_attention.out", "self_attn.o_proj", (HEADS, HEAD_DIM, EMBED), None),
        ("mlp.wo", "mlp.down_proj", (24, EMBED), None),
    ):
        block, name = ours.split(".")
        kernel = layers[block][name]["kernel"]
        weight = kernel["value"].astype(np.float32)
        for i in range(LAYERS):
            update = updates[f"model.layers.{i}.{theirs}"]
            update = (change(update) if change else update).T.reshape(shape)
            exact = weight[:, i] + update.astype(np.float32)
            rounded = exact.astype(jnp.bfloat16).astype(np.float32)
            losses[f"decoder.layers.{i}.{ours}"] = distance(rounded, exact) * (
                np.linalg.norm(exact) / np.linalg.norm(update)
            )
            weight[:, i] = exact
        kernel["value"] = weight.astype(jnp.bfloat16)

    found = load(out)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        assert np.asarray(x).dtype == np.asarray(y).dtype, path
        # One step of bfloat16, where sums in another order round to the other side.
        tolerance = 2**-7 if np.asarray(x).dtype == jnp.bfloat16 else 0
        np.testing.assert_allclose(
            np.asarray(x, np.float32), np.asarray(y, np.float32), rtol=tolerance, err_msg=str(path)
        )

    assert set(report.modules) == set(losses)
    for path, module in report.modules.items():
        assert module.rounding_loss == pytest.approx(losses[path], rel=1e-2)
    query = report.modules["decoder.layers.2.self_attention.query"]
    assert query.tensor == "params/params/decoder/layers/self_attention/query/kernel"
    assert (query.shape, query.dtype) == ((EMBED, HEADS, HEAD_DIM), "bfloat16")
    custom = ocp.metadata(out).custom_metadata
    assert custom["mine"] == {"x": [1, 2]}
    assert custom["coremerge"]["sources"] == told["sources"]
    assert custom["coremerge"]["base"] == str(tmp_path / "base")
    content = json.loads((out / "coremerge.json").read_text())
    assert content["modules"].keys() == losses.keys()
    assert content["scale"] == custom["coremerge"]["scale"] == 0.5


def test_names_of_the_base_are_left_as_they_are(adapter, maxtext, tmp_path):
    save(tmp_path / "base", maxtext)
    cm.save_orbax(adapter, tmp_path / "adapter", to="maxtext-llama3.1", head_dim=HEAD_DIM)
    opened = cm.open_adapter(tmp_path / "adapter")
    one = cm.apply_adapter(opened, tmp_path / "base", tmp_path / "one", **NAMES)
    two = cm.apply_adapter(opened, tmp_path / "base", tmp_path / "two")
    three = cm.apply_adapter(adapter, tmp_path / "base", tmp_path / "three", **NAMES)
    assert set(one.modules) == set(two.modules) == set(three.modules)
    trees = [load(tmp_path / name) for name in ("one", "two", "three")]
    for leaves in zip(*map(jax.tree.leaves, trees), strict=True):
        np.testing.assert_array_equal(leaves[0], leaves[1])
        np.testing.assert_array_equal(leaves[0], leaves[2])


def test_the_tree_of_a_step_with_several_items(tmp_path):
    """As Tunix saves, read back by orbax's interfaces of both versions."""
    (adapter,) = random_adapters({"layers.0.q": (6, 8)}, [2], dtype="float32")
    kernel = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)
    tree = {"layers": {"0": {"q": {"kernel": jnp.asarray(kernel)}}}}
    names = ("model_params", "optimizer_state")
    with ocp0.CheckpointManager(tmp_path / "base", item_names=names) as manager:
        for step, saved in ((1, jax.tree.map(jnp.zeros_like, tree)), (2, tree)):
            args = {name: ocp0.args.StandardSave(saved) for name in names}
            manager.save(step, args=ocp0.args.Composite(**args))
        manager.wait_until_finished()
    update = dense(adapter["layers.0.q"]).T
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree)
    for options, weight in (({}, kernel), ({"step": 1, "item": "model_params"}, 0 * kernel)):
        out = tmp_path / f"out{len(options)}"
        report = cm.apply_adapter(adapter, tmp_path / "base", out, **options)
        assert report.skipped == ["optimizer_state"]
        with ocp0.StandardCheckpointer() as checkpointer:
            old = checkpointer.restore(out / "model_params", abstract)
        new = ocp.load(out, abstract, checkpointable_name="model_params")
        for found in (old, new):
            restored = found["layers"]["0"]["q"]["kernel"]
            np.testing.assert_allclose(restored, weight + update, rtol=1e-6, atol=1e-6)


def test_a_model_of_nnx_goes_on(tmp_path):
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Linear(8, 6, rngs=rngs), nnx.Dropout(0.5, rngs=rngs), nnx.Linear(6, 4, rngs=rngs)
    )
    (adapter,) = random_adapters({"layers.0": (6, 8), "layers.2": (4, 6)}, [2], dtype="float32")
    ocp.save(tmp_path / "base", nnx.state(model))
    cm.apply_adapter(adapter, tmp_path / "base", tmp_path / "out")
    folded = cm.fold_tree(nnx.state(model), adapter)
    restored = ocp.load(tmp_path / "out", nnx.state(model))
    for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(folded), strict=True):
        assert x.dtype == y.dtype
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = map(jax.random.key_data, (x, y))
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6)


def refusal(error, adapter, folder, **options):
    """The message; nothing is left, and the base is as it was."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(error) as caught:
        cm.apply_adapter(adapter, folder, folder.parent / "out", **options)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_names_that_are_not_there(adapter, maxtext, tmp_path):
    folder = save(tmp_path / "base", maxtext)
    message = refusal(cm.MismatchError, adapter, folder)
    assert (
        "no kernel for 9 of 9 modules: 'model.layers.0.self_attn.q_proj' (8, 16); nearest is"
        in message
    )
    assert "(--names)" in message
    (other,) = random_adapters({**SHAPES, "model.layers.3.mlp.down_proj": (EMBED, 24)}, [2])
    message = refusal(cm.MismatchError, other, folder, **NAMES)
    assert (
        "no kernel for 1 of 10 modules: 'decoder.layers.3.mlp.wo' (16, 24); nearest is" in message
    )
    wide = {path: (m, n + 8) for path, (m, n) in SHAPES.items()}
    message = refusal(cm.MismatchError, random_adapters(wide, [2])[0], folder, **NAMES)
    assert "no kernel for 9 of 9" in message
    assert "head_dim" in refusal(cm.UnsupportedError, adapter, folder, names="maxtext-llama3.1")
    assert "names 'llama'" in refusal(cm.RecipeError, adapter, folder, names="llama")


@pytest.mark.parametrize("dtype", ["int8", "uint8", "float8_e4m3fn"])
def test_quantized_bases(adapter, maxtext, tmp_path, dtype):
    quantized = {"qvalue": jnp.ones((8, 4), dtype), "scale": jnp.ones((1, 4))}
    maxtext["params"]["params"]["head"] = {"kernel": {"array": quantized}}
    message = refusal(cm.UnsupportedError, adapter, save(tmp_path / "base", maxtext), **NAMES)
    assert f"'params/params/head/kernel/array/qvalue' has dtype {dtype}" in message
    assert "then quantize" in message


def test_what_would_act_twice_or_has_no_place(adapter, maxtext, tmp_path):
    extras = adapter.replace(extras={"score.weight": np.ones((3, 6), np.float32)})
    folder = save(tmp_path / "base", maxtext)
    assert "'score.weight'" in refusal(cm.UnsupportedError, extras, folder, **NAMES)
    assert "scale is nan" in refusal(cm.RecipeError, adapter, folder, scale=np.nan, **NAMES)
    assert "no item 'x'" in refusal(cm.FormatError, adapter, folder, item="x")
    maxtext["params"]["params"]["decoder"]["layers"]["mlp"]["wo"]["kernel_lora_a"] = np.ones((2, 2))
    (tmp_path / "other").mkdir()
    folder = save(tmp_path / "other" / "base", maxtext)
    message = refusal(cm.UnsupportedError, adapter, folder, **NAMES)
    assert "wo/kernel_lora_a' is a LoRA factor (layout 'qwix')" in message


def test_a_base_in_float64(tmp_path):
    (adapter,) = random_adapters({"x": (6, 8)}, [2], dtype="float32")
    kernel = np.random.default_rng(0).standard_normal((8, 6))
    cm.apply_adapter(adapter, save(tmp_path / "base", {"x": {"w": kernel}}), tmp_path / "out")
    found = load(tmp_path / "out")["x"]["w"]
    assert found.dtype == np.float64
    np.testing.assert_allclose(found - kernel, dense(adapter["x"]).T, rtol=1e-5, atol=1e-6)


def test_values_that_do_not_fit(tmp_path):
    (adapter,) = random_adapters({"x": (6, 8)}, [2], dtype="float32")
    folder = save(tmp_path / "base", {"x": {"kernel": np.ones((8, 6), np.float16)}})
    message = refusal(cm.FormatError, adapter, folder, scale=1e6)
    assert "'x/kernel': the result has values that float16 cannot hold" in message


def test_a_failed_write_leaves_nothing(adapter, maxtext, tmp_path, monkeypatch):
    folder = save(tmp_path / "base", maxtext)

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ocp, "save", fail)
    assert "No space left" in refusal(OSError, adapter, folder, **NAMES)


def test_only_what_was_written_here_is_replaced(adapter, maxtext, tmp_path):
    folder = save(tmp_path / "base", maxtext)
    other = save(tmp_path / "other", maxtext)
    cm.save_orbax(adapter, tmp_path / "adapter")
    save_peft(adapter, tmp_path / "peft")
    for out in (folder, folder / "out", tmp_path, other, tmp_path / "adapter", tmp_path / "peft"):
        with pytest.raises(cm.FormatError, match="choose another output"):
            cm.apply_adapter(adapter, folder, out, force=True, **NAMES)
    cm.apply_adapter(adapter, folder, tmp_path / "out", **NAMES)
    with pytest.raises(cm.FormatError, match="already exists"):
        cm.apply_adapter(adapter, folder, tmp_path / "out", **NAMES)
    cm.apply_adapter(adapter, folder, tmp_path / "out", scale=0.0, force=True, **NAMES)
    for x, y in zip(jax.tree.leaves(load(tmp_path / "out")), jax.tree.leaves(maxtext), strict=True):
        np.testing.assert_array_equal(x, y)
