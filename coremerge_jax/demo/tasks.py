"""The tasks: digits under conditions that the base model was not trained for."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

Transform = Callable[[jax.Array], jax.Array]


def resample(images: jax.Array, linear: jax.Array, shift: jax.Array) -> jax.Array:
    """Returns images at coordinates that are transformed about the center; zero outside.

    Args:
        images: ``(N, 8, 8)``.
        linear: ``(N, 2, 2)``, from output to input coordinates.
        shift: ``(N, 2)``, in pixels.
    """
    axis = jnp.arange(8, dtype=jnp.float32) - 3.5
    grid = jnp.stack(jnp.meshgrid(axis, axis, indexing="ij"))
    points = jnp.einsum("nij,jhw->nihw", linear, grid) + 3.5 + shift[:, :, None, None]
    sample = jax.vmap(lambda image, at: jax.scipy.ndimage.map_coordinates(image, list(at), 1))
    return sample(images, points)


def _linear(matrix: list[list[float]]) -> Transform:
    fixed = jnp.asarray(matrix, jnp.float32)[None]

    def transform(images: jax.Array) -> jax.Array:
        n = len(images)
        return resample(images, jnp.broadcast_to(fixed, (n, 2, 2)), jnp.zeros((n, 2)))

    return transform


def _tilt(degrees: float) -> Transform:
    c, s = float(np.cos(np.deg2rad(degrees))), float(np.sin(np.deg2rad(degrees)))
    return _linear([[c, -s], [s, c]])


def _mask(images: jax.Array) -> jax.Array:
    return images.at[:, :, 5:].set(0.0)


def _stripe(images: jax.Array) -> jax.Array:
    return images.at[:, ::3].max(0.6)


def _shade(images: jax.Array) -> jax.Array:
    return 0.5 * images + jnp.linspace(0.0, 1.0, 8)[None, :, None]


def _stain(images: jax.Array) -> jax.Array:
    # RandomState: its numbers are the same in every version of NumPy.
    stain = np.random.RandomState(3).standard_normal((1, 8, 8)).astype(np.float32)
    return images + 0.3 * stain


TASKS: dict[str, Transform] = {
    "tilt": _tilt(45.0),
    "shear": _linear([[1.0, 0.0], [1.0, 1.0]]),
    "mask": _mask,
    "stripe": _stripe,
    "shade": _shade,
    "stain": _stain,
}
"""Functions of images ``(N, 8, 8)`` by name of the task; all share labels and head."""
