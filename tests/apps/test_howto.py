"""The how-tos' examples run: on adapters of the demo, or on files as they describe them."""

from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import random_adapters
from orbax.checkpoint import v1 as ocp
from pages import DOCS, folder, run_page

import coremerge_jax as cm
from coremerge_jax import demo
from coremerge_jax.trees import translate

__all__ = ["folder"]  # a fixture

HEADS, HEAD_DIM, WIDTH, RANK = 2, 8, 16, 2


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


def checkpoints(write):
    adapters = {task: llama(seed) for seed, task in enumerate(("math", "code"))}
    for task, adapter in adapters.items():
        write(adapter, Path("checkpoints").absolute() / task)
    if write is write_maxtext:
        write_maxtext_base(Path("checkpoints").absolute() / "base")


PREPARE = {
    "maxtext": lambda: checkpoints(write_maxtext),
    "tunix": lambda: checkpoints(write_tunix),
}


def check_converted(_):
    for seed, task in enumerate(("math", "code")):
        found = cm.load_peft(task)
        for path, lora in llama(seed).items():
            np.testing.assert_allclose(found[path].dense(), lora.dense(), rtol=1e-4, atol=1e-5)
    assert set(cm.open_adapter("restart").outline)


def check_distributed(found):
    assert set(cm.open_orbax("checkpoint").outline) == set(found["opened"][0])


def check_search(found):
    losses = [row["validation"] for row in found["fitted"].history]
    assert min(losses) < 0.8 * losses[0]


def check_jax(found):
    assert found["sweep"].shape == (10, 80, 80)
    assert found["gradient"].shape == (len(demo.TASKS),)
    assert found["step"]._cache_size() == 1
    assert all(jax.numpy.isfinite(found["slopes"]))


CHECK = {
    "distributed": check_distributed,
    "jax": check_jax,
    "maxtext": check_converted,
    "search": check_search,
    "tunix": check_converted,
}


BY_NIGHT = ("distributed", "memory")  # they start processes
PAGES = [
    pytest.param(page, marks=[pytest.mark.nightly] * (page in BY_NIGHT))
    for page in sorted(path.stem for path in DOCS.glob("howto/*.md"))
]


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.usefixtures("folder")
def test_examples_run(page):
    if page in PREPARE:
        PREPARE[page]()
    found = run_page(DOCS / "howto" / f"{page}.md")
    if page in CHECK:
        CHECK[page](found)
