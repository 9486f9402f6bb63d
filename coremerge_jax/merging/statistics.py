"""Statistics of modules' inputs: sums over unlabelled examples of each task.

Rules that use inputs need only their Gram matrices, which are sums: over batches, devices and
hosts.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from coremerge_jax.errors import MismatchError, RecipeError, UnsupportedError, hint, unknown
from coremerge_jax.linalg import pytree
from coremerge_jax.lora import AdapterSource
from coremerge_jax.merging.groups import GramKind, Group, label
from coremerge_jax.merging.mesh import fetched
from coremerge_jax.naming.spelling import canonical

SOURCES = ("own", "base", "merged")

# What to do with modules without statistics; also in `recipe`, which does not import JAX.
MISSING = ("error", "tsv")

# Relative difference of squared norms of rows of A: far more than rounding to bfloat16 makes, and
# far less than any training.
_ROWS = 0.02


@pytree
@dataclasses.dataclass(frozen=True)
class Gram:
    """Sums over the inputs x of one module, for each of the T tasks whose adapter has the module.

    Attributes:
        matrices: ``(T, R, R)``, Σ z zᵀ of the coordinates z = A x in the A factors of the T
            adapters below each other; or ``(T, n, n)``, Σ x xᵀ.
        counts: ``(T,)``, the number of inputs.
        squares: ``(R,)``, the squared norms of the rows of A, which identify it; None for
            ``(T, n, n)``.
        tasks: places of the T adapters in `Statistics.adapters`, ascending.
        ranks: of the T adapters.
    """

    matrices: Float[Array, "T k k"] | Float[np.ndarray, "T k k"]
    counts: Float[Array, " T"] | Float[np.ndarray, " T"]
    squares: Float[Array, " R"] | Float[np.ndarray, " R"] | None
    tasks: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    ranks: tuple[int, ...] = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_pytree_with_keys_class
class Statistics(Mapping[str, Gram]):
    """Statistics of the inputs of modules, by module path; a pytree.

    Sums of several are their sum, ``x + y``; those of devices that share the inputs are added up
    by `psum`.

    Args:
        grams: of each module.
        adapters: names of the adapters, in order; None where one has no name.
        source: the model that read the inputs: ``"own"``, the base model with the task's own
            adapter; ``"base"``, the base model alone; ``"merged"``, with a merge.
        model: name of the base model, if known.
    """

    def __init__(
        self,
        grams: Mapping[str, Gram],
        adapters: Sequence[str | None],
        *,
        source: str = "own",
        model: str | None = None,
    ) -> None:
        if source not in SOURCES:
            raise RecipeError(f"source={source!r}: expected one of {', '.join(SOURCES)}")
        self._grams = dict(grams)
        self.adapters, self.source, self.model = tuple(adapters), source, model

    def __getitem__(self, path: str) -> Gram:
        return self._grams[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._grams)

    def __len__(self) -> int:
        return len(self._grams)

    def __repr__(self) -> str:
        names = ", ".join(str(name) for name in self.adapters)
        return f"Statistics({len(self)} modules, inputs of {names}, source={self.source!r})"

    @property
    def counts(self) -> np.ndarray:
        """``(T,)``, the number of inputs of each task: of the module that has the most."""
        found = np.zeros(len(self.adapters))
        for gram in self.values():
            np.maximum.at(found, list(gram.tasks), np.asarray(gram.counts, np.float64))
        return found

    def __add__(self, other: "Statistics") -> "Statistics":
        """Adds the inputs of other statistics of the same adapters.

        Raises:
            MismatchError: they are of other adapters or modules, or from another model.
        """
        if not isinstance(other, Statistics):
            return NotImplemented
        for name in ("adapters", "source", "model"):
            if getattr(self, name) != getattr(other, name):
                raise MismatchError(
                    f"statistics with {name} {getattr(self, name)} and {getattr(other, name)} "
                    "cannot be added"
                )
        if self.keys() != other.keys():
            path = next(iter(self.keys() ^ other.keys()))
            raise MismatchError(f"statistics cannot be added: only one has module {path!r}")
        return self._with({path: _added(path, self[path], other[path]) for path in self})

    def __radd__(self, other: Any) -> "Statistics":
        return self if other == 0 else NotImplemented  # so that `sum` works

    def psum(self, axis: str) -> "Statistics":
        """Returns the sum over a mapped axis, of `jax.shard_map` or `jax.vmap`."""
        return self._with(
            {
                path: dataclasses.replace(
                    gram,
                    matrices=jax.lax.psum(gram.matrices, axis),
                    counts=jax.lax.psum(gram.counts, axis),
                )
                for path, gram in self.items()
            }
        )

    def _with(self, grams: Mapping[str, Gram]) -> "Statistics":
        return Statistics(grams, self.adapters, source=self.source, model=self.model)

    def tree_flatten_with_keys(self) -> tuple[tuple, tuple]:
        """Returns the children in the order of the mapping."""
        key = jax.tree_util.DictKey
        children = tuple((key(path), gram) for path, gram in self._grams.items())
        return children, (tuple(self._grams), self.adapters, self.source, self.model)

    @classmethod
    def tree_unflatten(cls, aux: tuple, children: tuple) -> "Statistics":
        """Rebuilds without validation: the leaves may be anything."""
        paths, adapters, source, model = aux
        self = object.__new__(cls)
        self._grams = dict(zip(paths, children, strict=True))
        self.adapters, self.source, self.model = adapters, source, model
        return self


def _added(path: str, x: Gram, y: Gram) -> Gram:
    if (x.tasks, x.ranks, x.matrices.shape) != (y.tasks, y.ranks, y.matrices.shape):
        raise MismatchError(f"statistics of module {path!r} are not of the same adapters")
    if x.squares is not None and y.squares is not None and not same_rows(x.squares, y.squares):
        raise MismatchError(
            f"statistics of module {path!r} cannot be added: the adapters' A are not the same"
        )
    return dataclasses.replace(x, matrices=x.matrices + y.matrices, counts=x.counts + y.counts)


def same_rows(x: Any, y: Any) -> bool:
    """Returns True if squared norms of rows agree; also if they are traced."""
    if any(isinstance(z, jax.core.Tracer) for z in (x, y)):
        return True
    first, second = (np.asarray(jax.device_get(z), np.float64) for z in (x, y))
    return bool(np.allclose(first, second, rtol=_ROWS, atol=1e-30))


@dataclasses.dataclass(frozen=True)
class Matched:
    """Statistics, matched with the adapters that take part in a merge.

    Attributes:
        statistics: of these adapters, and perhaps of others.
        places: of the adapters in `Statistics.adapters`.
        paths: the path in the statistics of each module that has them.
    """

    statistics: Statistics
    places: tuple[int, ...]
    paths: Mapping[str, str]

    def kind(self, path: str, tasks: np.ndarray) -> GramKind | None:
        """Returns the kind of a module's Gram matrices; None if it has none."""
        if path not in self.paths:
            return None
        gram = self.statistics[self.paths[path]]
        if gram.squares is None:
            return GramKind(gram.matrices.shape[1], whole=True)
        ranks = [gram.ranks[gram.tasks.index(self.places[t])] for t in tasks]
        return GramKind(sum(ranks), whole=False)

    def stack(self, group: Group) -> tuple[Any, Any]:
        """Returns the Gram matrices ``(L, T, k, k)`` of a group, and the rows of A they are of.

        Returns:
            The matrices; and the squared norms of the rows, ``(L, R)``, or None.
        """
        pairs = zip(group.paths, group.tasks, strict=True)
        rows = group.padded([self._select(path, tasks) for path, tasks in pairs])
        matrices, squares = zip(*rows, strict=True)
        xp = np if all(isinstance(x, np.ndarray) for x in matrices) else jnp
        if squares[0] is None:
            return xp.stack(matrices), None
        return xp.stack(matrices), xp.stack(squares)

    def _select(self, path: str, tasks: np.ndarray) -> tuple[Any, Any]:
        """Returns the matrices and rows of the adapters at hand."""
        gram = self.statistics[self.paths[path]]
        wanted = [gram.tasks.index(self.places[t]) for t in tasks]
        matrices = gram.matrices[np.asarray(wanted)]
        if gram.squares is None:
            return matrices, None
        ends = np.cumsum(gram.ranks)
        places = np.concatenate([np.arange(ends[i] - gram.ranks[i], ends[i]) for i in wanted])
        return matrices[:, places[:, None], places[None, :]], gram.squares[places]


