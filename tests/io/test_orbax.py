"""Orbax checkpoints: those of others are read, ours are restored by orbax itself."""

import json
import os
import pickle
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp0
import pytest
from flax import nnx
from helpers import assert_same, dense, random_adapters
from orbax.checkpoint import v1 as ocp

import coremerge_jax as cm
from coremerge_jax.io.orbax.orbax_folder import is_orbax

SHAPES = {f"layers.{i}.{name}": (6, 8) for i in range(3) for name in ("q", "v")} | {"head": (4, 8)}
LORA = {"lora_rank": 2, "lora_alpha": 8}


@pytest.fixture
def adapter():
    return random_adapters(SHAPES, [2], dtype="float32")[0]


def qwix_tree(adapter, value=False):
    """Unstacked layers as Tunix has them, with alpha / rank = 4 taken out of b."""
    tree = {}
    for path, lora in adapter.items():
        node = tree
        for part in path.split("."):
            node = node.setdefault(part, {})
        for name, x in (("w_lora_a", lora.a.T), ("w_lora_b", lora.b.T / 4)):
            node[name] = {"value": jnp.asarray(x)} if value else jnp.asarray(x)
    return tree


def restore(path, **dtypes):
    """What orbax itself restores, on one device."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    tree = ocp.metadata(path).metadata
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, dtypes.get(x.dtype.name, x.dtype), sharding=sharding
        ),
        tree,
    )
    return ocp.load(path, abstract)


def write_v1(tree, path, **metadata):
    ocp.save(path, tree, custom_metadata=metadata or None)


def write_v0(tree, path, **metadata):
    with ocp0.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree, custom_metadata=metadata or None)


def write_manager(tree, path, **metadata):
    """As Tunix: steps, and the parameters as one of several items."""
    with ocp0.CheckpointManager(path, item_names=("model_params", "optimizer_state")) as manager:
        for step, saved in ((1, jax.tree.map(jnp.zeros_like, tree)), (2, tree)):
            args = ocp0.args.Composite(
                model_params=ocp0.args.StandardSave(saved),
                optimizer_state=ocp0.args.StandardSave({"count": jnp.zeros(3)}),
            )
            manager.save(step, args=args, custom_metadata=metadata or None)
        manager.wait_until_finished()


@pytest.mark.parametrize("write", [write_v1, write_v0, write_manager])
@pytest.mark.parametrize("value", [False, True], ids=["pure", "with values"])
def test_checkpoints_of_others(adapter, tmp_path, write, value):
    write(qwix_tree(adapter, value), tmp_path / "checkpoint", lora=LORA)
    found = cm.open_adapter(tmp_path / "checkpoint")
    assert_same(found, adapter, 1e-7)
    assert found.metadata.rank == 2
    assert found.metadata.alpha == 8
    assert found.metadata.name in ("checkpoint", "2")
    assert all(isinstance(lora.a, np.ndarray) for lora in found.values())


def test_alpha_from_a_configuration_beside(adapter, tmp_path):
    write_v1(qwix_tree(adapter), tmp_path / "checkpoint" / "0")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8}
    (tmp_path / "checkpoint" / "adapter_config.json").write_text(json.dumps(config))
    assert_same(cm.open_orbax(tmp_path / "checkpoint"), adapter, 1e-7)


def test_alpha_that_nobody_tells(adapter, tmp_path):
    write_v1(qwix_tree(adapter), tmp_path / "c")
    with pytest.raises(cm.FormatError, match=r"c/\S+: layout 'qwix' .* give alpha \(coremerge"):
        cm.open_orbax(tmp_path / "c")
    assert_same(cm.open_orbax(tmp_path / "c", alpha=8), adapter, 1e-7)


@pytest.mark.parametrize(("option", "value"), [("alpha", 16), ("rank", 4)])
def test_alpha_and_rank_that_contradict(adapter, tmp_path, option, value):
    write_v1(qwix_tree(adapter), tmp_path / "c", lora=LORA)
    with pytest.raises(cm.FormatError, match=rf"{option}={value} was given, but .* says"):
        cm.open_orbax(tmp_path / "c", **{option: value})


def test_scanned_layers(adapter, tmp_path):
    for axis in (0, 1):
        tree = {"layers": {}, "head": qwix_tree(adapter)["head"]}
        for name in ("q", "v"):
            layers = [adapter[f"layers.{i}.{name}"] for i in range(3)]
            tree["layers"][name] = {
                "w_lora_a": np.stack([x.a.T for x in layers], axis),
                "w_lora_b": np.stack([x.b.T / 4 for x in layers], axis),
            }
        write_v1(tree, tmp_path / str(axis), lora=LORA)
        assert_same(cm.open_orbax(tmp_path / str(axis)), adapter, 1e-7)


def test_merge_of_mixed_sources(tmp_path):
    one, two = random_adapters(SHAPES, [2, 2], dtype="float32")
    write_v1(qwix_tree(one), tmp_path / "orbax", lora=LORA)
    cm.save_peft(two, tmp_path / "peft")
    opened = [cm.open_adapter(tmp_path / name) for name in ("orbax", "peft")]
    cm.save_peft(cm.merge_stream(opened, cm.tsv()), tmp_path / "merged")
    assert_same(cm.load_peft(tmp_path / "merged"), cm.merge([one, two], cm.tsv()), 1e-6)


def test_ours_are_restored_by_orbax(adapter, tmp_path):
    cm.save_orbax(adapter, tmp_path / "ours")
    metadata = ocp.metadata(tmp_path / "ours")
    assert metadata.custom_metadata["lora"] == {"lora_rank": 2, "lora_alpha": 2}
    restored = restore(tmp_path / "ours")
    assert restored["layers"]["v"]["lora_b"].shape == (3, 2, 6)
    expected = adapter["layers.1.q"]
    np.testing.assert_array_equal(restored["layers"]["q"]["lora_a"][1], expected.a.T)
    np.testing.assert_array_equal(restored["layers"]["q"]["lora_b"][1], expected.b.T)
    half = restore(tmp_path / "ours", float32=jnp.bfloat16)
    assert half["head"]["lora_a"].dtype == jnp.bfloat16
    again = cm.open_adapter(tmp_path / "ours")
    for path, lora in adapter.items():
        np.testing.assert_array_equal(again[path].a, lora.a)
        np.testing.assert_array_equal(again[path].b, lora.b)


def test_ours_in_the_layout_of_the_source(adapter, tmp_path):
    source = qwix_tree(adapter, value=True)
    write_v1(source, tmp_path / "source", lora=LORA)
    merged = cm.merge([adapter, adapter], cm.task_arithmetic())
    cm.save_orbax(merged, tmp_path / "merged", like=tmp_path / "source")
    restored = restore(tmp_path / "merged")
    assert jax.tree.structure(restored) == jax.tree.structure(source)
    assert restored["layers"]["0"]["q"]["w_lora_a"]["value"].shape == (8, 4)
    assert_same(cm.open_orbax(tmp_path / "merged"), merged, 1e-6)


def test_a_state_of_nnx(tmp_path):
    model = nnx.LoRALinear(4, 3, lora_rank=2, rngs=nnx.Rngs(0))
    model.lora.lora_b[...] = jnp.ones((2, 3))

    class Outer(nnx.Module):
        def __init__(self):
            self.inner = model

    write_v1(nnx.state(Outer(), nnx.LoRAParam), tmp_path / "c")
    found = cm.open_orbax(tmp_path / "c")
    assert list(found) == ["inner"]
    expected = np.asarray(model.lora.lora_a[...] @ model.lora.lora_b[...]).T
    np.testing.assert_allclose(dense(found["inner"]), expected, rtol=1e-6)


def test_an_output_that_exists_is_kept(adapter, tmp_path):
    cm.save_orbax(adapter, tmp_path / "out")
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    with pytest.raises(cm.FormatError, match="already exists"):
        cm.save_orbax(adapter, tmp_path / "out")
    cm.save_orbax(adapter, tmp_path / "out", force=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_nothing_is_left_of_a_failed_save(adapter, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ocp, "save", fail)
    with pytest.raises(OSError, match="No space"):
        cm.save_orbax(adapter, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# Of orbax's event loop, which it may close before all of its reads have failed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_broken_checkpoints(adapter, tmp_path):
    for path, message in (
        (tmp_path / "nothing", "no such folder"),
        (tmp_path, "not an orbax checkpoint"),
    ):
        with pytest.raises(cm.FormatError, match=message):
            cm.open_orbax(path)
    write_v1(qwix_tree(adapter), tmp_path / "c", lora=LORA)
    (item,) = (path.parent for path in (tmp_path / "c").glob("*/_METADATA"))
    with pytest.raises(cm.FormatError, match=f"no item 'x'; there are '{item.name}'"):
        cm.open_orbax(tmp_path / "c", item="x")
    opened = cm.open_orbax(tmp_path / "c")
    for data in item.glob("**/d/*"):
        data.write_bytes(b"x" * 10)
    with pytest.raises(cm.FormatError, match="cannot be read"):
        opened.read(list(opened))
    (item / "_METADATA").write_text("{")
    with pytest.raises(cm.FormatError, match="not a readable orbax checkpoint"):
        cm.open_orbax(tmp_path / "c")
    (item / "_METADATA").unlink()
    with pytest.raises(cm.FormatError, match=r"c: not finished, or cut off: no tree of arrays"):
        cm.open_adapter(tmp_path / "c")


def test_values_that_are_not_finite(adapter, tmp_path):
    tree = qwix_tree(adapter)
    tree["head"]["w_lora_a"] = tree["head"]["w_lora_a"].at[0, 0].set(jnp.nan)
    write_v1(tree, tmp_path / "c", lora=LORA)
    with pytest.raises(cm.FormatError, match="module 'head' has NaN"):
        cm.merge([cm.open_orbax(tmp_path / "c")], cm.mean())


def test_factors_that_are_not_floats(adapter, tmp_path):
    tree = qwix_tree(adapter)
    tree["head"]["w_lora_b"] = jnp.ones((2, 4), jnp.int8)
    write_v1(tree, tmp_path / "c", lora=LORA)
    with pytest.raises(cm.FormatError, match=r"'head/w_lora_b' is of dtype int8; expected float"):
        cm.open_orbax(tmp_path / "c")


def test_keys_of_the_base_model_are_named(adapter, tmp_path):
    tree = qwix_tree(adapter)
    tree["head"]["w"] = jnp.zeros((8, 4))
    write_v1(tree, tmp_path / "c", lora=LORA)
    with pytest.raises(cm.FormatError, match=r"1 keys are not LoRA factors .*'head/w'.*--ignore"):
        cm.open_orbax(tmp_path / "c")
    assert_same(cm.open_orbax(tmp_path / "c", ignore=["*/w"]), adapter, 1e-7)
    cm.save_orbax(adapter, tmp_path / "again", like=tmp_path / "c", ignore=["*/w"])
    assert_same(cm.open_orbax(tmp_path / "again"), adapter, 1e-7)  # without the base model
    tree["head"].pop("w_lora_b")
    write_v1(tree, tmp_path / "d", lora=LORA)
    with pytest.raises(cm.FormatError, match="'head/w_lora_a' has no partner"):
        cm.open_orbax(tmp_path / "d", ignore=["*/w"])


@pytest.fixture
def steps(adapter, tmp_path):
    """Two steps with the parameters as one of several items; the first one's are zeros."""
    write_manager(qwix_tree(adapter), tmp_path / "steps", lora=LORA)
    return tmp_path / "steps"


