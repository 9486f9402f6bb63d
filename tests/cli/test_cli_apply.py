"""`coremerge apply`: what it writes, shows and refuses."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import load_file, save_file

from coremerge_jax.io.orbax.orbax_adapter import save_orbax
from coremerge_jax.io.peft.reader import load_peft

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
    assert "is the input" in coremerge("apply", adapter, "--base", base, "-o", adapter).err
    other = save("code", modules={"other.query": (6, 8)})
    result = coremerge("apply", other, "--base", base, "-o", out)
    assert result.code == 1
    assert "none of the adapter's 1 modules" in result.err
    assert "no such folder" in coremerge("apply", adapter, "--base", "nothing", "-o", out).err
    assert not out.exists()
    assert coremerge("apply", adapter, "--base", base, "-o", out).code == 0
    assert "already exists" in coremerge("apply", adapter, "--base", base, "-o", out).err
    assert coremerge("apply", adapter, "--base", base, "-o", out, "--force").code == 0


def test_a_base_that_is_an_orbax_checkpoint(coremerge, save, tmp_path):
    rng = np.random.default_rng(0)
    kernels = {
        "query": rng.standard_normal((8, 2, 3)).astype(jnp.bfloat16),
        "value": rng.standard_normal((8, 6)).astype(jnp.bfloat16),
        "dense": rng.standard_normal((5, 8)).astype(np.float32),
    }
    tree = {"layer_0": {name: {"kernel": jnp.asarray(x)} for name, x in kernels.items()}}
    base, out = tmp_path / "base", tmp_path / "out"
    ocp.save(base, tree)
    adapter = save("math")
    options = ("--axes", "*/query=ioo")
    assert (
        "no item 'x'" in coremerge("apply", adapter, "--base", base, "--item", "x", "-o", out).err
    )
    result = coremerge("apply", adapter, "--base", base, *options, "--dry-run")
    assert "would apply 3 modules" in result.out
    assert not out.exists()
    result = coremerge("apply", adapter, "--base", base, *options, "-o", out)
    assert (result.code, result.err) == (0, "")
    for part in ("1: query", "8 × 2 × 3", "bfloat16", "%", f"wrote {out}"):
        assert part in result.out
    found = ocp.metadata(out).custom_metadata["coremerge"]
    assert found["sources"][0]["path"] == str(adapter)
    opened = load_peft(adapter)
    result = coremerge("apply", adapter, "--base", base, "-o", out, "--force", "--json")
    report = json.loads(result.out)
    assert report["modules"]["layer.0.dense"]["tensor"] == "layer_0/dense/kernel"
    assert report["modules"].keys() == set(opened)
    assert (
        "axes 'io' for kernel"
        in coremerge("apply", adapter, "--base", base, "--axes", "*=io", "-o", out, "--force").err
    )


@pytest.mark.parametrize(
    "option",
    [
        ("--names", "tunix"),
        ("--head-dim", 2),
        ("--scan-axis", 0),
        ("--axes", "*=io"),
        ("--item", "x"),
    ],
)
def test_options_of_checkpoints_for_other_bases(coremerge, save, base, option):
    result = coremerge("apply", save("math"), "--base", base, "--dry-run", *option)
    assert result.code == 2
    assert f"no orbax checkpoint; {option[0][2:].replace('-', '_')} ({option[0]})" in result.err
    assert (
        "PATTERN=AXES" in coremerge("apply", "a", "--base", base, "--dry-run", "--axes", "io").err
    )


def test_an_adapter_from_a_checkpoint(coremerge, save, base, tmp_path):
    save_orbax(load_peft(save("math")), tmp_path / "checkpoint")
    for adapter in ("math", "checkpoint"):
        out = tmp_path / f"from {adapter}"
        assert coremerge("apply", tmp_path / adapter, "--base", base, "-o", out).code == 0
    one, two = (tmp_path / f"from {x}" / "model.safetensors" for x in ("math", "checkpoint"))
    assert one.read_bytes() == two.read_bytes()


def test_adapters_and_models_do_not_replace_each_other(coremerge, save, adapters, base, tmp_path):
    merged, model = tmp_path / "merged", tmp_path / "model"
    assert coremerge("merge", *adapters, "-o", merged).code == 0
    assert coremerge("apply", merged, "--base", base, "-o", model).code == 0
    before = sorted(path for folder in (merged, model) for path in folder.rglob("*"))
    other = save("other")
    result = coremerge("apply", other, "--base", base, "-o", merged, "--force")
    assert (result.code, result.out) == (1, "")
    assert "merged: holds another kind of output (PEFT adapter, not model)" in result.err
    result = coremerge("merge", *adapters, "-o", model, "--force")
    assert (result.code, result.out) == (1, "")
    assert "model: holds another kind of output (model, not PEFT adapter)" in result.err
    assert sorted(path for folder in (merged, model) for path in folder.rglob("*")) == before
