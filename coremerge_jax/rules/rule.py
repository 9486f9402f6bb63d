"""Interface of merge rules, and chains of them."""

import dataclasses
import enum
import math
import re
from collections.abc import Callable
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from coremerge_jax.errors import RecipeError
from coremerge_jax.linalg import Factored, in_loop
from coremerge_jax.lora import LoRA


class Equivariance(enum.IntEnum):
    """Changes of basis of the cores with which a rule commutes; the larger, the fewer.

    `LINEAR` rules are weighted sums, the same in every basis. `ORTHOGONAL` rules see only singular
    values and relative angles: any orthonormal basis gives the same update. `ELEMENTWISE` rules
    look at single entries: they commute with permutations and sign flips of the basis alone.
    """

    LINEAR = 0
    ORTHOGONAL = 1
    ELEMENTWISE = 2


@flax.struct.dataclass
class Context:
    """Information about the cores that a rule is given.

    Attributes:
        shape: int32 ``(2,)``, the numerical shape of the cores: rows and columns beyond it are
            zero and stand for nothing.
        tasks: int32 ``(T,)``, which adapters the cores belong to.
        cores: for steps behind the merge, the adapters' cores as they were before any step, in
            the coordinates of the merged core.
    """

    shape: jax.Array
    tasks: jax.Array
    cores: "Cores | None" = None

    @classmethod
    def of(cls, cores: "Cores") -> "Context":
        """Returns the context of cores that are all there is."""
        tasks, *shape = jax.eval_shape(dense, cores).shape
        return cls(
            shape=jnp.asarray(shape, jnp.int32),
            tasks=jnp.arange(tasks, dtype=jnp.int32),
            cores=cores,
        )


# The cores of all adapters: (T, p, q), or LoRA factors with a leading axis T. One core: without it.
Cores = jax.Array | LoRA


def dense(matrix: jax.Array | LoRA | Factored) -> jax.Array:
    """Returns a matrix, or several, as an array."""
    return jnp.asarray(matrix.dense() if isinstance(matrix, LoRA | Factored) else matrix)


def thin(cores: Cores) -> tuple[jax.Array, jax.Array]:
    """Returns factors ``(T, p, r)`` and ``(T, r, q)`` of cores; dense cores are left factors."""
    if isinstance(cores, LoRA):
        return jnp.asarray(cores.b), jnp.asarray(cores.a)
    tasks, p, q = cores.shape
    eye = jnp.broadcast_to(jnp.eye(min(p, q), dtype=cores.dtype), (tasks, min(p, q), min(p, q)))
    return (eye, cores) if p <= q else (cores, eye)


def side_by_side(x: jax.Array) -> jax.Array:
    """Returns ``(T, p, r)`` to ``(p, T r)``."""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)


def fold(fn: Callable, cores: Cores, *per_task: Any, combine: Callable = jnp.add) -> Any:
    """Sums ``fn(core, ...)`` over adapters, without the dense cores of all of them at once.

    Args:
        fn: from one dense core ``(p, q)``, and one row of each of ``per_task``, to arrays.
        cores: those of all adapters.
        *per_task: further arrays with a leading axis T.
        combine: adds what one adapter gives to the total, which starts from zeros.
    """
    return fold_rows(lambda row: fn(dense(row[0]), *row[1:]), (cores, *per_task), combine)


def fold_rows(fn: Callable, rows: Any, combine: Callable = jnp.add) -> Any:
    """Sums ``fn`` over the rows of arrays, one after the other."""

    def step(total: Any, row: Any) -> tuple[Any, None]:
        return jax.tree.map(combine, total, fn(row)), None

    shapes = jax.eval_shape(fn, jax.tree.map(lambda x: x[0], rows))
    return jax.lax.scan(in_loop(step), jax.tree.map(jnp.zeros_like, shapes), rows)[0]


class Rule:
    """A merge rule: a pure function from cores ``(T, p, q)`` to one merged core ``(p, q)``.

    Rules are frozen dataclasses and pytrees whose numeric parameters are leaves: they may be
    traced, so that a sweep over them is one compiled program.
    """

    equivariance: ClassVar[Equivariance]
    needs_key: ClassVar[bool] = False

    def __call__(
        self, cores: Cores, *, key: jax.Array | None = None, context: Context | None = None
    ) -> jax.Array:
        """Merges.

        Args:
            cores: ``(T, p, q)``, one matrix per adapter, or their low-rank factors.
            key: PRNG key, for rules that draw random numbers.
            context: what is known of the cores; by default, that all of them counts.

        Returns:
            ``(p, q)``.
        """
        return dense(self.merge(cores, key=key, context=context or Context.of(cores)))

    def merge(
        self, cores: Cores, *, key: jax.Array | None, context: Context
    ) -> jax.Array | Factored:
        """Merges: what a rule has to implement. The result may stay in factors."""
        raise NotImplementedError

    @classmethod
    def name(cls) -> str:
        """Returns the rule's name in text."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()

    def __repr__(self) -> str:
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        parameters = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields)
        return f"{self.name()}({parameters})"


def check(name: str, value: Any, ok: Callable[[Any], bool], expected: str) -> None:
    """Validates a parameter where it is a plain number.

    Arrays may be traced, or be derivatives by the parameter in its place: those that are used in
    a merge are checked there, see `validated`.

    Raises:
        RecipeError: naming the parameter, its value and what is expected.
    """
    number = isinstance(value, int | float | np.integer | np.floating)
    wrong = isinstance(value, tuple | list | str | complex | dict)
    if wrong or (number and not (_is_finite(value) and ok(value))):
        raise RecipeError(f"{name}={value!r}: expected {expected}")
    if isinstance(value, int | np.integer) and abs(int(value)) >= 2**31:
        raise RecipeError(f"{name}={value!r}: expected {expected}, below 2^31")  # as JAX's int32


def check_weights(weights: Any) -> None:
    """Validates one weight per adapter, as far as these are plain numbers.

    Raises:
        RecipeError: one is not a finite number.
    """
    if isinstance(weights, str | dict):
        raise RecipeError(f"weights={weights!r}: expected a list of numbers, one per adapter")
    for i, weight in enumerate(weights) if isinstance(weights, tuple | list) else ():
        check(f"weights[{i}]", weight, lambda _: True, "a finite number")


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False
