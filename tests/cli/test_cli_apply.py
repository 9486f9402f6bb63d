"""`coremerge apply`: what it writes, shows and refuses."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from coremerge_jax.checkpoint import load_peft

MODULES = {"layer.0.query": (6, 8), "layer.0.value": (6, 8), "layer.0.dense": (8, 5)}


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    rng = np.random.default_rng(0)
    tensors = {
        f"{path}.weight": rng.standard_normal(shape).astype(jnp.bfloat16)
        for path, shape in MODULES.items()
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").touch()
    return folder


def test_writes_the_model(coremerge, save, base, tmp_path):
    adapter, out = save("math"), tmp_path / "out"
    result = coremerge("apply", adapter, "--base", base, "-o", out, "--scale", 0.5)
    assert (result.code, result.err) == (0, "")
    before, after = (load_file(x / "model.safetensors") for x in (base, out))
    for path, lora in load_peft(adapter).items():
        name = f"{path}.weight"
        expected = before[name].astype(np.float32) + 0.5 * lora.dense()
        assert np.allclose(after[name].astype(np.float32), expected, rtol=2**-8)
    for part in ("2: query, value", "6 × 8", "bfloat16", "%", "copied: config.json"):
        assert part in result.out
    assert "skipped: pytorch_model.bin" in result.out
    assert f"wrote {out}" in result.out
    told = json.loads((out / "coremerge.json").read_text())
    assert told["sources"][0]["path"] == str(adapter)
    assert len(told["sources"][0]["sha256"]["adapter_model.safetensors"]) == 64


def test_json(coremerge, save, base, tmp_path):
    result = coremerge("apply", save("math"), "--base", base, "-o", tmp_path / "out", "--json")
    report = json.loads(result.out)
    assert set(report["modules"]) == set(MODULES)
    for path, module in report["modules"].items():
        assert module["tensor"] == f"{path}.weight"
        assert 0 < module["rounding_loss"] < 1
    assert report["skipped"] == ["pytorch_model.bin"]
    assert report["seconds"].keys() == {"open", "apply"}
    assert report["bytes"] > 0


def test_dry_run(coremerge, save, base, tmp_path):
    adapter = save("math")
    before = sorted(tmp_path.rglob("*"))
    for options in ([], ["-o", tmp_path / "out"]):
        result = coremerge("apply", adapter, "--base", base, "--dry-run", *options)
        assert result.code == 0
        assert "would apply 3 modules" in result.out
        assert "rounding" not in result.out
    assert sorted(tmp_path.rglob("*")) == before


def test_refusals(coremerge, save, base, tmp_path):
    adapter, out = save("math"), tmp_path / "out"
    result = coremerge("apply", adapter, "--base", base)
    assert (result.code, result.err) == (
        2,
        "error: no output: give -o OUT, or --dry-run to only check\n",
    )
    assert coremerge("apply", adapter, "--base", base, "-o", base, "--force").code == 1
    assert "is the adapter" in coremerge("apply", adapter, "--base", base, "-o", adapter).err
    other = save("code", modules={"other.query": (6, 8)})
    result = coremerge("apply", other, "--base", base, "-o", out)
    assert result.code == 1
    assert "none of the adapter's 1 modules" in result.err
    assert "no such folder" in coremerge("apply", adapter, "--base", "nothing", "-o", out).err
    assert not out.exists()
    assert coremerge("apply", adapter, "--base", base, "-o", out).code == 0
    assert "already exists" in coremerge("apply", adapter, "--base", base, "-o", out).err
    assert coremerge("apply", adapter, "--base", base, "-o", out, "--force").code == 0
