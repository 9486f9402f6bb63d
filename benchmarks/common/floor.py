"""The floor of a merge: reading the factors, and three matrix products for each module.

Two Gram matrices in float64, R × n × R and R × m × R, and one product m × R × R in float32. Each is
timed with the fastest library at hand for it (NumPy's BLAS, XLA, PyTorch's if it is imported), on
all cores, with operands that may stay in cache.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from common.shapes import Kind, Shape

Product = Callable[[np.ndarray, np.ndarray], Callable[[], Any]]


def _numpy(x: np.ndarray, y: np.ndarray) -> Callable[[], Any]:
    return lambda: x @ y  # for y = xᵀ, NumPy calls syrk: half the work


def _torch(x: np.ndarray, y: np.ndarray) -> Callable[[], Any]:
    import torch

    left, right = torch.from_numpy(x), torch.from_numpy(y)
    return lambda: left @ right


def _xla(x: np.ndarray, y: np.ndarray) -> Callable[[], Any]:
    left, right = jax.device_put(x), jax.device_put(y)
    product = jax.jit(jax.numpy.matmul)
    return lambda: product(left, right).block_until_ready()


LIBRARIES: dict[str, Product] = {"numpy": _numpy, "torch": _torch, "xla": _xla}


class Floor:
    """The minimal products of all modules of a shape.

    Attributes:
        flop: floating point operations of the products, as full products.
        libraries: the fastest library for each product.
    """

    def __init__(self, shape: Shape) -> None:
        self.flop = 0
        self.libraries: dict[str, str] = {}
        self._calls: list[tuple[int, Callable[[], Any]]] = []
        with jax.enable_x64(True):
            for kind in shape.kinds:
                for name, (x, y) in _operands(kind, shape.stacked_rank).items():
                    call, library = _fastest(x, y)
                    count = shape.modules(kind)
                    self._calls.append((count, call))
                    self.flop += 2 * count * x.shape[0] * x.shape[1] * y.shape[1]
                    self.libraries[f"{name} of {kind.m} × {kind.n}"] = library

    def __call__(self) -> None:
        """Multiplies."""
        with jax.enable_x64(True):
            for count, call in self._calls:
                for _ in range(count):
                    call()


def _operands(kind: Kind, rank: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    a, b = rng.random((rank, kind.n)), rng.random((kind.m, rank))
    core = rng.random((rank, rank), np.float32)
    return {"A Aᵀ": (a, a.T), "Bᵀ B": (b.T, b), "B C": (b.astype(np.float32), core)}


def _fastest(x: np.ndarray, y: np.ndarray) -> tuple[Callable[[], Any], str]:
    timed = []
    for library, product in LIBRARIES.items():
        if library != "torch" or "torch" in sys.modules:
            call = product(x, y)
            call()
            timed.append((min(_seconds(call) for _ in range(5)), library, call))
    _, library, call = min(timed, key=lambda entry: entry[0])
    return call, library


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Files:
    """Files with as many bytes as the float32 factors of each adapter, to read.

    They have just been written, so reading them is a copy out of the page cache.
    """

    def __init__(self, shape: Shape) -> None:
        size = sum(shape.modules(kind) * (kind.m + kind.n) for kind in shape.kinds)
        self.bytes = 4 * shape.rank * size * shape.tasks
        self._folder = tempfile.TemporaryDirectory(prefix="coremerge-benchmark-")
        self._buffer = bytearray(8 << 20)
        self._paths = [Path(self._folder.name) / str(t) for t in range(shape.tasks)]
        for path in self._paths:
            path.write_bytes(bytes(self.bytes // shape.tasks))

    def __call__(self) -> None:
        """Reads all of them."""
        for path in self._paths:
            with path.open("rb", buffering=0) as file:
                while file.readinto(self._buffer):
                    pass

    def remove(self) -> None:
        """Deletes them."""
        self._folder.cleanup()
