"""Random adapters, and dense NumPy counterparts of what the library computes."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np

import coremerge_jax as cm

KEY = jax.random.key(0)


def random_adapters(
    shapes: Mapping[str, tuple[int, int]],
    ranks: Sequence[int],
    seed: int = 0,
    dtype: str = "float64",
) -> list[cm.Adapter]:
    """One adapter per rank, with modules of the given shapes (m, n)."""
    rng = np.random.default_rng(seed)
    return [
        cm.Adapter(
            {
                path: cm.LoRA(
                    a=rng.standard_normal((rank, n)).astype(dtype),
                    b=rng.standard_normal((m, rank)).astype(dtype),
                )
                for path, (m, n) in shapes.items()
            },
            metadata=cm.Metadata(name=f"task{t}"),
        )
        for t, rank in enumerate(ranks)
    ]


def map_factors(adapters: Sequence[cm.Adapter], fn) -> list[cm.Adapter]:
    """Adapters with ``fn(a, b) -> (a, b)`` applied to each module's factors."""
    return [
        adapter.replace(
            modules={
                path: cm.LoRA(**dict(zip("ab", fn(lora.a, lora.b), strict=True)))
                for path, lora in adapter.items()
            }
        )
        for adapter in adapters
    ]


def dense(lora: cm.LoRA) -> np.ndarray:
    return np.asarray(lora.b, np.float64) @ np.asarray(lora.a, np.float64)


def distance(x: np.ndarray, y: np.ndarray) -> float:
    """Frobenius norm of the difference, relative to that of ``y``."""
    return float(np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-300))


def assert_same(merged: cm.Adapter, expected: Mapping, tolerance: float) -> None:
    """The updates (LoRA or dense) agree in every module."""
    assert set(merged) == set(expected)
    for path, lora in merged.items():
        other = expected[path]
        other = dense(other) if isinstance(other, cm.LoRA) else other
        assert np.isfinite(dense(lora)).all(), path
        assert distance(dense(lora), other) <= tolerance, path


def orthogonal(rng: np.random.Generator, size: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((size, size)))[0]
