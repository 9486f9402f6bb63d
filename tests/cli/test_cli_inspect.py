"""`coremerge inspect`."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from coremerge_jax.io.peft.reader import load_peft


def test_one_adapter(coremerge, save):
    path = save("math", 2)
    result = coremerge("inspect", path)
    lines = [" ".join(line.split()) for line in result.out.splitlines()]
    norm = np.sqrt(sum(np.sum(np.square(lora.dense())) for lora in load_peft(path).values()))
    assert result.code == 0
    assert f"math 3: dense, query, value 2 2 {norm:.4g} float32" in lines
    assert lines[-1] == "base model: org/base"
    assert "merged" not in result.out


def test_json(coremerge, adapters):
    report = json.loads(coremerge("inspect", *adapters, "--json").out)
    assert report["can_be_merged"] is True
    assert report["reason"] is None
    for path, described in zip(adapters, report["adapters"], strict=True):
        adapter = load_peft(path)
        assert described["source"] == str(path)
        assert described["base_model"] == "org/base"
        assert list(described["modules"]) == list(adapter)
        for name, module in described["modules"].items():
            assert tuple(module["shape"]) == adapter[name].shape
            assert module["norm"] == pytest.approx(np.linalg.norm(adapter[name].dense()), rel=1e-5)


def test_modules(coremerge, adapters):
    out = coremerge("inspect", *adapters, "--modules").out
    assert out.count("layer.0.query") == 3


def test_says_why_adapters_cannot_be_merged(coremerge, save):
    paths = [save("math", base_model="org/a"), save("code", base_model="org/b")]
    result = coremerge("inspect", *paths)
    assert result.code == 0
    assert "base model" in result.out.splitlines()[1]
    assert "cannot be merged: adapter 'math' was trained on base model 'org/a'" in result.out
    report = json.loads(coremerge("inspect", *paths, "--json").out)
    assert report["can_be_merged"] is False
    assert "'org/b'" in report["reason"]


def test_says_which_format_adapters_have(coremerge, save, tmp_path):
    unet = {f"unet.mid_block.attentions.0.{x}": (4, 6) for x in ("proj_in", "proj_out")}
    sources = []
    for name, to in (("a", "peft"), ("b", "kohya"), ("c", "kohya"), ("d", "diffusers")):
        sources.append(tmp_path / f"{name}-{to}")
        coremerge("convert", save(name, 2, unet), "--to", to, "-o", sources[-1])
    lines = coremerge("inspect", *sources).out.splitlines()
    assert "b-kohya, c-kohya are kohya adapters" in lines
    assert "d-diffusers is a diffusers adapter" in lines
    assert not any(" PEFT adapter" in line for line in lines)
    report = json.loads(coremerge("inspect", sources[1], "--json").out)
    assert report["adapters"][0]["format"] == "kohya adapter"


def test_extras(coremerge, save):
    path = save("math", extras={"head.weight": np.ones((2, 2), np.float32)})
    assert "math has extras: head.weight" in coremerge("inspect", path).out


def test_names_are_shown_as_they_are(coremerge, save):
    assert "[bold]" in coremerge("inspect", save("[bold]")).out


def test_output_that_cannot_show_every_letter(save):
    command = [sys.executable, "-m", "coremerge_jax", "inspect", str(save("math"))]
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert "??W?" in done.stdout


def test_trained_weights_beside_an_adapter_and_an_alpha_of_zero_are_told(coremerge, save):
    path = save("math", 2)
    (path / "value_head.safetensors").touch()
    (path / "optimizer.pt").touch()
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 0}))
    result = coremerge("inspect", path)
    assert result.code == 0
    assert "math has other trained weights beside it: value_head.safetensors\n" in result.out
    assert "math has no effect: its alpha is 0\n" in result.out
    merged = coremerge("merge", path, save("code"), "-o", path.parent / "out")
    assert merged.code == 1
    assert "value_head.safetensors" in merged.err
    assert "--extras" in merged.err
