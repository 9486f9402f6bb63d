"""Interface of merge spaces: projecting the updates of one module, and lifting the result."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from coremerge_jax.errors import MismatchError, RecipeError, UnsupportedError
from coremerge_jax.linalg import Basis, matmul, pytree
from coremerge_jax.lora import LoRA, widest
from coremerge_jax.rules import Chain, Context, Rule, chain
from coremerge_jax.rules.linear import scale, total
from coremerge_jax.rules.operations import Operations, Sizes, counted
from coremerge_jax.rules.rule import (
    Cores,
    Merged,
    check,
    dense,
    squared_norms,
    squared_outputs,
    tasks_in,
    thin,
)
from coremerge_jax.text import short

# Merged factors keep the A factors of the adapters, exactly, up to this spread of their singular
# values; beyond it, rounding of the merged B would show, and A is made orthonormal.
_SPREAD = 4.0


@dataclasses.dataclass(frozen=True)
class Stacked:
    """The updates of one module as stacked factors, from which spaces make a `Projection`.

    Attributes:
        a: ``(R, n)``, the A factors of all adapters below each other; on a mesh, some columns.
        b: ``(m, R)``, the B factors side by side; on a mesh, some rows.
        ranks: the rank of each adapter, ``sum(ranks) == R``.
        shape: ``(m, n)`` of the module, without rows and columns that only fill up a mesh.
        dtype: to compute in.
        axis: the mapped axis (of `jax.shard_map`) over which the columns of A and the rows of B
            are spread, if they are.
        given: dtype to whose precision the factors are known.
    """

    a: Float[Array, "R n"]
    b: Float[Array, "m R"]
    ranks: tuple[int, ...]
    shape: tuple[int, int]
    dtype: np.dtype
    axis: str | None
    given: np.dtype

    def refuse_axis(self, space: "Space") -> None:
        """Refuses modules that are spread over devices.

        Raises:
            UnsupportedError: there is an axis.
        """
        if self.axis is not None:
            raise UnsupportedError(
                f"{space!r} merges matrices with the rows or columns of the module, which cannot "
                "be spread over devices; merge in core space, or spread modules alone"
            )

    def split(self, a: Float[Array, "R q"], b: Float[Array, "p R"]) -> LoRA:
        """Splits factors ``(R, q)`` and ``(p, R)``, stacked alike, by adapter.

        Returns:
            Factors ``(T, max(ranks), q)`` and ``(T, p, max(ranks))``, padded with zeros.

        Raises:
            MismatchError: the ranks are not those of the factors, or one is 0.
        """
        ranks, total = self.ranks, sum(self.ranks)
        if not ranks or min(ranks) < 1 or total != a.shape[0]:
            raise MismatchError(
                f"ranks {ranks} of stacked factors of rank {a.shape[0]}: expected ranks of at "
                "least 1 that add up to it"
            )
        width, starts = max(ranks), np.cumsum((0, *ranks))
        if len(set(ranks)) == 1:
            a_parts, b_parts = a.reshape(-1, width, a.shape[1]), b.reshape(len(b), -1, width)
        else:
            # Row `total` of A and column `total` of B are the zeros that fill up lower ranks.
            places = [
                [start + i if i < rank else total for i in range(width)]
                for start, rank in zip(starts[:-1], ranks, strict=True)
            ]
            index = np.asarray(places)
            a_parts = jnp.pad(a, ((0, 1), (0, 0)))[index]
            b_parts = jnp.pad(b, ((0, 0), (0, 1)))[:, index]
        return LoRA(a=a_parts, b=jnp.moveaxis(b_parts, 1, 0))


@pytree
@dataclasses.dataclass(frozen=True)
class Projection:
    """The adapters' updates of one module in a merge space: ``ΔW_t = u gain cores_t vᵀ``.

    ``u`` and ``v`` have orthonormal columns, up to columns of zeros behind the numerical shape.

    Attributes:
        factors: the cores, ``(T, p, q)`` or as low-rank factors.
        shape: int32 ``(2,)``, the numerical shape: rows and columns of the cores beyond it are
            zero.
        left: the basis of ``u: (m, p)``, or None for the identity.
        right: the basis of ``v: (n, q)``, or None for the identity.
        gain: ``(p,)``, the diagonal of a matrix; that matrix ``(p, p)``; or None for the identity.
        spread: that of the singular values of the stacked A factors, as `linalg.basis` returns it.
        inputs: ``(T, q, q)``, Gram matrices of each task's inputs in the coordinates of the cores'
            columns; see `with_inputs`.
    """

    factors: Cores
    shape: Int[Array, "2"]
    left: Basis | None = None
    right: Basis | None = None
    gain: Float[Array, " p"] | Float[Array, "p p"] | None = None
    spread: Float[Array, ""] | None = None
    inputs: Float[Array, "T q q"] | None = None

    def with_inputs(self, grams: Float[Array, "T k k"], *, whole: bool) -> "Projection":
        """Returns the projection with Gram matrices of the inputs of each task.

        Args:
            grams: ``(T, n, n)``, of the inputs x themselves; or ``(T, R, R)``, of the coordinates
                ``A x`` in the stacked A factors.
            whole: True if they are of the inputs themselves.

        Raises:
            MismatchError: they are not; or they are those of ``A x``, and the space has other rows
                than those of A, or A more rows than columns.
        """
        size, right = grams.shape[1], self.right
        grams = grams.astype(jax.tree.leaves(self.factors)[0].dtype)
        if right is None:
            columns = jax.eval_shape(dense, self.factors).shape[2]
            if not whole or size != columns:
                raise MismatchError(
                    f"Gram matrices {size} × {size} in a space of all {columns} columns: expected "
                    f"those of the inputs themselves, {columns} × {columns}"
                )
            return dataclasses.replace(self, inputs=grams)
        # V = Aᵀ frame, so that Vᵀ x = frameᵀ A x
        frame = right.columns() if whole else right.frame
        if size != len(frame) or (right.x is None and not whole):
            raise MismatchError(
                f"Gram matrices {size} × {size} do not fit: expected those of the coordinates in "
                "the adapters' A, or of the module's inputs"
            )
        inputs = matmul(matmul(frame.T[None], grams), frame[None])
        return dataclasses.replace(self, inputs=inputs)

    def weighted(self, weights: Float[Array, " T"]) -> "Projection":
        """Returns the projection with its updates multiplied by weights ``(T,)``."""
        factors = jax.vmap(scale)(self.factors, weights)
        inputs = None if self.inputs is None else of_present(self.inputs, weights)
        return dataclasses.replace(self, factors=factors, inputs=inputs)

    @property
    def cores(self) -> Float[Array, "T p q"]:
        """``(T, p, q)``, the updates in the merge space."""
        return dense(self.factors)

    @property
    def traits(self) -> Float[Array, "3 T"]:
        """``(3, T)``, numbers of each update that do not depend on the bases.

        They are its squared norm, its inner product with the sum of all updates, and the squared
        norm of its core's outputs on the task's inputs, or 0 without inputs.
        """
        cores = self._weighed_cores()
        b, a = thin(cores)
        seen = matmul(jnp.swapaxes(b, 1, 2), total(cores)[None])
        common = jnp.sum(seen * a, axis=(1, 2))
        outputs = jnp.zeros_like(common)
        if self.inputs is not None:
            outputs = squared_outputs(b, a, self.inputs)
        return jnp.stack([squared_norms(cores), common, outputs])

    @property
    def u(self) -> Float[Array, "m p"] | None:
        """``(m, p)``, or None for the identity."""
        return None if self.left is None else self.left.columns()

    @property
    def v(self) -> Float[Array, "n q"] | None:
        """``(n, q)``, or None for the identity."""
        return None if self.right is None else self.right.columns()

    @property
    def keeps_a(self) -> bool | Bool[Array, ""]:
        """True if merged factors can have the A factors of the adapters as their A.

        That is exact, and cheaper than any other, unless rounding errors of the merged B would
        grow too much with it.
        """
        rows, columns = jax.eval_shape(dense, self.factors).shape[1:]
        if self.spread is None or self.right is None or self.right.x is None or columns > rows:
            return False
        if columns < len(self.right.frame):  # the factors' rank, which is more than n
            return False
        return well_conditioned(self.spread)

    def merge(
        self,
        rule: Rule,
        *,
        key: PRNGKeyArray | None = None,
        tasks: Int[Array, " T"] | None = None,
        keep_a: bool | None = None,
    ) -> LoRA:
        """Merges the cores and lifts the result.

        Args:
            rule: the merge rule.
            key: PRNG key, for rules that draw random numbers.
            tasks: int32 ``(T,)``, the places of the adapters in the list; by default 0 to T - 1.
            keep_a: True if the result has the A factors of the adapters; by default, if
                `keeps_a`.
        """
        return self.expand(self.merge_cores(rule, key=key, tasks=tasks), keep_a=keep_a)

    def expand(self, merged: Merged, *, keep_a: bool | None = None) -> LoRA:
        """Returns the update that the result of `merge_cores` stands for; see `merge`."""
        return self._expand(merged, self.keeps_a if keep_a is None else keep_a)

    def merge_cores(
        self,
        rule: Rule,
        *,
        key: PRNGKeyArray | None = None,
        tasks: Int[Array, " T"] | None = None,
    ) -> Merged:
        """Merges the cores, without lifting the result; ``u`` times it times ``vᵀ`` is the update.

        Steps of the rule behind the merge act on ``gain @ merged``, whose singular values
        are those of the merged update. The arguments are those of `merge`.
        """
        if tasks is None:
            tasks = jnp.arange(tasks_in(self.factors), dtype=jnp.int32)
        context = Context(shape=self.shape, tasks=tasks, inputs=self.inputs)
        rule = rule if isinstance(rule, Chain) else chain(rule)
        merged = rule.combine(self.factors, key=key, context=context)
        context = dataclasses.replace(context, cores=self._weighed_cores())
        return rule.finish(self._weigh(merged), key=key, context=context)

    def auto_squares(self, rule: Chain, merged: Merged) -> Float[Array, "2"]:
        """Returns what the automatic scale is computed from.

        Args:
            rule: the rule.
            merged: its result, as `merge_cores` returns it.

        Returns:
            ``(2,)``, the squared size of the merged update before scaling, and the sum of the
            squared norms of the adapters' updates.
        """
        cores = self._weighed_cores()
        tasks = jnp.arange(tasks_in(cores), dtype=jnp.int32)
        context = Context(shape=self.shape, tasks=tasks, inputs=self.inputs)
        size = rule.auto_square(dense(merged), cores=cores, context=context)
        return jnp.stack([size, jnp.sum(squared_norms(cores))])

    def of_factors(self, a: Float[Array, "R n"], b: Float[Array, "m R"]) -> "Projection":
        """Returns the projection of other factors, of which the projected ones are coordinates.

        If ``Uᵀ b`` and ``a V`` were projected, with orthonormal U and V whose columns span those
        of b and aᵀ, then the bases are U and V times the ones found: the same combinations of the
        columns of b and aᵀ.

        Args:
            a: ``(R, n)``.
            b: ``(m, R)``.

        Raises:
            MismatchError: the projected factors have fewer rows or columns than their rank.
            UnsupportedError: the space does not merge in bases of the factors' columns.
        """
        left, right = self._combinations()
        if left.x is None or right.x is None:
            raise MismatchError("coordinates of more ranks than they have rows or columns")
        return dataclasses.replace(
            self,
            left=dataclasses.replace(left, x=b),
            right=dataclasses.replace(right, x=a.T),
        )

    def between_factors(
        self, merged: Merged, a: Float[Array, "R n"], b: Float[Array, "m R"]
    ) -> Float[Array, "R R"]:
        """Returns the matrix C with ``ΔW = b C a``.

        Args:
            merged: a result of `merge_cores`.
            a: ``(R, n)``, the stacked factors that were projected.
            b: ``(m, R)``.

        Raises:
            UnsupportedError: as `of_factors`.
        """
        left, right = self._combinations()
        core = matmul(left.multiples_of(b), dense(merged))
        return matmul(core, right.multiples_of(a.T).T)

    def _combinations(self) -> tuple[Basis, Basis]:
        """Returns the bases, which must be those of the stacked factors' columns."""
        if self.left is None or self.right is None:
            raise UnsupportedError(
                "merged updates are no products of the adapters' stacked factors with a matrix "
                "between them, as the space does not merge in bases of these; merge in core space"
            )
        return self.left, self.right

    def lift(self, merged: Float[Array, "p q"]) -> LoRA:
        """Returns the update that a matrix of the merge space stands for.

        Args:
            merged: ``(p, q)``.

        Returns:
            Factors of rank ``min(p, q)``.
        """
        return self._expand(self._weigh(merged), self.keeps_a)

    def _weigh(self, merged: Merged) -> Merged:
        """Returns ``gain @ merged``."""
        if self.gain is None:
            return merged
        core = dense(merged)
        return self.gain[:, None] * core if self.gain.ndim == 1 else matmul(self.gain, core)

    def _weighed_cores(self) -> Cores:
        """Returns the cores in the coordinates of the update: ``gain @ cores``."""
        if self.gain is None:
            return self.factors
        return jax.vmap(self._weigh)(self.cores)  # type: ignore[return-value]  # with a gain, it is an array

    def _expand(self, merged: Merged, keep_a: bool | Bool[Array, ""]) -> LoRA:
        """Returns factors of ``u merged vᵀ``."""
        core = dense(merged)
        p, q = core.shape
        u, v = self.left, self.right
        if q > p:
            a = core if v is None else v.times(core.T).columns().T
            return LoRA(a=a, b=jnp.eye(p, dtype=core.dtype) if u is None else u.columns())
        if v is None or v.x is None or keep_a is False:
            a = jnp.eye(q, dtype=core.dtype) if v is None else v.columns().T
            return LoRA(a=a, b=core if u is None else u.times(core).columns())
        assert u is not None
        kept, on_a = v.x.T, matmul(core, v.frame.T)
        if keep_a is True:
            return LoRA(a=kept, b=u.times(on_a).columns())

        def orthonormal() -> Float[Array, "q n"]:
            return matmul(v.frame.T, kept.astype(core.dtype)).astype(kept.dtype)

        a = jax.lax.cond(keep_a, lambda: kept, orthonormal)
        return LoRA(a=a, b=u.times(jnp.where(keep_a, on_a, core)).columns())