def match(
    statistics: Any, adapters: Sequence[AdapterSource], places: Sequence[int], given: int
) -> Matched:
    """Matches statistics with the adapters of a merge, by name or else by order.

    Args:
        statistics: of these adapters, and perhaps of others.
        adapters: those that take part.
        places: their places in the list of the user.
        given: the number of adapters in that list.

    Raises:
        MismatchError: there are no statistics of an adapter.
    """
    _check_kind(statistics)
    known, names = statistics.adapters, [adapter.metadata.name for adapter in adapters]
    by_name = None not in (*known, *names) and len(set(known)) == len(known)
    if by_name and len(set(names)) == len(names):
        for t, name in enumerate(names):
            if name not in known:
                raise MismatchError(
                    f"statistics have no inputs of {label(adapters, t)}"
                    f"{hint(str(name), map(str, known))}; they are of {', '.join(map(str, known))}"
                )
        found = [known.index(name) for name in names]
    elif len(known) == given:
        found = list(places)
    else:
        raise MismatchError(
            f"statistics of {len(known)} adapters ({', '.join(map(str, known))}) for a merge of "
            f"{given}: names do not say which are which"
        )
    return Matched(statistics, tuple(found), _common_paths(statistics, adapters, found))


def _common_paths(
    statistics: Statistics, adapters: Sequence[AdapterSource], places: Sequence[int]
) -> dict[str, str]:
    """Returns the path in the statistics of each module of which they have all inputs."""
    found = {}
    outlines = [adapter.outline for adapter in adapters]
    paths = dict.fromkeys(path for outline in outlines for path in outline)
    for path, there in _spelled(statistics, paths):
        gram = statistics[there]
        needed = [(place, x[path]) for place, x in zip(places, outlines, strict=True) if path in x]
        if not all(place in gram.tasks for place, _ in needed):
            continue
        tasks = [gram.tasks.index(place) for place, _ in needed]
        if _has_inputs(gram, tasks):
            for i, (_, lora) in zip(tasks, needed, strict=True):
                _check_shape(path, gram, i, lora)
            _check_size(path, gram, tasks, needed[0][1])
            found[path] = there
    return found


