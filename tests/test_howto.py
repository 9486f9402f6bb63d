"""The how-tos' examples run: their Python, and their command lines on files of that layout."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import random_adapters
from orbax.checkpoint import v1 as ocp
from test_readme import folder, run

import coremerge_jax as cm
from coremerge_jax.names import translate

__all__ = ["folder"]  # a fixture

HOWTO = Path(__file__).parents[1] / "docs" / "howto"
HEADS, HEAD_DIM, WIDTH, RANK = 2, 8, 16, 2


def blocks(page, language):
    text = (HOWTO / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def run_python(page):
    namespace = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for code in blocks(page, "python"):
            exec(compile(code, page, "exec"), namespace)
    return namespace


def run_commands(page, capsys):
    lines = "".join(blocks(page, "sh")).splitlines()
    assert lines
    for line in lines:
        assert run(line) == 0, (line, capsys.readouterr().err)


def llama(seed):
    """An adapter of a small Llama with Hugging Face's names."""
    sizes = {"q_proj": (HEADS * HEAD_DIM, WIDTH), "o_proj": (WIDTH, HEADS * HEAD_DIM)}
    shapes = {
        f"model.layers.{i}.self_attn.{name}": size for i in range(3) for name, size in sizes.items()
    }
    return random_adapters(shapes, [RANK], seed=seed, dtype="float32")[0]


def write_tunix(adapter, path):
    tree = {}
    for name, lora in translate(adapter, "tunix").items():
        node = tree
        for part in name.split("."):
            node = node.setdefault(part, {})
        a, b = lora.a.T, lora.b.T * RANK / 32
        if name.endswith("q_proj"):
            b = b.reshape(RANK, HEADS, HEAD_DIM)
        else:
            a = a.reshape(HEADS, HEAD_DIM, RANK)
        node |= {"w_lora_a": {"value": a}, "w_lora_b": {"value": b}}
    ocp.save(path / "100", tree, checkpointable_name="model_params")


def write_maxtext(adapter, path):
    there = translate(adapter, "maxtext-llama3.1", head_dim=HEAD_DIM)
    tree = {"decoder": {"layers": {"self_attention": {}}}}
    for name in ("query", "out"):
        layers = [there[f"decoder.layers.{i}.self_attention.{name}"] for i in range(3)]
        a = np.stack([lora.a.T for lora in layers], axis=1)
        b = np.stack([lora.b.T / 2 for lora in layers], axis=1)
        if name == "query":
            b = b.reshape(RANK, 3, HEADS, HEAD_DIM)
        tree["decoder"]["layers"]["self_attention"][name] = {
            "kernel_lora_a": a,
            "kernel_lora_b": b,
        }
    lora = {"lora_rank": RANK, "lora_alpha": 2 * RANK}
    ocp.save(path, tree, custom_metadata={"lora": lora})


def write_maxtext_base(path):
    kernels = {"query": (WIDTH, 3, HEADS, HEAD_DIM), "out": (HEADS, 3, HEAD_DIM, WIDTH)}
    attention = {name: {"kernel": np.ones(shape)} for name, shape in kernels.items()}
    ocp.save(path, {"params": {"params": {"decoder": {"layers": {"self_attention": attention}}}}})


@pytest.mark.parametrize("write", [write_tunix, write_maxtext])
def test_checkpoints(tmp_path, monkeypatch, capsys, write):
    monkeypatch.chdir(tmp_path)
    adapters = {task: llama(seed) for seed, task in enumerate(("math", "code"))}
    for task, adapter in adapters.items():
        write(adapter, tmp_path / "checkpoints" / task)
    if write is write_maxtext:
        write_maxtext_base(tmp_path / "checkpoints" / "base")
    page = "tunix.md" if write is write_tunix else "maxtext.md"
    run_commands(page, capsys)
    for task, adapter in adapters.items():
        found = cm.load_peft(task)
        for path, lora in adapter.items():
            np.testing.assert_allclose(found[path].dense(), lora.dense(), rtol=1e-4, atol=1e-5)
    assert set(cm.open_adapter("restart").outline)
    if blocks(page, "python"):
        run_python(page)
        assert Path("merged-too/adapter_model.safetensors").is_file()


def test_peft(folder, capsys):
    run_commands("peft.md", capsys)
    run_python("peft.md")
    assert (folder / "streamed" / "adapter_model.safetensors").is_file()


def test_nnx():
    found = run_python("nnx.md")
    assert {lora.rank for lora in found["small"].values()} == {4}


def test_search(folder, capsys):
    """The function in the first block of Python is the file that the command lines name."""
    (folder / "evaluate.py").write_text(blocks("search.md", "python")[0])
    run_commands("search.md", capsys)
    assert (folder / "tuned" / "best" / "adapter_model.safetensors").is_file()
    found = run_python("search.md")
    losses = [row["validation"] for row in found["fitted"].history]
    assert min(losses) < 0.8 * losses[0]
    assert found["step"]._cache_size() == 1
    assert all(jax.numpy.isfinite(found["gradient"]))


def test_distributed(folder, capsys):
    """Lines for several processes run too, without the others; options that it names are there."""
    page = "distributed.md"
    lines = re.findall(r"coremerge merge adapters[^\n&#]*", "".join(blocks(page, "sh")))
    for line in {line.replace("--distributed", "").strip() for line in lines}:
        assert run(line) == 0, (line, capsys.readouterr().err)
    assert run("coremerge merge --help") == 0
    text = (HOWTO / page).read_text(encoding="utf-8")
    named = set(re.findall(r"`(--[a-z-]+)[ `]", text))
    known = capsys.readouterr().out
    assert {"--distributed", "--mesh", "--patience"} <= named
    assert all(option in known for option in named)
    found = run_python(page)
    assert (folder / "merged-too" / "adapter_model.safetensors").is_file()
    assert set(cm.open_orbax("checkpoint").outline) == set(found["opened"][0])


def test_links_lead_to_files():
    for page in HOWTO.glob("*.md"):
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert (page.parent / target).exists(), (page.name, target)
