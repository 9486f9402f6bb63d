"""Operations and memory of a merge, from the shapes of its matrices."""

import dataclasses
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from coremerge_jax.lora import LoRA

# Operations of LAPACK's routines on one p x q matrix, p <= q, as multiples of p² q (Golub and Van
# Loan, Matrix Computations, 4th ed., sections 3.2, 4.2, 5.2, 8.3 and 8.6).
_DECOMPOSITIONS = {
    "cholesky": 1 / 3,
    "eig": 25,
    "eigh": 9,
    "geqrf": 2,
    "householder_product": 2,
    "lu": 2 / 3,
    "qr": 4,
    "svd": 20,
    "triangular_solve": 1,
}

# Rounds that a `while` loop is taken to make: their number is not part of a program.
_ROUNDS = 10


@dataclasses.dataclass(frozen=True)
class Operations:
    """Operations and memory of one part of the merge of one module.

    A sum is that of parts which run one after the other; a multiple, of one part that is repeated.

    Attributes:
        products: floating-point operations in products of matrices.
        core: all other floating-point operations.
        kept: how many numbers stay in memory until the module is merged.
        passing: how many are in memory only while the part runs.
    """

    products: float | int = 0.0
    core: float | int = 0.0
    kept: int = 0
    passing: int = 0

    def __add__(self, other: "Operations") -> "Operations":
        return Operations(
            products=self.products + other.products,
            core=self.core + other.core,
            kept=self.kept + other.kept,
            passing=max(self.passing, other.passing),
        )

    def __rmul__(self, times: int) -> "Operations":
        return dataclasses.replace(self, products=times * self.products, core=times * self.core)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the cores that a rule is given.

    Attributes:
        tasks: the number of adapters.
        p: rows of each core.
        q: columns of each core.
        width: the inner dimension of their factors.
        dense: True if they are arrays. False for LoRA factors; of the merged core, for blocks
            between bases.
        merged: True behind the merge, where there is one core.
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
        """The smaller of p and q."""
        return min(self.p, self.q)

    @property
    def abreast(self) -> int:
        """The number of columns of all adapters' factors side by side."""
        return self.tasks * self.width

    @property
    def number(self) -> int:
        """The number of cores."""
        return 1 if self.merged else self.tasks

    @property
    def forming(self) -> float:
        """Operations that make dense cores of factors, or of blocks."""
        return 0.0 if self.dense else 2.0 * self.abreast * self.entries

    def cores(self) -> jax.ShapeDtypeStruct | LoRA:
        """Returns the shapes of all adapters' cores, to trace a rule with."""

        def shape(*sizes: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((self.tasks, *sizes), jnp.float64)

        if self.dense:
            return shape(self.p, self.q)
        return LoRA(a=shape(self.width, self.q), b=shape(self.p, self.width))  # type: ignore[arg-type]  # shapes stand for arrays


# --- Parts that several rules have in common ------------------------------------------------------
def entrywise(cores: Sizes, operations: int) -> Operations:
    """Counts some operations on each entry of each dense core."""
    every = cores.number * cores.entries
    kept = 0 if cores.merged else 3 * every
    return Operations(cores.forming, operations * every, kept, passing=12 * cores.entries)


def decomposition(cores: Sizes) -> Operations:
    """Counts one dense core taken apart, by its Gram matrix, and put together again."""
    entries, side = cores.entries, cores.side
    return Operations(6.0 * entries * side, 9 * side**3, passing=12 * entries)


def thin_bases(cores: Sizes) -> Operations:
    """Counts orthonormal bases of all factors, and decompositions of what is between them.

    Dense cores are decomposed for their factors, all at once.
    """
    core = cores.tasks * (4.0 * cores.side * cores.width**2 + 60 * cores.width**3)
    return Operations(core=core, passing=18 * cores.tasks * cores.entries if cores.dense else 0)


def polar_factors(cores: Sizes, columns: int, deficient: bool = False) -> Operations:
    """Counts the polar factors of two matrices, with so many columns.

    Of square matrices, the iteration takes about six steps of two products, and two products more.
    It does not converge without full rank: then they are decomposed. Of other matrices, it takes
    three products and the decomposition of a Gram matrix.
    """
    long = max(cores.p, cores.q)
    small, large = sorted((long, columns))
    work, entries = small**2 * large, long * columns
    if small < large:
        return Operations(2 * 6 * work, core=2 * 9 * small**3, passing=6 * (entries + small**2))
    if deficient:
        return Operations(core=2 * 20 * work, passing=18 * entries)
    return Operations(products=2 * 14 * 2 * work, passing=18 * entries)


# --- Functions without a formula ------------------------------------------------------------------
def counted(fn: Callable, *shapes: object, **static: object) -> Operations:
    """Counts the operations of a function in its jaxpr, without compiling or running it.

    JAX keeps the jaxpr of each function, so a function that stays the same object is traced once.

    Products and decompositions are counted by their shapes; every other primitive as one
    operation for each number that it takes or gives, whichever are more. Memory is the most that
    is live at once, without what XLA saves by fusion.

    Args:
        fn: a pure function of arrays.
        *shapes: its arguments, or `jax.ShapeDtypeStruct` in place of arrays.
        **static: hashable arguments that are not traced.
    """
    with jax.enable_x64(True):  # merges compute in float64 where they can
        traced = jax.jit(fn, static_argnames=tuple(static)).trace(*shapes, **static)
        return _of_jaxpr(traced.jaxpr.jaxpr)


def _of_jaxpr(jaxpr: Jaxpr) -> Operations:
    """Adds up equations. Arrays are live from the equation that makes them to their last use."""
    last = {x: i for i, eqn in enumerate(jaxpr.eqns) for x in eqn.invars if isinstance(x, Var)}
    last |= {x: len(jaxpr.eqns) for x in jaxpr.outvars if isinstance(x, Var)}
    live = {x for x in jaxpr.invars if x in last}
    total = Operations()
    for i, eqn in enumerate(jaxpr.eqns):
        one = _of_equation(eqn)
        live |= set(eqn.outvars)
        total += dataclasses.replace(one, passing=one.passing + sum(map(_size, live)))
        live = {x for x in live if last.get(x, -1) > i}
    return total


def _of_equation(eqn: JaxprEqn) -> Operations:
    inner = [_of_jaxpr(jaxpr) for jaxpr in _jaxprs(eqn)]
    name = eqn.primitive.name
    if name == "cond":
        return max(inner, key=lambda branch: branch.products + branch.core)
    if inner:
        rounds = {"scan": eqn.params.get("length", 1), "while": _ROUNDS}
        return rounds.get(name, 1) * sum(inner, start=Operations())
    entries = max(map(_size, [*eqn.invars, *eqn.outvars]), default=0)
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        each = 2.0 * math.prod(_shape(eqn.invars[0])[axis] for axis in contracted)
        return Operations(products=each * _size(eqn.outvars[0]))
    if name in _DECOMPOSITIONS:
        *batch, rows, columns = _shape(eqn.invars[0])
        small, large = sorted((rows, columns))
        return Operations(core=_DECOMPOSITIONS[name] * math.prod(batch) * small**2 * large)
    return Operations(core=entries)


def _jaxprs(eqn: JaxprEqn) -> Iterator[Jaxpr]:
    """Yields the programs within an equation: bodies of loops, branches, functions it calls."""
    for part in jax.tree.leaves(list(eqn.params.values())):
        if isinstance(part, ClosedJaxpr):
            yield part.jaxpr
        elif isinstance(part, Jaxpr):
            yield part


def _shape(x: Var | Literal) -> tuple[int, ...]:
    return getattr(x.aval, "shape", ())  # tokens, which order effects, have none


def _size(x: Var | Literal) -> int:
    return math.prod(_shape(x))