def test_the_folder_of_an_item(adapter, steps):
    for source in (steps / "2" / "model_params", steps / "2", steps):
        assert_same(cm.open_adapter(source), adapter, 1e-7)
    assert set(cm.open_orbax(steps / "2" / "model_params", step=2)) == set(adapter)
    with pytest.raises(cm.FormatError, match="no item 'other'; there are 'model_params'"):
        cm.open_orbax(steps / "2" / "model_params", item="other")
    with pytest.raises(cm.FormatError, match=r"without steps; leave step \(1\) out"):
        cm.open_orbax(steps / "2", step=1)


def cut_off(folder):
    folder.mkdir()


def without_metadata(folder):
    shutil.copytree(folder.parent / "2", folder)
    (folder / "model_params" / "_METADATA").unlink()


def one_item_of_two(folder):
    shutil.copytree(folder.parent / "2", folder)
    (folder / "model_params").rename(folder / "model_params.orbax-checkpoint-tmp")


@pytest.mark.parametrize("begin", [cut_off, without_metadata, one_item_of_two])
def test_a_last_step_that_is_not_finished_is_passed_over(adapter, steps, begin):
    begin(steps / "3")
    with pytest.warns(UserWarning, match=r"steps/3: not finished.*read the last whole step, 2"):
        assert_same(cm.open_adapter(steps), adapter, 1e-7)
    with pytest.raises(cm.FormatError, match=r"3: not finished.*the last whole step is 2"):
        cm.open_orbax(steps, step=3)
    assert set(cm.open_orbax(steps, step=2)) == set(adapter)


