"""Adapters on the Hugging Face hub, of which each file is fetched once and then in the cache."""

import json

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.numpy import save_file

import coremerge_jax as cm
from coremerge_jax.io import folders, hub_files
from coremerge_jax.io.formats import find_format

KEY = "base_model.model.layers.0.q"
KOHYA = "lora_unet_mid_block_attentions_0_proj_in"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A repository owner/name; returns a function that puts a file into it."""
    there, cache, asked = tmp_path / "hub", tmp_path / "cache", []

    def download(repo, name, *, revision=None, local_files_only=False):
        asked.append((name, revision))
        assert repo == "owner/name"
        file = cache / name
        if not file.exists():
            if local_files_only:
                raise LocalEntryNotFoundError("not in the cache")
            if not (there / name).exists():
                raise EntryNotFoundError("404")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes((there / name).read_bytes())
        return str(file)

    def names(repo, revision=None):
        del repo, revision
        return [str(x.relative_to(there)) for x in sorted(there.rglob("*")) if x.is_file()]

    def put(name, content):
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".json"):
            (there / name).write_text(json.dumps(content))
        else:
            save_file(
                {key: np.ones(shape, np.float32) for key, shape in content.items()}, there / name
            )

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", names)
    for module in (folders, hub_files):
        monkeypatch.setattr(module, "hub_answers", lambda: True)
    put.asked = asked
    return put


def pair(stem, ends=("lora_A.weight", "lora_B.weight")):
    return {f"{stem}.{ends[0]}": (2, 6), f"{stem}.{ends[1]}": (4, 2)}


KOHYA_FILE = pair(KOHYA, ("lora_down.weight", "lora_up.weight"))
PEFT_CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
MLX_CONFIG = {"lora_parameters": {"rank": 2, "scale": 2.0}}

# Files of a repository, what is asked for, the format that is found, and its name.
REPOSITORIES = {
    "diffusers": (
        {"pytorch_lora_weights.safetensors": pair("transformer.x.to_q"), "README.json": {}},
        "owner/name",
        ("diffusers adapter", "name"),
    ),
    "one file, in a folder": (
        {"flux/style.safetensors": KOHYA_FILE, "optimizer.safetensors": {"x": (2,)}},
        "owner/name/flux@main",
        ("kohya adapter", "flux"),
    ),
    "one of several files": (
        {"a.safetensors": KOHYA_FILE, "b.safetensors": KOHYA_FILE},
        "owner/name/b.safetensors",
        ("kohya adapter", "b"),
    ),
    "PEFT's weights alone": (
        {"adapter_model.safetensors": {**pair(KEY), f"{KEY}.alpha": ()}},
        "owner/name/adapter_model.safetensors",
        ("PEFT weights", "adapter_model"),
    ),
    "mlx-lm": (
        {
            "adapters.safetensors": {"layers.0.q.lora_a": (6, 2), "layers.0.q.lora_b": (2, 4)},
            "adapter_config.json": MLX_CONFIG,
        },
        "owner/name",
        ("MLX adapter", "name"),
    ),
    "PEFT, in shards": (
        {
            "adapter_model-1.safetensors": pair(KEY),
            "adapter_model-2.safetensors": pair(f"{KEY}2"),
            "adapter_model.safetensors.index.json": {
                "weight_map": {
                    f"{KEY}.lora_A.weight": "adapter_model-1.safetensors",
                    f"{KEY}2.lora_A.weight": "adapter_model-2.safetensors",
                }
            },
            "adapter_config.json": PEFT_CONFIG,
        },
        "owner/name",
        ("PEFT adapter", "name"),
    ),
    "PEFT, and another file": (
        {
            "adapter_model.safetensors": pair(KEY),
            "adapter_config.json": PEFT_CONFIG,
            "pytorch_lora_weights.safetensors": pair("transformer.x.to_q"),
        },
        "owner/name@v1",
        ("PEFT adapter", "name"),
    ),
}


@pytest.mark.parametrize("case", REPOSITORIES)
def test_an_adapter_of_any_format(hub, case):
    files, source, (kind, name) = REPOSITORIES[case]
    for file, content in files.items():
        hub(file, content)
    adapter = cm.open_adapter(source)
    assert find_format(source).name == kind
    assert adapter.metadata.name == name
    for lora in adapter.read(adapter).values():
        assert lora.shape == (4, 6)
    assert all(len(digest) == 64 for digest in cm.io.hash_source(source).values())
    assert {revision for _, revision in hub.asked} == {source.partition("@")[2] or None}


@pytest.mark.parametrize(
    ("files", "source", "message"),
    [
        (["a.safetensors", "b.safetensors"], "owner/name", "2 .safetensors files .*owner/name/a"),
        (["a.safetensors"], "owner/name/b.safetensors", "the repository has no"),
        (["x/a.safetensors"], "owner/name", "the repository has no adapter_model"),
        (["model.safetensors"], "owner/name", "the repository has no adapter_model"),
        ([], "loras/style.safetensors", "^loras/style.safetensors: no such file$"),
    ],
)
def test_a_repository_without_a_certain_adapter(hub, files, source, message):
    for file in files:
        hub(file, KOHYA_FILE)
    with pytest.raises(cm.FormatError, match=message):
        cm.open_adapter(source)
