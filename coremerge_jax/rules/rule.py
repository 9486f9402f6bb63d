"""Interface of merge rules."""

import dataclasses
import enum
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from coremerge_jax.errors import RecipeError, UnsupportedError
from coremerge_jax.linalg import Factored, matmul, pytree
from coremerge_jax.lora import LoRA
from coremerge_jax.rules.operations import Operations, Sizes, counted
from coremerge_jax.text import short


class Equivariance(enum.IntEnum):
    """Changes of basis of the cores with which a rule commutes; the larger, the fewer.

    `LINEAR` rules are weighted sums, the same in every basis. `ORTHOGONAL` rules use only singular
    values and relative angles: any orthonormal basis gives the same update. `ELEMENTWISE` rules
    use single entries: they commute with permutations and sign flips of the basis alone.
    """

    LINEAR = 0
    ORTHOGONAL = 1
    ELEMENTWISE = 2


# The cores of all adapters: an array, or LoRA factors with a leading axis T.
Cores = Float[Array, "T p q"] | LoRA

# One core: an array, that of one adapter, and the merged one.
Dense = Float[Array, "p q"]
Core = Dense | LoRA
Merged = Dense | Factored


AUTO = "auto"


def _norm(tasks: int, flat: bool) -> float:
    """Returns the norm that merges should have, measured on `benchmarks/text8` for T = 2, 4, 8.

    Flat merges may be larger, as none of their singular values is.
    """
    return min(1.5, 1.9 * tasks**-0.25) if flat else min(1.0, 1.4 * tasks**-0.5)


@pytree
@dataclasses.dataclass(frozen=True)
class Context:
    """Information about the cores that a rule is given.

    Attributes:
        shape: int32 ``(2,)``, the numerical shape of the cores: rows and columns beyond it are
            zero and stand for nothing.
        tasks: int32 ``(T,)``, the adapters to which the cores belong.
        cores: for steps behind the merge, the adapters' cores before any step, in the coordinates
            of the merged core.
        inputs: ``(T, q, q)``, the Gram matrix of each task's inputs in the coordinates of the
            cores' columns; None if the merge has no statistics.
    """

    shape: Int[Array, "2"]
    tasks: Int[Array, " T"]
    cores: Cores | None = None
    inputs: Float[Array, "T q q"] | None = None

    @classmethod
    def of(cls, cores: Cores) -> "Context":
        """Returns the context of cores that all count, from the first to the last entry."""
        tasks, *shape = jax.eval_shape(dense, cores).shape
        return cls(
            shape=jnp.asarray(shape, jnp.int32),
            tasks=jnp.arange(tasks, dtype=jnp.int32),
            cores=cores,
        )


def dense(matrix: Float[Array, "*T p q"] | LoRA | Factored) -> Float[Array, "*T p q"]:
    """Returns a matrix, or several, as an array."""
    return jnp.asarray(matrix.dense() if isinstance(matrix, LoRA | Factored) else matrix)


def thin(cores: Cores) -> tuple[Float[Array, "T p r"], Float[Array, "T r q"]]:
    """Returns factors ``(T, p, r)`` and ``(T, r, q)`` of cores; dense cores are left factors."""
    if isinstance(cores, LoRA):
        return jnp.asarray(cores.b), jnp.asarray(cores.a)
    tasks, p, q = cores.shape
    eye = jnp.broadcast_to(jnp.eye(min(p, q), dtype=cores.dtype), (tasks, min(p, q), min(p, q)))
    return (eye, cores) if p <= q else (cores, eye)


def squared_norms(cores: Cores) -> Float[Array, " T"]:
    """Returns the squared Frobenius norms of cores; of factors, from their Gram matrices."""
    if not isinstance(cores, LoRA):
        return jnp.sum(cores**2, axis=(1, 2))
    b, a = jnp.asarray(cores.b), jnp.asarray(cores.a)
    left, right = matmul(jnp.swapaxes(b, 1, 2), b), matmul(a, jnp.swapaxes(a, 1, 2))
    return jnp.sum(left * right, axis=(1, 2))


def squared_outputs(
    b: Float[Array, "T p r"], a: Float[Array, "T r q"], grams: Float[Array, "T q q"]
) -> Float[Array, " T"]:
    """Returns the squared norms of the outputs of each adapter on its own inputs."""
    seen = matmul(matmul(a, grams), jnp.swapaxes(a, 1, 2))
    return jnp.sum(matmul(jnp.swapaxes(b, 1, 2), b) * seen, axis=(1, 2))


def tasks_in(cores: Cores) -> int:
    """Returns the number T of cores."""
    return len(jax.tree.leaves(cores)[0])


def dtype_of(cores: Cores) -> np.dtype:
    """Returns the dtype of cores."""
    return jax.tree.leaves(cores)[0].dtype


def side_by_side(x: Float[Array, "T p r"]) -> Float[Array, "p k"]:
    """Joins ``(T, p, r)`` to ``(p, T r)``."""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)


