"""Cost of a merge, in operations, memory and time, from shapes alone."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from coremerge_jax.linalg import lapack, matmul
from coremerge_jax.merging.groups import Group
from coremerge_jax.rules import Chain, Equivariance, Rule, Step, Ties, TiesAbove
from coremerge_jax.rules.calibration import Pico, Svc
from coremerge_jax.rules.linear import Mean, TaskArithmetic
from coremerge_jax.rules.sparse import Dare, Prune, Sce
from coremerge_jax.rules.spectral import Cart, Flatten, Isotropize, Tsv
from coremerge_jax.rules.subspace import DcMerge, IsoCts
from coremerge_jax.spaces import Space
from coremerge_jax.spaces.core import Core
from coremerge_jax.spaces.full import Full
from coremerge_jax.spaces.knots import Knots
from coremerge_jax.spaces.tucker import Tucker

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


def cost(group: Group, rule: Chain, space: Space) -> Cost:
    """Returns the cost of the modules of a group, from leading terms.

    Eigenvectors are counted as 9 d³ operations, a Cholesky factor and its inverse as 2 d³ / 3, a
    singular value decomposition as 20 m² n (Golub and Van Loan, Matrix Computations, 4th ed.,
    sections 4.2, 8.3 and 8.6), and factors as well-conditioned. What is held in memory was
    counted in compiled programs, and rounded up.
    """
    (m, n), total, number = group.shape, sum(group.ranks), len(group.paths)
    if rule.equivariance == Equivariance.LINEAR and space.lossless:
        merged, parts = min(total, m, n), []
    else:
        cores, merged, projecting = _projection(group, space, rule.equivariance)
        parts = [projecting, *_parts(rule, cores)]
    return Cost(
        modules=number,
        products=number * sum(part.products for part in parts),
        core=number * sum(part.core for part in parts),
        read=4 * number * total * (m + n),
        written=4 * number * merged * (m + n),
        held=4 * (2 * total + merged) * (m + n),
        work=8 * (4 * total * (m + n) + sum(part.kept for part in parts))
        + 8 * max((part.passing for part in parts), default=0),
    )


@dataclasses.dataclass(frozen=True)
class _Part:
    """Cost of one part of the merge of one module.

    Attributes:
        products: floating-point operations in products of matrices.
        core: all others.
        kept: numbers in memory until the end,
        passing: and those only while it runs.
    """

    products: float = 0.0
    core: float = 0.0
    kept: int = 0
    passing: int = 0


@dataclasses.dataclass(frozen=True)
class _Cores:
    """Description of the cores that a rule is given.

    Attributes:
        tasks: how many adapters.
        p: rows of their cores.
        q: columns.
        width: that of factors.
        dense: whether they are no factors. Of the merged core: no blocks between bases.
        merged: whether it is one core by now.
    """

    tasks: int
    p: int
    q: int
    width: int
    dense: bool = False
    merged: bool = False

    @property
    def entries(self) -> int:
        """The number of entries of one core."""
        return self.p * self.q

    @property
    def side(self) -> int:
        """The smaller one."""
        return min(self.p, self.q)

    @property
    def abreast(self) -> int:
        """Columns of all adapters' factors side by side."""
        return self.tasks * self.width

    @property
    def number(self) -> int:
        """The number of cores."""
        return 1 if self.merged else self.tasks

    @property
    def forming(self) -> float:
        """Operations to make dense cores of factors, or of blocks."""
        return 0.0 if self.dense else 2.0 * self.abreast * self.entries

    def after(self, part: Rule) -> "_Cores":
        """Returns the cores that the next part of a chain is given."""
        if isinstance(part, Pico | Isotropize | Flatten) and not self.merged:
            return self
        merged = self.merged or not isinstance(part, Step)
        if isinstance(part, Tsv | DcMerge):
            return dataclasses.replace(self, dense=False, merged=True)
        return dataclasses.replace(self, width=self.side, dense=True, merged=merged)


def _projection(
    group: Group, space: Space, equivariance: Equivariance
) -> tuple[_Cores, int, _Part]:
    """Returns the cores in a merge space, the rank of what is lifted, and the cost of both ways."""
    (m, n), total, tasks, width = group.shape, sum(group.ranks), len(group.ranks), max(group.ranks)
    elementwise = equivariance == Equivariance.ELEMENTWISE
    if isinstance(space, Full):  # lifted by an identity matrix
        return _Cores(tasks, m, n, width), min(m, n), _Part(kept=min(m, n) ** 2)
    p, q = min(m, total), min(n, total)
    cores, rank, every, kept = _Cores(tasks, p, q, width), min(p, q), tasks * p * q, 0
    products, core = 2.0 * total**2 * (m + n), 2 / 3 * (p**3 + q**3)
    if isinstance(space, Tucker):
        rank = min(p, q, space.rank)
        cores = dataclasses.replace(cores, p=rank, q=rank)
        # About ten iterations, each with products and eigenvectors on both sides.
        products += 2.0 * (width + p + q + 10 * 2 * rank) * every
        core += 11 * 9 * (p**3 + q**3)
        kept = 8 * every
    elif isinstance(space, Knots):
        if elementwise:  # sees all columns
            products += 2.0 * every * n
            kept = tasks * p * n
            q, rank = n, min(p, n)
        products += 2.0 * (width + 2 * p) * every
        core += 9 * p**3
        kept += 4 * every
        cores = _Cores(tasks, p, q, min(p, q), dense=True)
    elif elementwise:
        core = 9.0 * (p**3 + q**3)
        if isinstance(space, Core) and space.gauge == "balanced":
            products += 6 * width * total * (p + q) + 2 * total * (p**2 + q**2)
            core += 2 / 3 * (p**3 + q**3) + tasks * 20 * width**3
            kept = 6 * total * max(p, q)
    return cores, rank, _Part(products + 2 * m * total * rank, core, kept)


