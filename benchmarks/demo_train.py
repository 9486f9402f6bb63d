"""Makes the demo's files again: ``python benchmarks/demo_train.py -o FOLDER``.

Needs the extra ``demo`` (scikit-learn) and a few minutes. The same machine and versions give the
same files.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import save_file
from sklearn.datasets import load_digits

from coremerge_jax import Adapter, LoRA, load_peft, project
from coremerge_jax.demo import data
from coremerge_jax.demo.evaluation import METHODS, evaluate, parse_chain
from coremerge_jax.demo.model import Params, fold, forward, init
from coremerge_jax.demo.tasks import TASKS, resample
from coremerge_jax.recipe import parse_space
from coremerge_jax.search import sweep

SEED = 1
BATCH = 128
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
RANKS = {"tilt": 8, "shear": 8}
RANK, ALPHA = 4, 16
SCALES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0)

T = TypeVar("T")
Batch = tuple[jax.Array, jax.Array]


def split() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns scikit-learn's digits (pixels 0 to 16) in three disjoint parts."""
    digits = load_digits()
    order = np.random.RandomState(SEED).permutation(len(digits.target))
    pixels, labels = (x[order].astype(np.uint8) for x in (digits.images, digits.target))
    ends = {"train": (0, 1000), "validation": (1000, 1297), "test": (1297, 1797)}
    return {name: (pixels[i:j], labels[i:j]) for name, (i, j) in ends.items()}


def distort(key: jax.Array, images: jax.Array, by: float) -> jax.Array:
    """Returns random small rotations, shears, zooms and shifts of strength ``by``."""
    keys, n = jax.random.split(key, 5), len(images)

    def uniform(i: int, limit: float, *shape: int) -> jax.Array:
        return jax.random.uniform(keys[i], (n, *shape), minval=-limit * by, maxval=limit * by)

    angle, shear, zoom, shift = uniform(0, 0.26), uniform(1, 0.2), uniform(2, 0.2), uniform(3, 1, 2)
    c, s = jnp.cos(angle), jnp.sin(angle)
    linear = jnp.stack([jnp.stack([c, shear - s], -1), jnp.stack([s, c], -1)], -2)
    return resample(images, linear / (1 + zoom)[:, None, None], shift)


def vary(key: jax.Array, images: jax.Array) -> jax.Array:
    """Returns training images of the base model: distorted, of random contrast, with noise."""
    keys, n = jax.random.split(key, 6), len(images)
    images = distort(keys[0], images, 1.0)
    contrast = jax.random.uniform(keys[1], (n, 1, 1), minval=0.6, maxval=1.0)
    images = contrast * images + (1 - contrast) * jax.random.uniform(keys[2], (n, 1, 1))
    noise = 0.1 * jax.random.uniform(keys[3], (n, 1, 1)) * jax.random.normal(keys[4], images.shape)
    corner = jax.random.randint(keys[5], (2, n, 1), -2, 8)
    row, column = (jnp.arange(8)[None] - corner) // 2 == 0
    return jnp.where(row[:, :, None] & column[:, None, :], 0.0, images + noise)