class Rule:
    """A merge rule: a pure function from cores ``(T, p, q)`` to one merged core ``(p, q)``.

    Rules are frozen dataclasses and pytrees whose numeric parameters are leaves: they may be
    traced, so that a sweep over them is one compiled program. Their classes have the names that
    users write, in Python and in recipes.

    Attributes:
        equivariance: the changes of basis with which the rule commutes.
        needs_key: True if the rule draws random numbers.
        flat: True if all singular values of the result are equal, or nearly.
        needs_inputs: True if the rule uses Gram matrices of the modules' inputs.
        factored: True if cores stay in factors: a rule that merges returns a `Factored`; a step
            takes one where it follows the merge, and before it maps `LoRA` factors to `LoRA`.
    """

    equivariance: ClassVar[Equivariance]
    needs_key: ClassVar[bool] = False
    needs_inputs: ClassVar[bool] = False
    flat: ClassVar[bool] = False
    factored: ClassVar[bool] = False

    def __call__(
        self,
        cores: Cores | Float[np.ndarray, "T p q"],
        *,
        key: PRNGKeyArray | None = None,
        context: Context | None = None,
    ) -> Dense:
        """Merges cores.

        Args:
            cores: ``(T, p, q)``, one matrix per adapter, or their low-rank factors.
            key: PRNG key, for rules that draw random numbers.
            context: facts about the cores; by default, all their rows and columns count.

        Returns:
            ``(p, q)``.
        """
        if not isinstance(cores, LoRA):
            cores = jnp.asarray(cores)
        return dense(self.merge(cores, key=key, context=context or Context.of(cores)))

    def merge(self, cores: Cores, *, key: PRNGKeyArray | None, context: Context) -> Merged:
        """Merges all cores to one. Every rule implements this; the result may be `Factored`."""
        raise NotImplementedError

    def pieces(self, cores: Cores, *, key: PRNGKeyArray | None, context: Context) -> Cores:
        """Splits the merge into the adapters' shares, ``(T, p, q)``, whose sum it is.

        Raises:
            UnsupportedError: the rule is no sum of such shares.
        """
        raise UnsupportedError(
            f"{self!r} is no sum of the adapters' shares, so coefficients cannot multiply these; "
            "such rules are mean, task_arithmetic, tsv and regmean"
        )

    def auto_scale(self, tasks: int) -> float | None:
        """Returns the automatic scale of a merge of so many adapters; None if its norm decides."""
        return None

    def auto_norm(self, tasks: int) -> float | jax.Array:
        """Returns the norm that a merge of so many adapters should have.

        As a multiple of √(Σ_t ‖ΔW_t‖²). With these, merges of two, four and eight adapters are near
        their best (docs/rules.md, "The automatic scale").
        """
        return _norm(tasks, self.flat)

    def auto_square(self, merged: Dense, *, cores: Cores, context: Context) -> Float[Array, ""]:
        """Returns the squared size of a merge, which the automatic scale brings to `auto_norm`.

        Here it is the squared Frobenius norm.

        Args:
            merged: ``(p, q)``, the result.
            cores: ``(T, p, q)``, of the adapters.
            context: facts about the cores.
        """
        return jnp.sum(merged**2)

    def operations(self, cores: Sizes) -> Operations:
        """Counts operations and memory, from leading terms; here, in the jaxpr of `merge`."""
        return counted(_merge, self, *abstract(cores))

    def sizes_after(self, cores: Sizes) -> Sizes:
        """Returns the sizes of the cores that this rule hands on."""
        if self.factored:
            return dataclasses.replace(cores, dense=False, merged=True)
        return dataclasses.replace(cores, width=cores.side, dense=True, merged=True)

    def __repr__(self) -> str:
        fields = dataclasses.fields(self)  # type: ignore[arg-type]  # all subclasses are dataclasses
        parameters = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields)
        return f"{type(self).__name__}({parameters})"

    @classmethod
    def name(cls) -> str:
        """Returns the rule's name in recipes and tables."""
        return cls.__name__


def _merge(rule: Rule, cores: Cores, key: PRNGKeyArray, context: Context) -> Merged:
    return rule.merge(cores, key=key, context=context)


def abstract(cores: Sizes) -> tuple[jax.ShapeDtypeStruct | LoRA, jax.ShapeDtypeStruct, Context]:
    """Returns shapes of cores, of a key and of a context, to trace a rule with."""
    given = cores.cores()
    context: Any = Context(
        shape=jax.ShapeDtypeStruct((2,), jnp.int32),  # type: ignore[arg-type]  # shapes stand for arrays
        tasks=jax.ShapeDtypeStruct((cores.tasks,), jnp.int32),  # type: ignore[arg-type]  # the same
        cores=given,  # type: ignore[arg-type]  # the same
    )
    return given, jax.eval_shape(jax.random.key, 0), context


def check(name: str, value: Any, ok: Callable[[Any], bool], expected: str) -> None:
    """Validates a parameter if it is a plain number.

    Arrays may be traced, and pytree transformations put other things in the place of parameters.
    `validated` checks the arrays that a merge uses.

    Raises:
        RecipeError: naming the parameter, its value and what is expected.
    """
    number = isinstance(value, int | float | np.integer | np.floating)
    wrong = isinstance(value, tuple | list | str | complex | dict)
    if wrong or (number and not (_is_finite(value) and ok(value))):
        raise RecipeError(f"{name}={short(value)}: expected {expected}")
    if isinstance(value, int | np.integer) and abs(int(value)) >= 2**31:
        # JAX's int32
        raise RecipeError(f"{name}={short(value)}: expected {expected}, below 2^31")


def check_share(name: str, value: Any) -> None:
    """Validates a share of entries, above 0 and at most 1, if it is a plain number."""
    check(name, value, lambda x: 0 < x <= 1, "a share in (0, 1]")


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Validates a parameter that is one of a few words.

    Raises:
        RecipeError: it is another.
    """
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise RecipeError(f"{name}={short(value)}: expected {' or '.join(map(repr, choices))}")


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