def _spelled(statistics: Statistics, paths: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yields the modules of which there are statistics, and their paths in these."""
    by_canonical: dict[str, list[str]] = {}
    for path in statistics:
        by_canonical.setdefault(canonical(path), []).append(path)
    for path in paths:
        there = [path] if path in statistics else by_canonical.get(canonical(path), [])
        if len(there) == 1:
            yield path, there[0]


def match_modules(statistics: Any, outline: AdapterSource) -> Matched:
    """Matches statistics with the modules of a merge whose adapters are not at hand.

    Args:
        statistics: of all adapters that were merged.
        outline: the merge, of which only the names and shapes are used.

    Raises:
        MismatchError: they are of another model.
    """
    _check_kind(statistics)
    paths = {}
    for path, there in _spelled(statistics, outline):
        if _has_inputs(statistics[there], range(len(statistics[there].tasks))):
            if statistics[there].squares is None:
                _check_shape(path, statistics[there], 0, outline[path])
            paths[path] = there
    return Matched(statistics, tuple(range(len(statistics.adapters))), paths)


def _check_kind(statistics: Any) -> None:
    """Refuses what are no statistics.

    Raises:
        RecipeError: they are of another kind.
    """
    if not isinstance(statistics, Statistics):
        raise RecipeError(
            f"statistics: expected Statistics, got {type(statistics).__name__}; read files with "
            "load_statistics"
        )


def _has_inputs(gram: Gram, tasks: Sequence[int]) -> bool:
    """Returns True if inputs of some tasks have reached the module, as they may not an expert."""
    if isinstance(gram.counts, jax.core.Tracer):
        return True
    return bool((np.asarray(jax.device_get(gram.counts))[list(tasks)] > 0).any())


def _check_size(path: str, gram: Gram, tasks: Sequence[int], lora: Any) -> None:
    """Refuses more coordinates than there are inputs: the inputs do not follow from their sums."""
    rank = sum(gram.ranks[i] for i in tasks)
    if gram.squares is not None and rank > lora.shape[1]:
        raise MismatchError(
            f"statistics of module {path!r} are of {rank} coordinates in the adapters' A, and it "
            f"has {lora.shape[1]} inputs; collect those of the inputs themselves (full=True), as "
            "collect does where they are fewer"
        )


def _check_shape(path: str, gram: Gram, i: int, lora: Any) -> None:
    size = gram.matrices.shape[1]
    if gram.squares is None:
        if size != lora.shape[1]:
            raise MismatchError(
                f"statistics of module {path!r} are of {size} inputs, and the adapter has "
                f"{lora.shape[1]}; they are of another model"
            )
    elif gram.ranks[i] != lora.rank:
        raise MismatchError(
            f"statistics of module {path!r} are of an adapter of rank {gram.ranks[i]}, and this "
            f"one has {lora.rank}; collect them again"
        )


def check_rows(path: str, recorded: Any, found: Any) -> None:
    """Checks that statistics are of the A factors that are merged.

    Args:
        path: of the module.
        recorded: ``(R,)``, squared norms of the rows of A in the statistics.
        found: those of the adapters.

    Raises:
        MismatchError: they are not.
    """
    if not same_rows(recorded, found):
        raise MismatchError(
            f"module {path!r}: the statistics are of other A factors than the adapters have; "
            "adapters were changed, or are in another order: collect the statistics again"
        )


def check_stack(
    paths: Sequence[str],
    recorded: Any,
    a: Any,
    check: Callable[[str, Any, Any], None] = check_rows,
) -> None:
    """Checks the A factors of stacked modules, unless they are traced.

    Args:
        paths: of the modules, which may be fewer than those of the stacks.
        recorded: ``(L, R)``, squared norms of the rows of A in the statistics.
        a: ``(L, R, n)``.
        check: called with the path and both norms of each module, see `check_rows`.
    """
    found = _row_squares(a)
    if not isinstance(found, jax.core.Tracer):
        for path, one, other in zip(paths, recorded, fetched(found), strict=False):
            check(path, one, other)


def check_missing(missing: str) -> None:
    """Checks what to do with modules without statistics.

    Raises:
        RecipeError: it is not one of the choices.
    """
    if missing not in MISSING:
        raise unknown("missing_statistics", missing, MISSING)


def refuse_missing(known: Collection[str] | None, rule: Any, paths: Iterable[str]) -> None:
    """Refuses a merge by a rule that needs inputs, of modules without statistics.

    Args:
        known: paths of the modules with statistics; None if there are no statistics.
        rule: the rule.
        paths: of the modules that need them.

    Raises:
        MismatchError: a module has none.
        UnsupportedError: there are no statistics.
    """
    if known is None:
        raise UnsupportedError(
            f"{rule!r} needs inputs of each task: collect statistics (cm.collect, coremerge "
            "collect) and give them (statistics=, --statistics)"
        )
    missing = [path for path in paths if path not in known]
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise MismatchError(
            f"no statistics of module {missing[0]!r}{others}: they were collected without it, or "
            "no input has reached it (an expert?); collect more, or allow such modules to be "
            "merged by tsv with missing_statistics='tsv' (--missing-statistics tsv)"
        )


@jax.jit
def _row_squares(a: Float[Array, "L R n"]) -> Float[Array, "L R"]:
    """Returns the squared norms of the rows of stacked A factors, in float32."""
    return jnp.sum(jnp.square(a.astype(np.float32)), axis=-1)
