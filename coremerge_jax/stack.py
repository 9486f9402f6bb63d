"""Stacks: modules of one signature, batched along a leading axis."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from coremerge_jax.errors import MismatchError
from coremerge_jax.lora import Adapter, Array, LoRA, widest


@dataclasses.dataclass(frozen=True)
class Stack:
    """Modules with equal shape and equal ranks of the adapters that have them.

    Attributes:
        paths: the modules' paths, L of them.
        tasks: int32 ``(L, T)``, which adapters have the module.
        ranks: the rank of each of them, ``sum(ranks) == R``.
        a: ``(L, R, n)``, the A factors below each other.
        b: ``(L, m, R)``, the B factors side by side.
    """

    paths: tuple[str, ...]
    tasks: np.ndarray
    ranks: tuple[int, ...]
    a: Array
    b: Array

    def like(self, *results: jax.Array) -> tuple[Array, ...]:
        """Results as NumPy arrays if the stack came in such, and as they are if not (or traced)."""
        on_host = isinstance(self.a, np.ndarray) and isinstance(self.b, np.ndarray)
        if not on_host or any(isinstance(x, jax.core.Tracer) for x in results):
            return results
        return tuple(map(np.asarray, results))


def stack_adapters(adapters: Sequence[Adapter]) -> Iterator[Stack]:
    """Groups the modules of all adapters by signature (m, n, ranks) and stacks them.

    A module that only some adapters have is stacked for those alone.

    Raises:
        MismatchError: a module has not the same shape, or kind, in all adapters that have it.
    """
    groups: dict[tuple, list[tuple[str, tuple[int, ...]]]] = {}
    for path in dict.fromkeys(path for adapter in adapters for path in adapter):
        tasks = tuple(t for t, adapter in enumerate(adapters) if path in adapter)
        loras = [adapters[t][path] for t in tasks]
        for t, lora in zip(tasks, loras, strict=True):
            _check_same(adapters, path, tasks[0], t, lora)
        signature = (loras[0].shape, tuple(lora.rank for lora in loras))
        groups.setdefault(signature, []).append((path, tasks))
    for (_, ranks), members in groups.items():
        rows = [[adapters[t][path] for t in tasks] for path, tasks in members]
        yield Stack(
            paths=tuple(path for path, _ in members),
            tasks=np.asarray([tasks for _, tasks in members], np.int32),
            ranks=ranks,
            a=_pile(lambda lora: lora.a, rows, axis=0),
            b=_pile(lambda lora: lora.b, rows, axis=1),
        )


def _check_same(adapters: Sequence[Adapter], path: str, first: int, other: int, lora: LoRA) -> None:
    expected = adapters[first][path]
    for what, x, y in (
        ("shape (m, n)", expected.shape, lora.shape),
        ("kind", _layout(expected), _layout(lora)),
    ):
        if x != y:
            raise MismatchError(
                f"module {path!r} has {what} {x} in {label(adapters, first)} but {y} in "
                f"{label(adapters, other)}; adapters of one base model agree in it"
            )


def _layout(lora: LoRA) -> tuple:
    # Not `transposed`: it says how the base stores its weight, which merging does not touch.
    return (lora.kind.name, *lora.kind.kernel)


def label(adapters: Sequence[Adapter], t: int) -> str:
    """How to call an adapter in a message."""
    name = adapters[t].metadata.name
    return f"adapter {name!r}" if name else f"adapter {t}"


def _pile(factor: Callable[[LoRA], Array], loras: list[list[LoRA]], axis: int) -> Array:
    """Joins the factors of each module along the rank axis and stacks the modules."""
    factors = [[factor(lora) for lora in row] for row in loras]
    flat = [x for row in factors for x in row]
    xp = np if all(isinstance(x, np.ndarray) for x in flat) else jnp
    dtype = widest(*{x.dtype for x in flat})
    rows = [xp.concatenate([xp.asarray(x, dtype) for x in row], axis=axis) for row in factors]
    return xp.stack(rows)
