"""Cost of a merge, in operations, memory and time, from shapes alone."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from coremerge_jax.linalg import lapack, matmul
from coremerge_jax.merging.groups import Group
from coremerge_jax.rules import Chain, Equivariance
from coremerge_jax.rules.operations import Operations
from coremerge_jax.spaces import Space

# Beyond this, a batch gains nothing: what it works on should stay in a cache or near it.
_BATCH_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of merging some modules.

    Attributes:
        modules: how many.
        products: floating-point operations in products of matrices.
        core: all other floating-point operations, mostly decompositions of R × R matrices.
        read: bytes of factors, in float32.
        written: bytes of merged factors, in float32.
        held: bytes in memory for each module of a batch.
        work: bytes in memory beside them while a batch is merged.
    """

    modules: int
    products: float
    core: float
    read: int
    written: int
    held: int
    work: int

    def memory(self, workers: int, length: int, rows: int = 1) -> int:
        """Returns the bytes of so many batches at once, and of one that is given out.

        Args:
            workers: how many batches are merged at once.
            length: how many modules a batch has.
            rows: how many of them are worked on side by side.
        """
        return (workers + 1) * length * self.held + workers * rows * self.work

    def twice(self) -> "Cost":
        """Returns the cost of a merge that is made for its norms first, and then again."""
        return dataclasses.replace(
            self, products=2 * self.products, core=2 * self.core, read=2 * self.read
        )


def cost(group: Group, rule: Chain, space: Space) -> Cost:
    """Returns the cost of the modules of a group, from leading terms.

    Eigenvectors are counted as 9 d³ operations, a Cholesky factor and its inverse as 2 d³ / 3, a
    singular value decomposition as 20 m² n (Golub and Van Loan, Matrix Computations, 4th ed.,
    sections 4.2, 8.3 and 8.6), and factors as well-conditioned. What is held in memory was
    counted in compiled programs, and rounded up.
    """
    (m, n), total, number = group.shape, sum(group.ranks), len(group.paths)
    grams = len(group.ranks) * (group.inputs.size if group.inputs else 0) ** 2
    if rule.equivariance == Equivariance.LINEAR and space.lossless:
        merged, parts = min(total, m, n), Operations(0, 0)
    else:
        # A user's space that is no subclass may have `project` alone, which can be counted.
        count = space.operations if isinstance(space, Space) else partial(Space.operations, space)
        elementwise = rule.equivariance == Equivariance.ELEMENTWISE
        cores, projecting = count(group.shape, group.ranks, elementwise=elementwise)
        merged, parts = cores.side, projecting + rule.operations(cores)
    return Cost(
        modules=number,
        products=number * parts.products,
        core=number * parts.core,
        read=4 * number * (total * (m + n) + grams),
        written=4 * number * merged * (m + n),
        held=4 * ((2 * total + merged) * (m + n) + 2 * grams),
        work=8 * (4 * total * (m + n) + parts.kept + parts.passing),
    )


def fitting_workers(
    groups: Sequence[Group],
    rule: Chain,
    space: Space,
    workers: int,
    max_memory: int,
    rows: int = 1,
) -> int:
    """Returns how many of the smallest batches fit in memory at once, up to ``workers``.

    ``rows`` is how many modules devices work on side by side.

    Raises:
        MemoryError: none.
    """
    costs = [cost(group, rule, space) for group in groups]

    def needed(number: int) -> list[int]:
        return [one.memory(number, rows, rows) for one in costs]

    fitting = next((n for n in range(workers, 0, -1) if max(needed(n)) <= max_memory), 0)
    if fitting < 1:
        most, largest = max(zip(needed(1), groups, strict=True), key=lambda pair: pair[0])
        raise MemoryError(
            f"module {largest.paths[0]!r} ({largest.shape[0]} x {largest.shape[1]}, ranks adding "
            f"up to {sum(largest.ranks)}) needs {most / 2**20:.0f} MiB while it is "
            f"merged and another is written; {max_memory / 2**20:.0f} MiB are allowed"
        )
    return fitting


def batch_size(
    group: Group,
    rule: Chain,
    space: Space,
    workers: int,
    max_memory: int | None,
    rows: int = 1,
) -> int:
    """Returns how many modules of a group to merge at once, a multiple of ``rows``."""
    one = cost(group, rule, space)
    size = min(_BATCH_BYTES // one.held, -(-len(group.paths) // (2 * workers * rows)))
    if max_memory is not None:
        room = max_memory // rows - workers * one.work
        size = min(size, room // ((workers + 1) * one.held))
    return max(1, size) * rows


@dataclasses.dataclass(frozen=True)
class Machine:
    """Speed of a machine, in operations and bytes per second of one worker.

    Attributes:
        products: in products like those with the factors.
        core: in decompositions.
        copies: bytes copied in memory.
        compilation: seconds to compile one program of one rule, a guess from those of two small
            programs.
    """

    products: float
    core: float
    copies: float
    compilation: float

    @classmethod
    def measure(cls, workers: int) -> "Machine":
        """Tries it out, in about a second, on the device that JAX uses."""
        rng = np.random.default_rng(0)
        double = jax.default_backend() != "tpu"
        with jax.enable_x64(double):
            dtype = jnp.float64 if double else jnp.float32
            rows = jnp.asarray(rng.standard_normal((4, 96, 4096)), dtype)
            square = jnp.asarray(rng.standard_normal((8, 96, 96)), dtype)
            square = square + jnp.swapaxes(square, 1, 2)
            gram = jax.jit(lambda x: matmul(x, jnp.swapaxes(x, 1, 2)))
            eigh = jax.jit(lambda x: jax.vmap(lapack.eigh)(x))
            start = time.perf_counter()
            jax.block_until_ready((gram(rows), eigh(square)))
            compilation = time.perf_counter() - start
            products = 2 * 4 * 96**2 * 4096 / _seconds(lambda: gram(rows)) / workers
            core = 9 * 8 * 96**3 / _seconds(lambda: eigh(square))
        block = np.ones(2**24, np.float32)
        copies = block.nbytes / _seconds(block.copy) / workers
        return cls(products, core, copies, 6 * compilation)


def _seconds(fn: Callable) -> float:
    """Returns the shortest of a few runs."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(fn())
        times.append(time.perf_counter() - start)
    return min(times)


def expected_seconds(
    costs: Sequence[Cost], rule: Chain, machine: Machine, workers: int, programs: int
) -> dict[str, float]:
    """Seconds of each stage, if it were alone; reading, merging and writing overlap."""
    memory = machine.copies * workers
    return {
        "compile": programs * len(rule.rules) * machine.compilation,
        # Opened again for each batch, read, converted, scaled, checked: about as many copies.
        "read": sum(16 * x.read for x in costs) / memory,
        "products": sum(x.products for x in costs) / machine.products / workers,
        "core": sum(x.core for x in costs) / machine.core / workers,
        "copies": sum(2 * x.read + 2 * x.written for x in costs) / memory,
        "write": sum(3 * x.written for x in costs) / memory,
    }