def test_a_first_step_that_is_not_finished_is_refused(tmp_path):
    (tmp_path / "steps" / "1.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    (tmp_path / "steps" / "0" / "state").mkdir(parents=True)
    (tmp_path / "steps" / "0" / "_CHECKPOINT_METADATA").touch()
    with pytest.raises(cm.FormatError, match=r"steps: not finished, .* no whole step in it"):
        cm.open_adapter(tmp_path / "steps")


def test_a_step_that_is_empty_names_the_last_whole_one(steps):
    (steps / "3").mkdir()
    with pytest.raises(cm.FormatError, match=r"steps/3: not finished.*whole step is \S+steps/2"):
        cm.open_adapter(steps / "3")


def fifo(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


def loop(path):
    path.symlink_to(path.name)


@pytest.mark.parametrize(
    ("make", "message"), [(fifo, "a pipe"), (device, "a device"), (loop, "leads nowhere")]
)
@pytest.mark.parametrize("name", ["state/extra", "state/_METADATA", "_CHECKPOINT_METADATA"])
def test_what_would_block_is_refused(adapter, tmp_path, make, message, name):
    write_v1(qwix_tree(adapter), tmp_path / "c", lora=LORA)
    (item,) = (path.parent for path in (tmp_path / "c").glob("*/_METADATA"))
    path = tmp_path / "c" / name.replace("state", item.name)
    path.unlink(missing_ok=True)
    make(path)
    with pytest.raises(cm.FormatError, match=f"{path.name}: .*{message}"):
        cm.open_adapter(tmp_path / "c")


def test_hashes_are_of_regular_files(adapter, tmp_path):
    write_v1(qwix_tree(adapter), tmp_path / "c", lora=LORA)
    before = cm.io.hash_source(tmp_path / "c")
    fifo(tmp_path / "c" / "fifo")
    device(tmp_path / "c" / "device")
    loop(tmp_path / "c" / "loop")
    (tmp_path / "c" / "self").symlink_to(".")
    assert is_orbax(tmp_path / "c")
    assert cm.io.hash_source(tmp_path / "c") == before


def test_an_opened_adapter_can_be_pickled(adapter, tmp_path):
    write_v1(qwix_tree(adapter), tmp_path / "c", lora=LORA)
    cm.save_peft(adapter, tmp_path / "p")
    for name in "cp":
        opened = cm.open_adapter(tmp_path / name)
        again = pickle.loads(pickle.dumps(opened))
        assert again.metadata == opened.metadata
        assert_same(again, adapter, 1e-7)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (3, r"has lora of type int; expected an object with lora_rank"),
        ([], r"has lora of type list"),
        ({"lora_rank": 2, "lora_alpha": "8"}, r"lora_alpha is '8'; expected a positive number"),
        ({"lora_rank": 2, "lora_alpha": float("nan")}, r"lora_alpha is nan"),
        ({"lora_rank": 2, "lora_alpha": 10**400}, r"a number of 401 digits"),
        ({"lora_rank": -1, "lora_alpha": 8}, r"lora_rank is -1; expected a positive integer"),
        ({"lora_rank": True, "lora_alpha": 8}, r"lora_rank is True"),
    ],
)
def test_metadata_of_wrong_types(adapter, tmp_path, lora, message):
    write_v1(qwix_tree(adapter), tmp_path / "c")
    file = tmp_path / "c" / "_CHECKPOINT_METADATA"
    content = json.loads(file.read_text()) | {"custom_metadata": {"lora": lora}}
    file.write_text(json.dumps(content))
    with pytest.raises(cm.FormatError, match=message):
        cm.open_orbax(tmp_path / "c")


