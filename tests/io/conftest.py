import json
import shutil
import subprocess

import numpy as np
import pytest
from kinds import KINDS, SHAPES, update
from safetensors.numpy import save_file

import coremerge_jax as cm

CONFIG = {
    "peft_type": "LORA",
    "base_model_name_or_path": "owner/base",
    "task_type": "CAUSAL_LM",
    "peft_version": "0.21.2",
    "r": 2,
    "lora_alpha": 6,
    "target_modules": ["q", "v"],
}


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def factors(rng):
    """Tensors of linear modules ``{path: (m, n, r)}`` under their keys."""

    def make(modules, prefix="base_model.model.", infix=""):
        tensors = {}
        for path, (m, n, r) in modules.items():
            for part, shape in (("A", (r, n)), ("B", (m, r))):
                value = rng.standard_normal(shape, np.float32)
                tensors[f"{prefix}{path}.lora_{part}{infix}.weight"] = value
        return tensors

    return make


@pytest.fixture
def write(tmp_path):
    """Writes a PEFT folder; a field of None is left out of the configuration."""

    def make(tensors, name="adapter", **fields):
        folder = tmp_path / name
        folder.mkdir()
        config = {k: v for k, v in {**CONFIG, **fields}.items() if v is not None}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "adapter_model.safetensors")
        return folder

    return make


@pytest.fixture
def adapter(rng):
    """One module of every kind."""
    modules = {}
    for path, kind in KINDS.items():
        name = path.partition("[")[0].rpartition(".")[2]
        modules[path] = update(rng, kind, SHAPES.get(name, (4, 6)))
    return cm.Adapter(modules, metadata=cm.Metadata(base_model="owner/base", task_type="CAUSAL_LM"))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 kB."""
    mount = shutil.which("mount")
    folder = tmp_path / "disk"
    folder.mkdir()
    command = [mount, "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if not mount or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs is not possible here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
