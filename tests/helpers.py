"""Random adapters, and dense NumPy counterparts of what the library computes."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import numpy as np
from threadpoolctl import threadpool_limits

import coremerge_jax as cm

KEY = jax.random.key(0)

# Rules as they are published: at scale 1.
plain_merge = functools.partial(cm.merge, scale=1.0)
plain_stream = functools.partial(cm.merge_stream, scale=1.0)


def modules(shape: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """As many modules as a law has examples: merged at once, they cost little more than one."""
    from hypothesis import settings  # not in the programs that tests start

    return {f"x{i}": shape for i in range(settings().max_examples)}


def narrow(names: Iterable[str], chosen: Sequence[str], night: Iterable[str] = ()) -> list:
    """Names as parameters of a test, all but the chosen ones with one version of JAX only.

    Args:
        names: all.
        chosen: those on all versions.
        night: those that only `.ci/nightly` runs.
    """
    import pytest  # not in the programs that tests start

    marks = {name: [] if name in chosen else [pytest.mark.wide] for name in names}
    for name in night:
        marks[name].append(pytest.mark.nightly)
    return [pytest.param(name, marks=found) for name, found in marks.items()]


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


def random_inputs(
    adapters: Sequence[cm.Adapter], seed: int = 0, count: int = 40
) -> list[dict[str, np.ndarray]]:
    """Inputs ``(count, n)`` of each module, for each adapter that has it."""
    rng = np.random.default_rng([seed, 1])
    return [
        {path: rng.standard_normal((count, lora.shape[1])) for path, lora in adapter.items()}
        for adapter in adapters
    ]


def statistics_of(
    adapters: Sequence[cm.Adapter],
    inputs: Sequence[Mapping[str, np.ndarray]],
    full: bool | None = None,
) -> cm.Statistics:
    """The statistics of inputs, in NumPy; if not told, of whole ones where ranks are no fewer."""
    grams = {}
    for path in dict.fromkeys(path for adapter in adapters for path in adapter):
        tasks = [t for t, adapter in enumerate(adapters) if path in adapter]
        a = np.vstack([adapters[t][path].a for t in tasks])
        whole = len(a) >= a.shape[1] if full is None else full
        z = [inputs[t][path] if whole else inputs[t][path] @ a.T for t in tasks]
        grams[path] = cm.Gram(
            matrices=np.stack([x.T @ x for x in z]),
            counts=np.array([float(len(x)) for x in z]),
            squares=None if whole else np.sum(a**2, axis=1),
            tasks=tuple(tasks),
            ranks=tuple(adapters[t][path].rank for t in tasks),
        )
    return cm.Statistics(grams, [adapter.metadata.name for adapter in adapters])


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


def assert_same(
    merged: cm.Adapter,
    expected: Mapping,
    tolerance: float,
    growth: Callable[[str], float] = lambda _: 1.0,
) -> None:
    """The updates (LoRA or dense) agree in every module.

    Args:
        merged: what is tested.
        expected: what it should be.
        tolerance: the relative error allowed for a well-conditioned module.
        growth: the number by which errors of a module may grow; only asked for where they do.
    """
    assert set(merged) == set(expected)
    for path, lora in merged.items():
        other = expected[path]
        other = dense(other) if isinstance(other, cm.LoRA) else other
        assert np.isfinite(dense(lora)).all(), path
        error = distance(dense(lora), other)
        allowed = tolerance if error <= tolerance else tolerance * max(1.0, growth(path))
        assert error <= allowed, f"{path}: {error:.2e} > {allowed:.2e}"


def sensitivity(definition: Callable, loras: Sequence[cm.LoRA], size: float = 1e-7) -> float:
    """The number by which small relative errors of the factors grow in a merged update.

    That depends on the case: on gaps between singular values at a cut, and on their spread. It is
    found by changing the factors, and merging by a NumPy definition: not by what is tested.

    Args:
        definition: merges LoRA factors to a dense update.
        loras: those of one module.
        size: of the changes, relative to a factor's Frobenius norm.
    """
    rng = np.random.default_rng(0)

    def changed(x: np.ndarray) -> np.ndarray:
        x = np.asarray(x, np.float64)
        return x + size * np.linalg.norm(x) / x.size**0.5 * rng.standard_normal(x.shape)

    exact = definition(loras)

    def moved() -> float:
        return distance(definition([cm.LoRA(a=changed(x.a), b=changed(x.b)) for x in loras]), exact)

    with threadpool_limits(1):  # more wait for each other where a machine is busy
        return max(moved() for _ in range(16)) / size


def orthogonal(rng: np.random.Generator, size: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((size, size)))[0]
