"""The shipped files: base model, adapters, images."""

from functools import cache
from importlib import resources
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from coremerge_jax.demo.model import Params
from coremerge_jax.demo.tasks import TASKS

# Arrays are cached: they must not be tracers if the first call is inside a jitted function.
_concrete = jax.ensure_compile_time_eval

DATA = Path(str(resources.files("coremerge_jax.demo") / "data"))


def adapters(folder: Path = DATA) -> list[Path]:
    """Returns the folders of the shipped PEFT adapters, one a task, in the order of `TASKS`."""
    return [folder / "adapters" / name for name in TASKS]


@cache
def base(folder: Path = DATA) -> Params:
    """Returns the parameters of the base model."""
    stored = load_file(folder / "base.safetensors")
    with _concrete():
        return {path: jnp.asarray(value, jnp.float32) for path, value in stored.items()}


@cache
def images(split: str = "test", folder: Path = DATA) -> tuple[jax.Array, jax.Array]:
    """Returns plain images ``(N, 8, 8)`` in [0, 1] and labels of ``"validation"`` or ``"test"``."""
    with np.load(folder / "images.npz") as stored:
        pixels, labels = stored[f"{split}_images"], stored[f"{split}_labels"]
    with _concrete():
        return jnp.asarray(pixels, jnp.float32) / 16, jnp.asarray(labels, jnp.int32)


@cache
def questions(split: str = "test", folder: Path = DATA) -> tuple[jax.Array, jax.Array]:
    """Returns the images of all tasks ``(T, N, 8, 8)`` and their common labels ``(N,)``."""
    plain, labels = images(split, folder)
    with _concrete():
        return jnp.stack([transform(plain) for transform in TASKS.values()]), labels
