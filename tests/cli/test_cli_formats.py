"""``--to`` and ``--uniform-rank``: results for other programs."""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import coremerge_jax as cm
from coremerge_jax.io.formats import all_targets, merge_targets
from coremerge_jax.io.module_paths import PREFIX

Q, G = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate_proj"
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 8,
}


@pytest.fixture
def attention_and_all(save):
    """An adapter of the attention, and one of all layers: their merge has two ranks."""
    return [save("a", 4, {Q: (16, 12)}), save("b", 4, {Q: (16, 12), G: (20, 12)})]


def factors_of_llama_cpp(folder):
    """The factor of every module: llama.cpp divides the file's alpha by the rank of a tensor."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    return {config["lora_alpha"] / len(x) for key, x in tensors.items() if "lora_A" in key}


@pytest.mark.parametrize("cut", [[], ["--energy", "0.9"]])
def test_with_one_rank_llama_cpp_applies_every_module_once(
    coremerge, attention_and_all, tmp_path, cut
):
    args = ["merge", *attention_and_all, "--rule", "task_arithmetic", *cut]
    result = coremerge(*args, "-o", tmp_path / "mixed", "--mixed-ranks")
    assert result.code == 0
    assert result.err.count("\n") == 1
    assert "note: the modules have ranks" in result.err
    assert "--uniform-rank" in result.err
    assert factors_of_llama_cpp(tmp_path / "mixed") != {1.0}
    result = coremerge(*args, "-o", tmp_path / "one")
    assert result.code == 0
    assert "zeros fill them up to one rank, as llama.cpp" in result.err
    assert factors_of_llama_cpp(tmp_path / "one") == {1.0}
    mixed, one = (cm.load_peft(tmp_path / name) for name in ("mixed", "one"))
    for path in mixed:
        assert np.allclose(mixed[path].dense(), one[path].dense(), atol=1e-6)
    assert coremerge("verify", tmp_path / "one").code == 0
    result = coremerge("convert", tmp_path / "mixed", "-o", tmp_path / "again")
    assert "note: the modules have ranks" in result.err
    result = coremerge("convert", tmp_path / "mixed", "-o", tmp_path / "peft", "--uniform-rank")
    assert result.code == 0
    assert "zeros fill them up" in result.err
    assert factors_of_llama_cpp(tmp_path / "peft") == {1.0}


def test_a_plan_has_the_rank_of_all(coremerge, attention_and_all):
    args = ["merge", *attention_and_all, "--rule", "task_arithmetic", "--dry-run", "--json"]
    plans = [json.loads(coremerge(*args, *more).out) for more in (["--mixed-ranks"], [])]
    ranks = [{r for x in plan["signatures"] for r in x["ranks_out"].values()} for plan in plans]
    assert ranks == [{4, 8}, {8}]
    assert plans[0]["bytes"] < plans[1]["bytes"]


def test_a_merge_for_llama_cpp(coremerge, attention_and_all, tmp_path):
    gguf = pytest.importorskip("gguf")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    base = ["--to", "gguf", "--base-config", tmp_path / "config.json"]
    result = coremerge("merge", *attention_and_all, "-o", tmp_path / "out", *base, "--json")
    assert (result.code, result.err) == (0, "")
    assert json.loads(result.out)["recipe"]["to"] == "gguf"
    names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "out" / "out.gguf").tensors}
    assert names == {f"blk.0.{x}.weight.lora_{y}" for x in ("attn_q", "ffn_gate") for y in "ab"}
    result = coremerge("verify", tmp_path / "out")
    assert result.code == 1
    assert (
        "out.gguf: is a GGUF file (llama.cpp, Ollama); GGUF adapters are written, but not"
        in result.err
    )
    assert result.err.count("\n") == 1
    converted = coremerge("convert", attention_and_all[1], "-o", tmp_path / "one", *base)
    assert (converted.code, converted.err) == (0, "")
    refused = coremerge("convert", attention_and_all[1], "-o", tmp_path / "one", "--force")
    assert "another kind of output (GGUF adapter, not PEFT adapter)" in refused.err


@pytest.mark.parametrize(
    ("command", "options", "code", "message"),
    [
        ("merge", ["--to", "orbax"], 2, "merges are written as .*convert --to orbax"),
        ("merge", ["--to", "onnx"], 2, "--to 'onnx': expected one of .*peft"),
        ("merge", ["--base-config", "x"], 2, "--base-config is for --to gguf, not for peft"),
        ("merge", ["--to", "gguf"], 1, r"base model \(org/base\).*--base-config"),
        ("sweep", ["--to", "gguf", "--values", "scale=1"], 2, "a sweep writes PEFT adapters"),
        ("convert", ["--base-config", "x"], 2, "--base-config is for --to gguf"),
        ("convert", ["--to", "orbax", "--uniform-rank"], 2, "--uniform-rank is for --to .*peft"),
    ],
)
def test_what_a_format_does_not_take(
    coremerge, attention_and_all, tmp_path, command, options, code, message
):
    if "gguf" in options and command == "merge":
        pytest.importorskip("gguf")
    sources = attention_and_all[:1] if command == "convert" else attention_and_all
    result = coremerge(command, *sources, "-o", tmp_path / "out", *options)
    assert result.code == code
    assert result.err.count("\n") == 1
    assert re.search(message, result.err), result.err
    assert not (tmp_path / "out").exists()


def test_merges_can_be_written_where_modules_may_come_one_by_one():
    assert set(merge_targets()) < set(all_targets())
    assert {"peft", "gguf"} <= set(merge_targets())


UNET = {
    f"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.{name}": (12, 10)
    for name in ("to_q", "to_k")
}


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_a_merge_is_of_the_format_of_all_adapters(coremerge, save, tmp_path, to):
    for name in "ab":
        args = ["convert", save(name, 2, UNET), "-o", tmp_path / f"{name}-{to}", "--to", to]
        assert coremerge(*args).code == 0
    sources = [tmp_path / f"{name}-{to}" for name in "ab"]
    assert coremerge("merge", *sources, "-o", tmp_path / "own", "--rule", "mean").code == 0
    record = json.loads((tmp_path / "own" / "coremerge.json").read_text())
    assert record["kind"] == json.loads((sources[0] / "coremerge.json").read_text())["kind"]
    assert set(cm.open_adapter(tmp_path / "own")) == set(UNET)
    result = coremerge("verify", tmp_path / "own")
    assert result.code == 0, result.out + result.err
    mixed = ["merge", sources[0], tmp_path / "b", "-o", tmp_path / "mixed", "--rule", "mean"]
    assert coremerge(*mixed, "--allow-other-base").code == 0
    peft, own = cm.load_peft(tmp_path / "mixed"), cm.open_adapter(tmp_path / "own")
    for path in UNET:
        assert np.array_equal(peft[path].dense(), own[path].dense())
    assert coremerge("merge", *sources, "-o", tmp_path / "peft", "--to", "peft").code == 0
    assert (tmp_path / "peft" / "adapter_config.json").exists()
    refused = coremerge("merge", *sources, "-o", tmp_path / "peft", "--force")
    assert "another kind of output (PEFT adapter, not" in refused.err


@pytest.mark.parametrize("to", ["kohya", "diffusers", "mlx"])
def test_a_plan_refuses_what_the_format_cannot_hold(coremerge, save, tmp_path, to):
    modules = {**UNET, "model.layers.0.q_proj": (12, 10)}
    sources = [save(name, 2, modules) for name in "ab"]
    args = ["merge", *sources, "--to", to, "--dry-run"]
    result = coremerge(*args)
    assert result.code == 1
    assert re.search(r"module '\S+' (is|has) .*--to", result.err), result.err
    assert coremerge(*args[:-2], "peft", "--dry-run").code == 0
    assert coremerge("merge", *sources, "--to", to, "-o", tmp_path / "out").err == result.err


@pytest.mark.parametrize(("to", "stays"), [("peft", False), ("mlx", True), ("orbax", True)])
def test_files_beside_an_adapter_go_to_peft_only(coremerge, save, tmp_path, to, stays):
    source = save("a", 2, {Q: (16, 12)})
    (source / "value_head.bin").write_bytes(b"weights")
    result = coremerge("convert", source, "--to", to, "-o", tmp_path / "out")
    assert result.code == 0
    assert ("(value_head.bin) stay behind" in result.err) == stays
    assert (tmp_path / "out" / "value_head.bin").exists() != stays


@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
def test_keys_are_those_of_the_adapters(coremerge, save, tmp_path, prefix):
    sources = [save(name, 2, {Q: (16, 12)}) for name in "ab"]
    for source in sources:
        file = source / "adapter_model.safetensors"
        tensors = load_file(file)
        save_file({prefix + key.removeprefix(PREFIX): x for key, x in tensors.items()}, file)
    assert coremerge("merge", *sources, "-o", tmp_path / "out", "--rule", "mean").code == 0
    merged = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert set(merged) == {f"{prefix}{Q}.lora_{side}.weight" for side in "AB"}
