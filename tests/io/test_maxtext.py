"""Checkpoints as MaxText writes and restores them, by the same calls to orbax."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax.training.train_state import TrainState
from helpers import assert_same, distance, random_adapters

import coremerge_jax as cm
from coremerge_jax.trees.families import translate

LAYERS, HEADS, KV_HEADS, HEAD_DIM, WIDTH, HIDDEN, RANK, ALPHA = 3, 4, 2, 8, 16, 40, 2, 8.0
OUTPUTS = {"q": HEADS * HEAD_DIM, "k": KV_HEADS * HEAD_DIM, "v": KV_HEADS * HEAD_DIM}
NAMES = {
    **{
        f"self_attn.{x}_proj": f"self_attention/{y}"
        for x, y in zip("qkv", ("query", "key", "value"), strict=True)
    },
    "self_attn.o_proj": "self_attention/out",
    "mlp.gate_proj": "mlp/wi_0",
    "mlp.up_proj": "mlp/wi_1",
    "mlp.down_proj": "mlp/wo",
}


@pytest.fixture
def adapter():
    """With Hugging Face's names."""
    shapes = {f"self_attn.{x}_proj": (m, WIDTH) for x, m in OUTPUTS.items()} | {
        "self_attn.o_proj": (WIDTH, HEADS * HEAD_DIM),
        "mlp.gate_proj": (HIDDEN, WIDTH),
        "mlp.up_proj": (HIDDEN, WIDTH),
        "mlp.down_proj": (WIDTH, HIDDEN),
    }
    layers = {f"model.layers.{i}.{x}": shape for i in range(LAYERS) for x, shape in shapes.items()}
    return random_adapters(layers, [RANK], dtype="float32")[0]


def lora_tree(adapter, axis):
    """As convert_lora_to_maxtext_adapter makes it (maxtext/checkpoint_conversion/to_maxtext.py)."""
    tree = {"decoder": {"layers": {"self_attention": {}, "mlp": {}}}}
    for theirs, ours in NAMES.items():
        a, b = [], []
        for i in range(LAYERS):
            lora = adapter[f"model.layers.{i}.{theirs}"]
            a.append(lora.a.T)
            x = lora.b.T / (ALPHA / RANK)
            if ours.endswith(("query", "key")):
                first, second = np.split(x.reshape(RANK, -1, HEAD_DIM), 2, axis=-1)
                x = np.stack([first, second], axis=-1).reshape(x.shape)
            b.append(x / np.sqrt(np.float32(HEAD_DIM)) if ours.endswith("query") else x)
        block, name = ours.split("/")
        tree["decoder"]["layers"][block][name] = {
            "kernel_lora_a": {"value": np.stack(a, axis)},
            "kernel_lora_b": {"value": np.stack(b, axis)},
        }
    return tree


def converted(tree):
    """Saved by to_maxtext: a train state without an optimizer's."""
    return TrainState(step=0, apply_fn=None, params={"params": tree}, tx=None, opt_state={})


def trained(tree):
    """Saved by MaxText's own trainer (maxtext/common/train_state_nnx.py)."""
    tree = jax.tree.map(lambda x: x["value"], tree, is_leaf=lambda x: list(x) == ["value"])
    moments = {x: {"params": jax.tree.map(jnp.ones_like, tree)} for x in ("mu", "nu")}
    optimizer = [{"count": jnp.int32(7), **moments}, None]
    return {"params": {"params": tree}, "step": jnp.int32(7), "opt_state": optimizer}


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("state", [converted, trained])
def test_their_checkpoints(adapter, tmp_path, state, axis):
    lora = {"enable_lora": True, "lora_rank": RANK, "lora_alpha": ALPHA, "lora_module_path": ""}
    with ocp.CheckpointManager(tmp_path / "c", item_names=("items",)) as manager:
        item = state(lora_tree(adapter, axis))
        save = ocp.args.PyTreeSave(item, jax.tree.map(lambda _: ocp.SaveArgs(), item))
        metadata = {"scan_layers": True, "lora": lora}
        manager.save(7, args=ocp.args.Composite(items=save), custom_metadata=metadata)
    opened = cm.open_orbax(tmp_path / "c")
    assert {path.split(".")[0] for path in opened.outline} == {"decoder"}
    assert_same(translate(opened, "maxtext-llama3.1", head_dim=HEAD_DIM), adapter, 1e-6)
    cm.save_orbax(opened, tmp_path / "again", like=tmp_path / "c")
    assert_same(cm.open_orbax(tmp_path / "again"), opened, 1e-6)


def test_they_restore_ours(adapter, tmp_path):
    """By the calls that restore_lora_from_path makes (maxtext/utils/lora_utils.py)."""
    cm.save_orbax(adapter, tmp_path / "ours", to="maxtext-llama3.1", head_dim=HEAD_DIM)
    path = tmp_path / "ours" / "model_params"
    told = ocp.StandardCheckpointer().metadata(path).custom_metadata["lora"]
    assert told == {"lora_rank": RANK, "lora_alpha": RANK}
    expected = lora_tree(adapter, 1)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), expected
    )
    args = ocp.args.PyTreeRestore(
        item=target,
        restore_args=ocp.checkpoint_utils.construct_restore_args(target),
        partial_restore=True,
    )
    restored = ocp.PyTreeCheckpointer().restore(path, args=args)

    def update(tree, name):
        query = tree["decoder"]["layers"]["self_attention"][name]
        return np.einsum("ilr,rlo->lio", *(query[f"kernel_lora_{x}"]["value"] for x in "ab"))

    for name in ("query", "key", "value", "out"):
        scaled = update(expected, name) * (ALPHA / RANK)
        assert distance(update(restored, name), scaled) < 1e-6, name


def test_adapters_for_serving(adapter, tmp_path):
    """Shapes of get_lora_abstract_state (maxtext/utils/lora_utils.py); other kernels are None."""
    scaled = {path: (x.a.T, x.b.T / (ALPHA / RANK)) for path, x in adapter.items()}
    tree = {"self_attention": {}, "mlp": {"wi_0": {"kernel": None}}}
    for theirs, ours in (("q", "query"), ("v", "value"), ("o", "out")):
        pairs = [scaled[f"model.layers.{i}.self_attn.{theirs}_proj"] for i in range(LAYERS)]
        a, b = (np.stack(x, axis=1) for x in zip(*pairs, strict=True))
        if ours == "out":  # (heads, layers, head_dim, r)
            a = a.reshape(HEADS, HEAD_DIM, LAYERS, RANK).transpose(0, 2, 1, 3)
        else:  # (r, layers, heads, head_dim)
            b = b.reshape(RANK, LAYERS, -1, HEAD_DIM)
        tree["self_attention"][ours] = {"lora_a.kernel": a, "lora_b.kernel": b}
    params = {"params": {"decoder": {"layers": tree}}}
    state = TrainState(step=0, apply_fn=None, params=params, tx=None, opt_state={})
    with ocp.CheckpointManager(tmp_path / "c", item_names=("items",)) as manager:
        manager.save(0, args=ocp.args.Composite(items=ocp.args.PyTreeSave(state)))
        manager.wait_until_finished()
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA}
    (tmp_path / "c" / "adapter_config.json").write_text(json.dumps(config))
    found = cm.open_orbax(tmp_path / "c", scan_axis=1)
    expected = {
        f"decoder.layers.{i}.self_attention.{ours}": adapter[f"model.layers.{i}.self_attn.{x}_proj"]
        for i in range(LAYERS)
        for x, ours in (("q", "query"), ("v", "value"), ("o", "out"))
    }
    assert_same(found, expected, 1e-6)
