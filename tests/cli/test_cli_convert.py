"""``coremerge convert``: from an orbax checkpoint to PEFT and back, and what it refuses."""

import json
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers import assert_same, random_adapters
from orbax.checkpoint import v1 as ocp

import coremerge_jax as cm
from coremerge_jax.cli.convert_command import LAYOUTS, NAMES
from coremerge_jax.trees.families import NAME_MAPS

HEADS, HEAD_DIM, WIDTH = 2, 4, 8


@pytest.fixture
def tunix(tmp_path):
    """A checkpoint as Tunix leaves it, with alpha / rank = 4, and the adapter that it holds."""
    sizes = {"q_proj": (HEADS, HEAD_DIM), "k_proj": (1, HEAD_DIM)}
    (adapter,) = random_adapters(
        {
            f"model.layers.{i}.self_attn.{name}": (heads * dim, WIDTH)
            for i in range(2)
            for name, (heads, dim) in sizes.items()
        },
        [2],
        dtype="float32",
    )
    tree = {"layers": {"0": {"attn": {}}, "1": {"attn": {}}}}
    for path, lora in adapter.items():
        layer, name = path.split(".")[2], path.split(".")[4]
        tree["layers"][layer]["attn"][name] = {
            "w_lora_a": {"value": lora.a.T},
            "w_lora_b": {"value": (lora.b.T / 4).reshape(2, *sizes[name])},
        }
    ocp.save(tmp_path / "tunix" / "1", {"layers": {}} | tree, checkpointable_name="model_params")
    return tmp_path / "tunix", adapter


def test_to_hugging_face_and_back(coremerge, tmp_path, tunix):
    source, adapter = tunix
    options = ["--alpha", 8, "--names", "tunix"]
    result = coremerge("convert", source, "-o", tmp_path / "peft", *options)
    assert result.code == 0, result.err
    assert "wrote" in result.out
    assert_same(cm.load_peft(tmp_path / "peft"), adapter, 1e-7)
    back = ["--to", "orbax", "--like", source, "--names", "tunix"]
    result = coremerge("convert", tmp_path / "peft", "-o", tmp_path / "back", *back)
    assert result.code == 0, result.err
    restored, first = (ocp.metadata(path).metadata for path in (tmp_path / "back", source / "1"))
    assert jax.tree.structure(restored) == jax.tree.structure(first)
    again = cm.open_adapter(tmp_path / "back")
    assert again.metadata.alpha == again.metadata.rank == 2
    factors = restored["layers"]["1"]["attn"]["q_proj"]
    assert factors["w_lora_b"]["value"].shape == (2, HEADS, HEAD_DIM)


def test_to_an_implementation(coremerge, tmp_path, tunix):
    source, adapter = tunix
    cm.save_peft(adapter, tmp_path / "peft")
    options = ["--to", "tunix", "--head-dim", HEAD_DIM]
    result = coremerge("convert", tmp_path / "peft", "-o", tmp_path / "there", *options)
    assert result.code == 0, result.err
    there, first = (ocp.metadata(path).metadata for path in (tmp_path / "there", source / "1"))
    assert jax.tree.map(lambda x: x.shape, there) == jax.tree.map(lambda x: x.shape, first)
    assert_same(cm.open_adapter(tmp_path / "there"), cm.open_adapter(source, alpha=8), 1e-7)


def test_options_of_checkpoints_for_a_peft_folder(coremerge, tmp_path, tunix):
    _, adapter = tunix
    cm.save_peft(adapter, tmp_path / "peft")
    result = coremerge("convert", tmp_path / "peft", "-o", tmp_path / "out", "--alpha", 8)
    assert result.code == 2
    assert "alpha can be given for these only" in result.err