def _parts(rule: Chain, cores: _Cores) -> Iterator[_Part]:
    """Yields the cost of each part of a chain."""
    for part in rule.rules:
        cut = isinstance(part, Tsv) and part.rank is not None
        yield _tsv(cores, cut=True) if cut else _PARTS.get(type(part), _entries)(cores)
        cores = cores.after(part)


def _entries(cores: _Cores, operations: int = 10) -> _Part:
    """Returns a few operations on each entry of each dense core."""
    every = cores.number * cores.entries
    kept = 0 if cores.merged else 3 * every
    return _Part(cores.forming, operations * every, kept, passing=12 * cores.entries)


def _ties(cores: _Cores) -> _Part:
    every = cores.tasks * cores.entries
    return _Part(3 * cores.forming, 80 * every, passing=12 * cores.entries)


def _sce(cores: _Cores) -> _Part:
    every = cores.tasks * cores.entries
    return _Part(cores.forming, 60 * every, passing=3 * every + 12 * cores.entries)


def _sum(cores: _Cores) -> _Part:
    return _Part(cores.forming, cores.tasks * cores.entries, passing=12 * cores.entries)


def _tsv(cores: _Cores, cut: bool = False) -> _Part:
    deficient = cut or cores.abreast > cores.side
    thin, polars = _thin(cores), _polars(cores, cores.abreast, deficient)
    return dataclasses.replace(polars, core=thin + polars.core)


def _thin(cores: _Cores) -> float:
    """Operations for orthonormal bases of all factors, and what is between them decomposed."""
    return cores.tasks * (4.0 * cores.side * cores.width**2 + 60 * cores.width**3)


def _polars(cores: _Cores, columns: int, deficient: bool = False) -> _Part:
    """Returns two polar factors: in about ten steps of two products, or by decompositions."""
    work = cores.side**2 * max(columns, cores.side)
    passing = 18 * max(cores.entries, max(cores.p, cores.q) * columns)
    if deficient:
        return _Part(core=2 * 20 * work, passing=passing)
    return _Part(products=2 * 10 * 4 * work, passing=passing)


def _cart(cores: _Cores) -> _Part:
    one = _decomposed(cores)
    products = cores.forming + cores.tasks * one.products
    return _Part(products, cores.tasks * one.core, passing=one.passing)


def _decomposed(cores: _Cores) -> _Part:
    """Counts taking one dense core apart, by its Gram matrix, and putting it together."""
    entries, side = cores.entries, cores.side
    return _Part(6.0 * entries * side, 9 * side**3, passing=12 * entries)


def _iso_cts(cores: _Cores) -> _Part:
    one, count = _decomposed(cores), cores.tasks + 1
    polars = _polars(cores, count * cores.side)
    products = cores.forming + count * one.products + polars.products
    return _Part(products, count * one.core, count * cores.entries, polars.passing)


def _dc_merge(cores: _Cores) -> _Part:
    abreast, polars = cores.abreast, _polars(cores, cores.abreast)
    products = 2.0 * abreast**2 * (2 * cores.side + abreast)
    selection = 60 * cores.tasks * abreast**2
    return _Part(
        products + polars.products,
        _thin(cores) + selection,
        passing=polars.passing + 4 * abreast**2,
    )


def _spectrum(cores: _Cores) -> _Part:
    """Counts `isotropize` and `flatten`."""
    one, width = _decomposed(cores), cores.width
    if cores.dense:
        return _Part(cores.number * one.products, cores.number * one.core, passing=one.passing)
    if cores.merged:
        return _Part(cores.forming, cores.tasks * 20.0 * width**3, passing=one.passing)
    products = 10.0 * cores.side * width * cores.abreast
    return _Part(products, cores.tasks * 10 * width**3, passing=one.passing)


def _svc(cores: _Cores) -> _Part:
    products = cores.forming + 2.0 * cores.tasks * cores.entries * (cores.side + cores.width)
    return _Part(products, 20 * cores.entries * cores.side, passing=12 * cores.entries)


def _pico(cores: _Cores) -> _Part:
    gram = _decomposed(dataclasses.replace(cores, q=cores.p))
    products = 4.0 * cores.p**2 * cores.abreast + 2 * cores.forming
    return dataclasses.replace(gram, products=gram.products + products)


_PARTS: dict[type, Callable[[_Cores], _Part]] = {
    Mean: _sum,
    TaskArithmetic: _sum,
    Ties: _ties,
    TiesAbove: _ties,
    Sce: _sce,
    Dare: partial(_entries, operations=60),
    Prune: partial(_entries, operations=80),
    Tsv: _tsv,
    Cart: _cart,
    IsoCts: _iso_cts,
    DcMerge: _dc_merge,
    Isotropize: _spectrum,
    Flatten: _spectrum,
    Svc: _svc,
    Pico: _pico,
}


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

    def needed(group: Group) -> int:
        one = cost(group, rule, space)
        return rows * (one.held + one.work)

    largest = max(groups, key=needed)
    fitting = max_memory // needed(largest) - 1
    if fitting < 1:
        raise MemoryError(
            f"module {largest.paths[0]!r} ({largest.shape[0]} x {largest.shape[1]}, ranks adding "
            f"up to {sum(largest.ranks)}) needs {2 * needed(largest) / 2**20:.0f} MiB while it is "
            f"merged and another is written; {max_memory / 2**20:.0f} MiB are allowed"
        )
    return min(workers, fitting)


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
        size = min(size, (max_memory // (workers + 1) // rows - one.work) // one.held)
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