@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "_METADATA"])
@pytest.mark.parametrize("text", ["{", "", "3", "[]", "[" * 100_000, '{"tree_metadata": 3}'])
def test_broken_metadata_is_one_line(adapter, tmp_path, name, text):
    write_v0(qwix_tree(adapter), tmp_path / "c", lora=LORA)
    (tmp_path / "c" / name).write_text(text)
    with pytest.raises(cm.FormatError) as caught:
        cm.open_orbax(tmp_path / "c")
    assert str(tmp_path / "c") in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 400


def test_what_a_checkpoint_says_of_its_layers_counts(tmp_path):
    """Three numbered layers, or one in three blocks: shapes fit both."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((6, 3, 2), (2, 3, 8)))
    tree = {"decoder": {"stack": {"layers_0": {"q": {"kernel_lora_a": a, "kernel_lora_b": b}}}}}
    for name, told, count in (
        ("scanned", {"scan_layers": True}, 3),
        ("axis", {"param_scan_axis": 1}, 3),
        ("config", {"config": {"scan_layers": True}}, 3),
        ("not", {"scan_layers": False}, 1),
    ):
        write_v0(tree, tmp_path / name, lora=LORA, **told)
        assert len(cm.open_orbax(tmp_path / name)) == count
    write_v0(tree, tmp_path / "nothing", lora=LORA, scan_layers="yes")
    with pytest.raises(cm.FormatError, match="several ways"):
        cm.open_orbax(tmp_path / "nothing")
    opened = cm.open_orbax(tmp_path / "nothing", scan_axis=1)
    cm.save_orbax(opened, tmp_path / "copy", like=tmp_path / "scanned")
    assert_same(cm.open_orbax(tmp_path / "copy"), opened, 1e-6)


def test_a_copy_is_without_the_base_model(adapter, tmp_path):
    tree = qwix_tree(adapter)
    tree["head"]["w"] = jnp.zeros((8, 4))
    moments = {"mu": qwix_tree(adapter), "count": jnp.int32(3)}
    whole = {"params": tree, "opt_state": [moments], "step": jnp.int32(3)}
    write_v0(whole, tmp_path / "whole", lora=LORA)
    with pytest.warns(UserWarning, match="whole: 1 keys are no LoRA factors.*'params/head/w'"):
        cm.save_orbax(adapter, tmp_path / "copy", like=tmp_path / "whole")
    assert_same(cm.open_orbax(tmp_path / "copy"), adapter, 1e-6)
    with pytest.raises(
        cm.FormatError, match=r"ignore \(--ignore\): pattern '\*/kernel' matches no"
    ):
        cm.save_orbax(adapter, tmp_path / "more", like=tmp_path / "whole", ignore=["*/kernel"])