def test_json(coremerge, tmp_path, tunix):
    source, _ = tunix
    result = coremerge("convert", source, "-o", tmp_path / "peft", "--alpha", 8, "--json")
    report = json.loads(result.out)
    assert report["ranks"]["layers.1.attn.k_proj"] == 2
    assert report["to"] == "peft"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["alpha / rank", "--alpha"]),
        (["--alpha", 8, "--layout", "nnx"], ["layout 'nnx'"]),
        (["--alpha", 8, "--step", 3], ["no step 3", "[1]"]),
        (["--alpha", 8, "--item", "x"], ["no item 'x'", "model_params"]),
        (["--alpha", 8, "--to", "keras"], ["--to 'keras'", "orbax, tunix", "peft"]),
        (["--alpha", 8, "--names", "bert"], ["names 'bert'", "tunix"]),
        (["--alpha", 8, "--axes", "x"], ["--axes 'x'", "PATTERN=A,B"]),
        (["--alpha", 8, "--axes", "*=ir,rx"], ["axes 'rx'", "one letter"]),
        (["--alpha", 8, "--scan-axis", 2], ["--scan-axis '2'"]),
        (["--alpha", 8, "--like", "x"], ["--like is for --to orbax"]),
        (["--alpha", 8, "--to", "orbax", "--dtype", "float16"], ["--dtype is for --to "]),
        (["--alpha", 8, "--to", "tunix"], ["give head_dim (--head-dim)"]),
        (["--alpha", 8, "--to", "tunix", "--names", "gemma"], ["--names is not for --to tunix"]),
        (["--alpha", 8, "--to", "orbax", "--like", "x"], ["x: no such folder"]),
    ],
)
def test_refusals(coremerge, tmp_path, tunix, options, words):
    source, _ = tunix
    result = coremerge("convert", source, "-o", tmp_path / "out", *options)
    assert result.code in (1, 2)
    assert len(result.err.splitlines()) == 1
    for word in words:
        assert word in result.err, result.err
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_its_data(tmp_path, tunix):
    """In a process of its own: what orbax logs must not drown the one line."""
    source, _ = tunix
    shutil.rmtree(source / "1" / "model_params" / "d")
    command = [sys.executable, "-m", "coremerge_jax", "convert", source, "-o", tmp_path / "out"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert re.fullmatch(r"error: \S+: not a readable orbax checkpoint .*\n", result.stderr)


def test_a_folder_that_holds_nothing(coremerge, tmp_path):
    (tmp_path / "empty").mkdir()
    result = coremerge("convert", tmp_path / "empty", "-o", tmp_path / "out")
    assert result.code == 1
    assert "empty" in result.err


def test_merge_of_a_checkpoint_and_a_peft_folder(coremerge, tmp_path, tunix):
    _, adapter = tunix
    cm.save_orbax(adapter, tmp_path / "one")
    cm.save_peft(adapter, tmp_path / "two")
    result = coremerge("merge", tmp_path / "one", tmp_path / "two", "-o", tmp_path / "out")
    assert result.code == 0, result.err
    merged = cm.load_peft(tmp_path / "out")
    expected = cm.merge([cm.load_peft(tmp_path / "two")] * 2, cm.tsv())
    assert_same(merged, expected, 1e-6)
    sources = json.loads((tmp_path / "out" / "coremerge.json").read_text())["sources"]
    assert [source["name"] for source in sources] == ["one", "two"]
    assert all(source["sha256"] for source in sources)


def test_inspect_of_a_checkpoint(coremerge, tmp_path, tunix):
    _, adapter = tunix
    cm.save_orbax(adapter, tmp_path / "one")
    result = coremerge("inspect", tmp_path / "one")
    assert result.code == 0, result.err
    assert "q_proj" in result.out


def test_help_lists_all_names_and_layouts():
    """It is text of its own, as help does not wait for JAX."""
    assert NAMES.split("|") == list(NAME_MAPS)
    assert LAYOUTS.split("|") == list(cm.trees.layouts.LAYOUTS)


def maxtext(axis, names=("stack",)):
    """Layers in a stack whose name does not tell that it is one."""
    rng = np.random.default_rng(0)

    def factors(n, m):
        a, b = rng.standard_normal((3, n, 2)), rng.standard_normal((3, 2, m))
        return {
            "kernel_lora_a": np.moveaxis(a, 0, axis).astype(np.float32),
            "kernel_lora_b": np.moveaxis(b, 0, axis).astype(np.float32),
            "kernel": np.zeros((n, m), np.float32),
        }

    return {"decoder": {name: {"query": factors(6, 8)} for name in names}}


def test_options_reach_what_the_result_is_to_be_like(coremerge, tmp_path):
    custom = {"lora": {"lora_rank": 2, "lora_alpha": 8}}
    ocp.save(tmp_path / "like", maxtext(1), custom_metadata=custom)
    options = ["--scan-axis", 1, "--ignore", "*/kernel"]
    result = coremerge("convert", tmp_path / "like", "-o", tmp_path / "peft", *options)
    assert result.code == 0, result.err
    back = ["--to", "orbax", "--like", tmp_path / "like"]
    refused = coremerge("convert", tmp_path / "peft", "-o", tmp_path / "no", *back)
    assert refused.code == 1
    assert refused.err.startswith(f"error: {tmp_path}/like: ")
    assert "say which with scan_axis" in refused.err
    for source, out in (("peft", "one"), ("one", "two")):  # which has no kernels to ignore
        result = coremerge("convert", tmp_path / source, "-o", tmp_path / out, *back, *options)
        assert result.code == 0, result.err
        assert_same(cm.open_adapter(tmp_path / out), cm.load_peft(tmp_path / "peft"), 1e-6)
    result = coremerge("convert", tmp_path / "peft", "-o", tmp_path / "three", *back, *options[:2])
    assert result.code == 0
    assert re.fullmatch(r"note: .*like: 1 keys are no LoRA factors.*query/kernel'\)\n", result.err)


@pytest.mark.parametrize("command", ["inspect", "merge", "convert", "apply", "report"])
def test_a_bucket_is_refused_in_one_line(coremerge, tmp_path, save, command):
    url, a, out = "gs://bucket/a", save("a"), tmp_path / "out"
    options = {
        "inspect": [url],
        "merge": [url, a, "-o", out],
        "convert": [a, "--to", "orbax", "--like", url, "-o", out],
        "apply": [a, "--base", url, "-o", out],
        "report": [url, a, "-o", tmp_path / "out.html"],
    }[command]
    result = coremerge(command, *options)
    assert result.code == 1
    assert result.err.startswith("error: gs://bucket/a: no local folder")
    assert len(result.err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
