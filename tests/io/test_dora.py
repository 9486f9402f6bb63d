"""DoRA as LoRA, given the base model."""

import json

import commands
import numpy as np
import pytest
from safetensors.numpy import save_file

import coremerge_jax as cm
from coremerge_jax.io import open_dora

PATHS = {"model.layers.0.q_proj": (9, 6), "model.layers.0.v_proj": (4, 6)}
P = "base_model.model."


@pytest.fixture
def weights(rng):
    return {path: rng.standard_normal(shape, np.float32) for path, shape in PATHS.items()}


@pytest.fixture
def base(weights, tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    save_file({f"{path}.weight": w for path, w in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    return folder


@pytest.fixture
def dora(factors, write, rng):
    """Writes an adapter, and returns its folder and the tensors of each module."""

    def make(suffix="", **fields):
        tensors = factors({path: (*shape, 2) for path, shape in PATHS.items()})
        for path, (m, _) in PATHS.items():
            tensors[f"{P}{path}.lora_magnitude_vector{suffix}"] = rng.random(m, np.float32) + 1
        return write(tensors, use_dora=True, **fields), tensors

    return make


def update(weight, tensors, path):
    """Returns what DoRA adds to a weight, by its definition (arXiv 2402.09353, eq. 5)."""
    a, b = (tensors[f"{P}{path}.lora_{x}.weight"].astype(float) for x in "AB")
    adapted = weight.astype(float) + 3 * b @ a
    key = next(key for key in tensors if key.startswith(f"{P}{path}.lora_magnitude"))
    return tensors[key][:, None] * adapted / np.linalg.norm(adapted, axis=1)[:, None] - weight


@pytest.mark.parametrize("suffix", ["", ".weight", ".default.weight"])
def test_at_full_rank_nothing_is_lost(dora, base, weights, suffix):
    folder, tensors = dora(suffix)
    adapter = open_dora(folder, base, rank=100)
    for path, (m, n) in PATHS.items():
        lora = adapter[path]
        assert lora.rank == adapter.outline[path].rank == min(m, n)
        np.testing.assert_allclose(
            lora.dense(), update(weights[path], tensors, path), rtol=1e-4, atol=1e-4
        )
        assert adapter.kept[path] == pytest.approx(1)


def test_a_cut_is_the_best_of_its_rank(dora, base, weights):
    folder, tensors = dora()
    adapter = open_dora(folder, base, rank=1)
    for path in PATHS:
        u, s, vt = np.linalg.svd(update(weights[path], tensors, path), full_matrices=False)
        best = s[0] * np.outer(u[:, 0], vt[0])
        np.testing.assert_allclose(adapter[path].dense(), best, rtol=1e-4, atol=1e-4)
        assert adapter.kept[path] == pytest.approx(s[0] ** 2 / (s**2).sum())


def test_from_the_command_line(capsys, dora, base, tmp_path):
    folder, _ = dora()
    lora, out = tmp_path / "lora", tmp_path / "out"
    options = ["--base", base, "--rank", 2]
    for args, code, message in (
        (["merge", folder, folder, "-o", out], 1, "--base MODEL --rank N"),
        (["convert", folder, "-o", lora, *options], 0, "energy kept"),
        (["convert", lora, "-o", out, *options], 2, "no DoRA adapter"),
        (["convert", folder, "-o", out, *options[:2]], 2, "give --rank"),
    ):
        assert commands.run(*args) == code
        assert message in "".join(capsys.readouterr())
    again, expected = cm.load_peft(lora), open_dora(folder, base, rank=2)
    for path in PATHS:
        assert np.array_equal(again[path].b, expected[path].b)
    assert not out.exists()


def test_what_does_not_fit_is_refused(dora, factors, write, rng, base):
    folder, _ = dora()
    (base / "model.safetensors").unlink()
    save_file({f"{path}.weight": np.ones((3, 3)) for path in PATHS}, base / "model.safetensors")
    with pytest.raises(cm.MismatchError, match="is it the right base"):
        open_dora(folder, base, rank=2)
    tensors = factors({path: (*shape, 2) for path, shape in PATHS.items()})
    tensors[f"{P}embed.lora_magnitude_vector"] = rng.random(3, np.float32)
    with pytest.raises(cm.UnsupportedError, match="magnitude of no linear layer"):
        open_dora(write(tensors, "other", use_dora=True), base, rank=2)


@pytest.mark.oracle
def test_peft_adds_the_same(tmp_path, base, weights):
    import peft
    import torch

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.v_proj = (
                torch.nn.Linear(n, m, bias=False) for m, n in PATHS.values()
            )

    model = Model()
    with torch.no_grad():
        for path, weight in weights.items():
            getattr(model, path.rpartition(".")[2]).weight.copy_(torch.from_numpy(weight))
    base_folder = tmp_path / "own"
    base_folder.mkdir()
    (base_folder / "config.json").write_text((base / "config.json").read_text())
    short = {f"{path.rpartition('.')[2]}.weight": weight for path, weight in weights.items()}
    save_file(short, base_folder / "model.safetensors")
    config = peft.LoraConfig(r=2, lora_alpha=6, use_dora=True, target_modules=["q_proj", "v_proj"])
    trained = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, value in trained.named_parameters():
            if "lora_" in name:
                value += torch.randn_like(value)
    trained.save_pretrained(tmp_path / "dora")
    adapter = open_dora(tmp_path / "dora", base_folder, rank=6)
    merged = trained.merge_and_unload()
    for name, weight in short.items():
        path = name.removesuffix(".weight")
        expected = merged.get_submodule(path).weight.detach().numpy() - weight
        np.testing.assert_allclose(adapter[path].dense(), expected, atol=1e-4)
