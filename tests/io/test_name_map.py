"""Names of model families: every map both ways, and what the kernels of MaxText's Llama mean."""

import numpy as np
import pytest
from helpers import dense, distance, random_adapters

import coremerge_jax as cm
from coremerge_jax.trees.families import NAME_MAPS, translate

HEADS, KV_HEADS, HEAD_DIM, WIDTH = 4, 2, 8, 16
OUTPUTS = {"q_proj": HEADS, "k_proj": KV_HEADS, "v_proj": KV_HEADS}


def hugging_face():
    shapes = {}
    for i in range(2):
        for name, heads in OUTPUTS.items():
            shapes[f"model.layers.{i}.self_attn.{name}"] = (heads * HEAD_DIM, WIDTH)
        shapes[f"model.layers.{i}.self_attn.o_proj"] = (WIDTH, HEADS * HEAD_DIM)
        for name in ("gate_proj", "up_proj"):
            shapes[f"model.layers.{i}.mlp.{name}"] = (40, WIDTH)
        shapes[f"model.layers.{i}.mlp.down_proj"] = (WIDTH, 40)
    return random_adapters(shapes, [3], dtype="float32")


@pytest.mark.parametrize("name", NAME_MAPS)
def test_there_and_back(name):
    (adapter,) = hugging_face()
    there = translate(adapter, name, head_dim=HEAD_DIM)
    assert not set(there) & set(adapter)
    back = translate(there, name, head_dim=HEAD_DIM)
    assert set(back) == set(adapter)
    for path, lora in adapter.items():
        assert distance(dense(back[path]), dense(lora)) < 1e-6, path


def test_names():
    (adapter,) = hugging_face()
    assert "layers.1.attn.q_proj" in translate(adapter, "tunix")
    assert "layers.1.attn.attn_vec_einsum" in translate(adapter, "tunix-gemma")
    assert "layer.1.mlp.gating_einsum" in translate(adapter, "gemma")
    assert "decoder.layers.1.mlp.wi_0" in translate(adapter, "maxtext-qwen")


def test_a_module_outside_of_layers():
    (layers,) = hugging_face()
    (head,) = random_adapters({"lm_head": (40, WIDTH)}, [3], dtype="float32")
    adapter = layers.replace(modules={**layers, **head})
    there = translate(adapter, "tunix")
    assert "lm_head" in there
    assert set(translate(there, "tunix")) == set(adapter)


def test_fused_kernels_have_the_outputs_of_their_parts():
    (adapter,) = hugging_face()
    fused = translate(adapter, "tunix-gemma")["layers.0.attn.kv_einsum"]
    parts = [dense(adapter[f"model.layers.0.self_attn.{x}_proj"]) for x in "kv"]
    np.testing.assert_array_equal(dense(fused), np.concatenate(parts))
    assert fused.rank == 6


def test_llama_of_maxtext_pairs_the_halves_of_a_head():
    """Its rotation acts on neighbours, and its attention does not divide by √head_dim."""
    (adapter,) = hugging_face()
    theirs = dense(adapter["model.layers.0.self_attn.q_proj"]).reshape(HEADS, HEAD_DIM, WIDTH)
    there = translate(adapter, "maxtext-llama3.1", head_dim=HEAD_DIM)
    ours = dense(there["decoder.layers.0.self_attention.query"]).reshape(HEADS, HEAD_DIM, WIDTH)
    half = HEAD_DIM // 2
    for j in range(half):
        for place, row in ((2 * j, j), (2 * j + 1, j + half)):
            expected = theirs[:, row] / HEAD_DIM**0.5
            np.testing.assert_allclose(ours[:, place], expected, rtol=1e-5)
    value = there["decoder.layers.0.self_attention.value"]
    np.testing.assert_array_equal(value.b, adapter["model.layers.0.self_attn.v_proj"].b)


def test_what_cannot_be_translated():
    (adapter,) = hugging_face()
    with pytest.raises(cm.UnsupportedError, match=r"give head_dim \(--head-dim\)"):
        translate(adapter, "maxtext-llama3.1")
    with pytest.raises(cm.UnsupportedError, match="head_dim=6 does not fit"):
        translate(adapter, "maxtext-llama3.1", head_dim=6)
    with pytest.raises(cm.RecipeError, match="expected one of tunix"):
        translate(adapter, "bert")
    more = adapter.replace(modules={**adapter, "score": adapter["model.layers.0.mlp.up_proj"]})
    with pytest.raises(cm.MismatchError, match=r"'score' has no name in tunix; nearest is"):
        translate(more, "tunix")
    fewer = dict(adapter)
    del fewer["model.layers.1.self_attn.v_proj"]
    with pytest.raises(cm.MismatchError, match=r"'model.layers.1.self_attn.k_proj' .*v_proj"):
        translate(adapter.replace(modules=fewer), "gemma")
