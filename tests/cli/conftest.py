from dataclasses import dataclass

import commands
import numpy as np
import pytest

import coremerge_jax as cm
from coremerge_jax.io.peft.writer import save_peft

MODULES = {"layer.0.query": (6, 8), "layer.0.value": (6, 8), "layer.0.dense": (8, 5)}


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def coremerge(capsys, monkeypatch):
    """Runs the command line in this process, as `coremerge ARGS` would."""
    monkeypatch.delenv("COREMERGE_DEBUG", raising=False)

    def run(*args):
        code = commands.run(*args)
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture
def save(tmp_path):
    """Writes a PEFT adapter of random factors to `tmp_path / name`."""

    def write(name, rank=2, modules=MODULES, base_model="org/base", extras=None):
        rng = np.random.default_rng([ord(letter) for letter in name])
        loras = {
            path: cm.LoRA(
                a=rng.normal(size=(rank, n)).astype(np.float32),
                b=rng.normal(size=(m, rank)).astype(np.float32),
            )
            for path, (m, n) in modules.items()
        }
        metadata = cm.Metadata(
            base_model=base_model, config={"modules_to_save": ["head"]} if extras else {}
        )
        save_peft(cm.Adapter(loras, metadata=metadata, extras=extras), tmp_path / name)
        return tmp_path / name

    return write


@pytest.fixture
def adapters(save):
    """Three adapters, of different ranks."""
    return [save("math", 2), save("code", 3), save("chat", 3)]
