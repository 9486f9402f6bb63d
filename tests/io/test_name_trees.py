"""Checkpoints that an implementation of a model family restores, from Hugging Face's names."""

import jax
import numpy as np
import pytest
from helpers import assert_same, random_adapters
from orbax.checkpoint import v1 as ocp
from test_name_map import HEAD_DIM, HEADS, KV_HEADS, WIDTH, hugging_face

import coremerge_jax as cm
from coremerge_jax.trees.families import NAME_MAPS, translate
from coremerge_jax.trees.paths import flatten

RANK = 3
# As the implementations' own modules get them: qwix and gemma split an einsum's kernel into the
# axes that its input has (a) and the others (b); MaxText's kernels are flat, and stacked.
EXPECTED = {
    "tunix": {
        "layers/1/attn/q_proj/w_lora_b": (RANK, HEADS, HEAD_DIM),
        "layers/1/attn/o_proj/w_lora_a": (HEADS, HEAD_DIM, RANK),
        "layers/0/mlp/down_proj/kernel_lora_a": (40, RANK),
    },
    "tunix-gemma": {
        "layers/1/attn/q_einsum/w_lora_a": (WIDTH, 2 * RANK),
        "layers/1/attn/kv_einsum/w_lora_b": (2 * RANK, 2, KV_HEADS, HEAD_DIM),
        "layers/0/attn/attn_vec_einsum/w_lora_a": (HEADS, HEAD_DIM, 2 * RANK),
    },
    "gemma": {
        "layer_1/attn/kv_einsum/_LoRAEinsum_0/lora/b": (2 * RANK, 2, KV_HEADS, HEAD_DIM),
        "layer_0/mlp/_LoRAEinsum_gating_einsum/lora/b": (2 * RANK, 2, 40),
        "layer_0/mlp/_LoRAEinsum_linear/lora/a": (40, 2 * RANK),
    },
    "maxtext-llama3.1": {
        "decoder/layers/self_attention/query/kernel_lora_a": (WIDTH, 2, RANK),
        "decoder/layers/self_attention/query/kernel_lora_b": (RANK, 2, HEADS * HEAD_DIM),
        "decoder/layers/mlp/wo/kernel_lora_b": (RANK, 2, WIDTH),
    },
    "maxtext-qwen": {"decoder/layers/mlp/wi_0/kernel_lora_b": (RANK, 2, 40)},
}


@pytest.mark.parametrize("name", NAME_MAPS)
def test_there_and_back(tmp_path, name):
    (adapter,) = hugging_face()
    cm.save_orbax(adapter, tmp_path / "there", to=name, head_dim=HEAD_DIM)
    tree = ocp.metadata(tmp_path / "there", NAME_MAPS[name].item).metadata
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    assert all(path[-1].key == "value" for path in paths)
    shapes = {key: leaf.shape for key, leaf in flatten(tree).items()}
    assert {key: shapes[key] for key in EXPECTED[name]} == EXPECTED[name]
    there = cm.open_orbax(tmp_path / "there", scan_axis=NAME_MAPS[name].scan_axis)
    assert_same(translate(there, name, head_dim=HEAD_DIM), adapter, 1e-6)


def test_as_many_heads_of_each_are_fused():
    shapes = {f"model.layers.0.self_attn.{x}_proj": (WIDTH, WIDTH) for x in "qkv"}
    (adapter,) = random_adapters(shapes, [RANK], dtype="float32")
    assert list(translate(adapter, "gemma")) == ["layer.0.attn.qkv_einsum"]
    assert_same(translate(translate(adapter, "gemma"), "gemma"), adapter, 0)


def test_what_has_the_names_already_is_written_as_it_is(tmp_path):
    (adapter,) = hugging_face()
    cm.save_orbax(adapter, tmp_path / "one", to="tunix", head_dim=HEAD_DIM)
    there = translate(adapter, "tunix")
    cm.save_orbax(there, tmp_path / "two", to="tunix", head_dim=HEAD_DIM)
    assert_same(cm.open_orbax(tmp_path / "one"), cm.open_orbax(tmp_path / "two"), 0)


def test_what_cannot_be_written(tmp_path):
    (adapter,) = hugging_face()
    with pytest.raises(cm.UnsupportedError, match=r"an axis of their own there; give head_dim"):
        cm.save_orbax(adapter, tmp_path / "c", to="tunix")
    with pytest.raises(cm.UnsupportedError, match=r"in all heads; head_dim=5 does not fit"):
        cm.save_orbax(adapter, tmp_path / "c", to="tunix", head_dim=5)
    with pytest.raises(cm.RecipeError, match="expected one of tunix"):
        cm.save_orbax(adapter, tmp_path / "c", to="bert")
    later = {path: lora for path, lora in adapter.items() if ".layers.1." in path}
    with pytest.raises(cm.MismatchError, match=r"'decoder\.layers\.0\.\S+' is missing: layers are"):
        cm.save_orbax(adapter.replace(modules=later), tmp_path / "c", to="maxtext-qwen")
    path = "model.layers.1.mlp.up_proj"
    (wide,) = random_adapters({path: (48, WIDTH)}, [RANK], dtype="float32")
    with pytest.raises(cm.MismatchError, match=r"wi_1': layers of several shapes cannot be"):
        cm.save_orbax(
            adapter.replace(modules={**adapter, **wide}), tmp_path / "c", to="maxtext-qwen"
        )
    assert list(tmp_path.iterdir()) == []


def test_all_get_the_largest_rank(tmp_path):
    adapters = [cm.truncate(hugging_face()[0], rank=1)[0], hugging_face()[0]]
    path = "model.layers.0.mlp.up_proj"
    mixed = adapters[0].replace(modules={**adapters[0], path: adapters[1][path]})
    cm.save_orbax(mixed, tmp_path / "c", to="tunix", head_dim=HEAD_DIM)
    found = cm.open_orbax(tmp_path / "c")
    assert {lora.rank for lora in found.values()} == {RANK}
    assert np.count_nonzero(found["layers.0.attn.q_proj"].a) == WIDTH
    assert_same(translate(found, "tunix"), mixed, 1e-6)