def fit(
    params: T,
    loss: Callable[[T, jax.Array], jax.Array],
    key: jax.Array,
    *,
    steps: int,
    rate: float,
    decay: float,
) -> T:
    """Minimizes a random loss with AdamW, a warm-up and a cosine schedule."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 20 + 1, steps)
    optimizer = optax.adamw(schedule, weight_decay=decay)

    def step(state: tuple, key: jax.Array) -> tuple[tuple, None]:
        params, moments = state
        updates, moments = optimizer.update(jax.grad(loss)(params, key), moments, params)
        return (optax.apply_updates(params, updates), moments), None

    keys = jax.random.split(key, steps)
    run = jax.jit(lambda params: jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0])
    return run(params)


def sample(key: jax.Array, examples: Batch) -> Batch:
    """Returns a batch, with replacement."""
    pick = jax.random.randint(key, (BATCH,), 0, len(examples[1]))
    return examples[0][pick], examples[1][pick]


def cross_entropy(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy of the model's answers."""
    logits = forward(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train_base(examples: Batch, steps: int) -> Params:
    """Trains all parameters on plain digits."""

    def loss(params: Params, key: jax.Array) -> jax.Array:
        images, labels = sample(key, examples)
        return cross_entropy(params, vary(jax.random.fold_in(key, 1), images), labels)

    return fit(init(SEED), loss, jax.random.key(SEED), steps=steps, rate=3e-3, decay=0.05)


def train_adapter(base: Params, task: str, rank: int, examples: Batch, steps: int) -> Adapter:
    """Trains an adapter on a task; half of each batch is data of the base model.

    This replay, common in practice, keeps the adapter from changing more than it has to.
    """
    # A factors differ, as in unrelated trainings.
    seed = jax.random.key(1 + list(TASKS).index(task))
    modules = {}
    for i, path in enumerate(p.removesuffix(".kernel") for p in base if p.endswith(".kernel")):
        if path.split(".")[-1] in TARGETS:
            n, m = base[f"{path}.kernel"].shape
            key = jax.random.fold_in(seed, i)
            modules[path] = LoRA(
                a=jax.random.normal(key, (rank, n)) / np.sqrt(n), b=jnp.zeros((m, rank))
            )

    def loss(adapter: Adapter, key: jax.Array) -> jax.Array:
        images, labels = sample(key, examples)
        first, second = jax.random.split(jax.random.fold_in(key, 1))
        shown = TASKS[task](distort(first, images[: BATCH // 2], 0.5))
        replayed = vary(second, images[BATCH // 2 :])
        return cross_entropy(fold(base, adapter), jnp.concatenate([shown, replayed]), labels)

    return fit(Adapter(modules), loss, seed, steps=steps, rate=2e-3, decay=0.01)


def save_adapter(adapter: Adapter, rank: int, folder: Path) -> None:
    """Writes the factors as PEFT does in training: the scaling alpha / r is not part of B."""
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "coremerge_jax.demo",
        "r": rank,
        "lora_alpha": ALPHA,
        "target_modules": TARGETS,
        "bias": "none",
    }
    tensors = {}
    for path, lora in adapter.items():
        prefix = f"base_model.model.{path}"
        tensors[f"{prefix}.lora_A.weight"] = np.asarray(lora.a, np.float16)
        tensors[f"{prefix}.lora_B.weight"] = np.asarray(lora.b * (rank / ALPHA), np.float16)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def choose_scales(folder: Path) -> dict[str, float]:
    """Returns the scale of each method that is best on the validation images."""

    def mean_accuracy(adapter: Adapter) -> float:
        return float(np.mean([*evaluate(adapter, split="validation", folder=folder).values()]))

    loaded, scales = [load_peft(path) for path in data.adapters(folder)], {}
    for name, space in METHODS:
        rule = parse_chain(name)
        projected = project(loaded, space=parse_space(space))
        tried = SCALES if name != "mean" else (1.0,)  # the plain average is the baseline
        key = jax.random.key(0)
        swept = sweep(projected, rule, mean_accuracy, {"scale": tried}, key=key)
        scales[f"{name} in {space}"] = swept.best.scale
        print(name, space, swept.summary(), flush=True)
    return scales


def main(out: Path, base_steps: int = 2000, adapter_steps: int = 400) -> None:
    """Trains the base model and the adapters, chooses scales, and writes all files."""
    out.mkdir(parents=True, exist_ok=True)
    parts = split()
    held_out = {
        f"{name}_{what}": array
        for name in ("validation", "test")
        for what, array in zip(("images", "labels"), parts[name], strict=True)
    }
    # NumPy types its options and the arrays by name alike.
    np.savez_compressed(out / "images.npz", **held_out)  # type: ignore[arg-type]
    pixels, labels = parts["train"]
    examples = jnp.asarray(pixels, jnp.float32) / 16, jnp.asarray(labels, jnp.int32)

    trained = train_base(examples, base_steps)
    stored = {path: np.asarray(value, np.float16) for path, value in trained.items()}
    save_file(stored, out / "base.safetensors")
    base = data.base(out)  # as rounded to 16 bits
    for task, folder in zip(TASKS, data.adapters(out), strict=True):
        rank = RANKS.get(task, RANK)
        save_adapter(train_adapter(base, task, rank, examples, adapter_steps), rank, folder)
        print(task, evaluate(load_peft(folder), split="validation", folder=out)[task], flush=True)

    scales = choose_scales(out)
    (out / "scales.json").write_text(json.dumps(scales, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder to write")
    main(parser.parse_args().out)
