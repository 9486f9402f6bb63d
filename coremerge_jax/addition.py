"""W + ΔW on the host: summed in float32 at least, rounded once, by blocks of rows."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from coremerge_jax.errors import FormatError
from coremerge_jax.lora import LoRA, widest
from coremerge_jax.processors import processors

# Dtypes of weights that take an update.
FLOATS = ("float64", "float32", "bfloat16", "float16")

# Elements of a weight that are in memory at a time, a few times over: they fit into caches.
BLOCK = 2**18

# What overflows is found in the result, and refused.
_unwarned = np.errstate(over="ignore", invalid="ignore")


def add_update(
    name: str,
    lora: LoRA,
    read: Callable[[int, int], np.ndarray],
    write: Callable[[int, np.ndarray], None],
    *,
    transposed: bool = False,
    unit: int = 1,
    scale: float = 1.0,
) -> float:
    """Adds an update to a weight ``(m, n)`` that is read and written by blocks of rows.

    Blocks are computed by several threads, of which one at a time reads or writes.

    Args:
        name: of the weight, for messages.
        lora: the update.
        read: gives the rows from a first to before a last.
        write: takes the first row, and the rows to put there.
        transposed: whether the weight is ``(n, m)``.
        unit: blocks are of multiples of so many rows.
        scale: of the update.

    Returns:
        The rounding loss ``‖cast(W + ΔW) - (W + ΔW)‖ / ‖ΔW‖``: the share of the update that
        rounding to the dtype of the weight changed; 0 without an update.

    Raises:
        FormatError: the result does not fit into the dtype of the weight.
    """
    a, b = np.asarray(lora.a, np.float32), np.asarray(lora.b, np.float32)
    left, right = (a.T, b.T) if transposed else (b, a)
    step = unit * max(1, BLOCK // (unit * right.shape[1]))
    lock = threading.Lock()

    @_unwarned
    def add_block(start: int) -> tuple[float, float]:
        delta = left[start : start + step] @ right
        delta *= np.float32(scale)
        with lock:
            weight = read(start, start + len(delta))
        changed, rest = add(name, weight, delta)
        with lock:
            write(start, changed)
        return _square(delta), _square(rest)

    with ThreadPoolExecutor(processors()) as pool:
        norms, losses = zip(*pool.map(add_block, range(0, len(left), step)), strict=True)
    norm, lost = sum(norms), sum(losses)
    return (lost / norm) ** 0.5 if norm else 0.0


@_unwarned
def add(name: str, weight: np.ndarray, delta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the sum in the dtype of the weight, and what rounding took from the update.

    Raises:
        FormatError: see `cast`.
    """
    wide = weight.astype(widest(np.dtype(np.float32), weight.dtype))
    changed = cast(name, wide + delta, weight.dtype)
    # In this order exact, but for updates larger than the weight.
    return changed, delta - (changed.astype(wide.dtype) - wide)


@_unwarned
def cast(name: str, value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Returns the values in another dtype.

    Raises:
        FormatError: it cannot hold them, or they are not finite.
    """
    changed = value.astype(dtype)
    if dtype.name in FLOATS and not np.isfinite(changed).all():
        raise FormatError(
            f"tensor {name!r}: the result has values that {dtype} cannot hold, or that are not "
            "finite; check base and adapter, or apply to a base in a wider dtype"
        )
    return changed


def _square(x: np.ndarray) -> float:
    """Returns the sum of squares."""
    return float(np.square(x, dtype=np.float64).sum())