class Space:
    """A merge space: a hashable object that projects updates by a pure function.

    Attributes:
        lossless: True if the projected updates are the updates themselves, so that linear rules
            give the same result as without a space.
    """

    lossless: ClassVar[bool]

    @property
    def takes_coordinates(self) -> bool:
        """True if factors and their coordinates in orthonormal bases are merged alike.

        That is so where merge spaces are found from inner products alone, in bases of the
        factors' columns. See `Projection.of_factors`.
        """
        return False

    # Constructors check their parameters themselves, with messages for users: in tests too.
    __no_type_check__: ClassVar[bool] = True

    def project(
        self,
        lora_a: Float[Array, "R n"],
        lora_b: Float[Array, "m R"],
        ranks: tuple[int, ...],
        *,
        dtype: DTypeLike | None = None,
        elementwise: bool = True,
        axis: str | None = None,
        shape: tuple[int, int] | None = None,
        given: DTypeLike | None = None,
    ) -> Projection:
        """Projects the updates of one module into the merge space.

        Args:
            lora_a: ``(R, n)``, the A factors of all adapters below each other.
            lora_b: ``(m, R)``, the B factors side by side.
            ranks: the rank of each adapter, ``sum(ranks) == R``; static.
            dtype: to compute in; by default that of the factors. Directions within rounding
                errors of the factors as they are given are dropped from the bases.
            elementwise: True if the rule uses single entries; for other rules the space may
                choose cheaper coordinates that give the same merged update.
            axis: a mapped axis (of `jax.shard_map`) over which the columns of A and the rows of B
                are spread, for modules too large for one device. The lifted factors are spread
                alike.
            shape: ``(m, n)`` of the module, if some rows or columns only fill up, with zeros.
            given: dtype to whose precision the factors are known; by default that of A.

        Raises:
            MismatchError: the ranks are not those of the factors.
            UnsupportedError: the space has matrices as large as the module, and there is an axis.
        """
        if shape is None:
            parts = 1 if axis is None else jax.lax.axis_size(axis)
            shape = parts * lora_b.shape[0], parts * lora_a.shape[1]
        dtype = np.dtype(dtype or widest(lora_a.dtype, lora_b.dtype))
        given = np.dtype(given or lora_a.dtype)
        stacked = Stacked(lora_a, lora_b, ranks, shape, dtype, axis, given)
        return self.project_stacked(stacked, elementwise=elementwise)

    def project_stacked(self, stacked: Stacked, *, elementwise: bool) -> Projection:
        """Projects updates that `project` has described. Every space implements this."""
        raise NotImplementedError

    def operations(
        self, shape: tuple[int, int], ranks: tuple[int, ...], *, elementwise: bool
    ) -> tuple[Sizes, Operations]:
        """Counts operations and memory of `project` and `Projection.lift`, from leading terms.

        By default they are counted in the jaxprs of both.

        Args:
            shape: ``(m, n)`` of the module.
            ranks: the rank of each adapter.
            elementwise: as in `project`.

        Returns:
            The sizes of the cores; the operations.
        """
        (m, n), total = shape, sum(ranks)
        a, b = (jax.ShapeDtypeStruct(x, jnp.float64) for x in ((total, n), (m, total)))
        static: dict[str, Any] = {"space": self, "ranks": ranks, "elementwise": elementwise}
        with jax.enable_x64(True):
            cores, _ = jax.eval_shape(partial(_there_and_back, **static), a, b)
        thin = isinstance(cores, LoRA)
        tasks, p, q = (len(ranks), *cores.shape) if thin else cores.shape
        width = max(ranks) if thin else min(p, q)
        sizes = Sizes(tasks, p, q, width, dense=not thin)
        return sizes, counted(_there_and_back, a, b, **static)


def well_conditioned(spread: Float[Array, ""]) -> Bool[Array, ""]:
    """Returns True if merged factors can have the stacked A factors, which have this spread."""
    return spread <= _SPREAD


def of_present(grams: Float[Array, "T k k"], weights: Float[Array, " T"]) -> Float[Array, "T k k"]:
    """Returns the Gram matrices, with 0 for tasks of weight 0: these count as absent."""
    return jnp.where((weights != 0)[:, None, None], grams, 0)


def _there_and_back(
    a: Float[Array, "R n"],
    b: Float[Array, "m R"],
    space: Space,
    ranks: tuple[int, ...],
    elementwise: bool,
) -> tuple[Cores, LoRA]:
    """Projects updates, and lifts the first."""
    found = space.project(a, b, ranks, elementwise=elementwise)
    return found.factors, found.lift(found.cores[0])


def check_static(
    name: str, value: Any, ok: Callable[[Any], bool], expected: str, *, whole: bool = False
) -> None:
    """Validates a parameter of a space, which is never traced.

    Raises:
        RecipeError: naming the parameter, its value and what is expected.
    """
    kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise RecipeError(f"{name}={short(value)}: expected {expected}")
    check(name, value, ok, expected)
