"""Gram matrices of modules' inputs, collected while a JAX model reads unlabelled examples."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType

from coremerge_jax.collecting.follow import Track, layer_count, start
from coremerge_jax.collecting.products import Sums, Weight, add_product, add_ragged, sum_dtype
from coremerge_jax.collecting.readers import Forward, Reader, as_tree, find_reader, on_device
from coremerge_jax.collecting.rebuild import Rebuilt, State
from coremerge_jax.errors import FormatError, MismatchError, RecipeError, UnsupportedError
from coremerge_jax.lora import Adapter, Array
from coremerge_jax.merging.alignment import align
from coremerge_jax.merging.belonging import common_metadata
from coremerge_jax.merging.checks import as_adapters
from coremerge_jax.merging.groups import label
from coremerge_jax.merging.mesh import fetched
from coremerge_jax.merging.statistics import Gram, Statistics
from coremerge_jax.trees.arrays import numpy_or_jax
from coremerge_jax.trees.paths import Tree, keys_of

# Weights of inputs in a batch, such as (N, L), or True for those that count.
Mask = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True, eq=False)
class _Plan:
    """Static part of a collector: all but its arrays.

    Attributes:
        forward: of parameters and a batch.
        mask: of a batch.
        reader: where adapters go in the model.
        weights: that see inputs, in the order of the stacks of A.
        tasks: the tasks whose adapters have a module, by its path, in the order of modules.
        ranks: of these adapters.
        names: of the adapters.
        source: of `Statistics`.
        model: name of the base model, if known.
    """

    forward: Forward
    mask: Mask | None
    reader: Reader
    weights: tuple[Weight, ...]
    tasks: Mapping[str, tuple[int, ...]]
    ranks: Mapping[str, tuple[int, ...]]
    names: tuple[str | None, ...]
    source: str
    model: str | None

    @functools.cached_property
    def program(self) -> Callable[[Tree, Sequence[Array], Any], list[Sums]]:
        """The compiled `sums`."""
        return jax.jit(self.sums)

    def sums(self, tree: Tree, stacks: Sequence[Array], batch: Any) -> list[Sums]:
        """Returns the sums of one batch for each weight.

        Args:
            tree: parameters of the model that reads the batch.
            stacks: ``(L, R, n)`` for each weight, the A factors of all adapters.
            batch: what `forward` takes.
        """

        def arrays(tree: Tree, batch: Any) -> list[jax.Array]:
            leaves = jax.tree.leaves(self.forward(tree, batch))
            return [x for x in leaves if isinstance(x, jax.Array)]

        program = jax.make_jaxpr(arrays)(tree, batch)
        leaves = zip(keys_of(tree), jax.tree.leaves(tree), strict=True)
        numbers = {weight.key: i for i, weight in enumerate(self.weights)}
        tracks: list[Track | None] = [None] * len(program.jaxpr.invars)
        state: dict[int, Sums] = {}
        for place, (key, leaf) in enumerate(leaves):
            if (i := numbers.get(key)) is not None:
                letters = self.weights[i].letters
                tracks[place] = start(i, letters, leaf.shape)
                state[i] = self._zeros(i, layer_count(letters, leaf.shape), stacks[i], leaf)
        mask = None if self.mask is None else jnp.asarray(self.mask(batch))
        state = _varying(state, jax.tree.leaves(batch))
        found: set[int] = set()

        def add(function: Callable, state: State, track: Track, *given: Any) -> State:
            i = track.weight
            found.add(i)
            mine = state[i], self.weights[i], jnp.asarray(stacks[i])
            return {**state, i: function(*mine, track, *given, mask)}

        rebuilt = Rebuilt(
            functools.partial(add, add_product), functools.partial(add, add_ragged), self._refuse
        )
        values = jax.tree.leaves((tree, batch))
        _, _, after = rebuilt.run(program, values, tracks, state)
        self._check_found(found)
        return [after[i] for i in range(len(self.weights))]

    def _zeros(self, i: int, layers: int, stack: Array, leaf: Array) -> Sums:
        size = stack.shape[-1 if self.weights[i].full else -2]
        dtype = sum_dtype(stack, leaf)
        return jnp.zeros((layers, size, size), dtype), jnp.zeros(layers, dtype)

    def _refuse(self, track: Track, operation: str) -> None:
        weight = self.weights[track.weight]
        raise UnsupportedError(
            f"module {weight.name!r}: its weight {weight.key!r} goes through {operation!r}, so its "
            "inputs are not known; leave the module out of the adapters, or compute the product "
            "by jnp.matmul, jnp.einsum or jax.lax.dot_general"
        )

    def _check_found(self, found: set[int]) -> None:
        for i, weight in enumerate(self.weights):
            if i not in found:
                raise MismatchError(
                    f"module {weight.name!r}: forward multiplies nothing with its weight "
                    f"{weight.key!r}; does forward use the parameters that it is given?"
                )

    def statistics(
        self, sums: Sequence[Sequence[Sums]], squares: Mapping[str, Array]
    ) -> Statistics:
        """Returns the statistics, given the sums of each task."""
        places = {
            path: (i, place)
            for i, weight in enumerate(self.weights)
            for place, path in enumerate(weight.paths)
            if path is not None
        }
        xp = numpy_or_jax(sums)
        grams = {}
        for path, tasks in self.tasks.items():
            i, place = places[path]
            full = self.weights[i].full
            size = None if full else sum(self.ranks[path])
            grams[path] = Gram(
                matrices=xp.stack([sums[t][i][0][place, :size, :size] for t in tasks]),
                counts=xp.stack([sums[t][i][1][place] for t in tasks]),
                squares=None if full else squares[path],
                tasks=tasks,
                ranks=self.ranks[path],
            )
        return Statistics(grams, self.names, source=self.source, model=self.model)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Collector:
    """A model that sums up the inputs of its modules; a pytree, so that it can be an argument.

    Attributes:
        tree: the parameters of the model.
        adapters: that which reads the inputs of each task; None for the base model alone.
        stacks: ``(L, R, n)`` for each weight that sees inputs, the A factors of all adapters.
        squares: ``(R,)`` by path of a module, squared norms of the rows of A.
        plan: all that is not an array.
    """

    tree: Tree
    adapters: tuple[Adapter | None, ...]
    stacks: tuple[Array, ...]
    squares: dict[str, Array]
    plan: _Plan = dataclasses.field(metadata={"static": True})

    def __call__(self, batches: Sequence[Any]) -> Statistics:
        """Returns the statistics of one batch of each task.

        A pure function: it can be jitted, and called in `jax.shard_map` or `jax.vmap`, whose
        results `Statistics.psum` adds up.

        Args:
            batches: T batches.
        """
        _check_tasks(batches, self.plan.names)
        sums = [
            self.plan.sums(self.parameters(t), self.stacks, batch)
            for t, batch in enumerate(batches)
        ]
        return self.plan.statistics(sums, self.squares)

    def parameters(self, t: int) -> Tree:
        """Returns the parameters of the model that reads the inputs of a task."""
        return self.plan.reader.insert(self.tree, self.adapters[t])

    def sums(self, t: int, batches: Iterable[Any]) -> list[Sums]:
        """Returns the sums over all batches of a task; one batch at a time is in memory.

        Raises:
            MismatchError: there is no batch.
        """
        tree, total = on_device(self.parameters(t)), None
        for batch in batches:
            found = self.plan.program(tree, self.stacks, batch)
            total = found if total is None else _added(total, found)
        if total is None:
            raise MismatchError(f"batches[{t}] is empty; expected inputs of {self._label(t)}")
        return total

    def _label(self, t: int) -> str:
        name = self.plan.names[t]
        return f"adapter {name!r}" if name else f"adapter {t}"


def _varying(zeros: dict[int, Sums], batch: Sequence[Any]) -> dict[int, Sums]:
    """Returns zeros that devices may differ in if they do in a batch, as loops in shard_map ask."""
    if AxisType.Manual not in jax.sharding.get_abstract_mesh().axis_types:
        return zeros
    firsts = [x.reshape(-1)[:1].sum() for x in batch if jnp.issubdtype(x.dtype, jnp.number)]
    zero = sum(((x != x) & False).astype(jnp.float32) for x in firsts)
    return jax.tree.map(lambda x: x + jnp.asarray(zero, x.dtype), zeros)


@jax.jit
def _added(x: list[Sums], y: list[Sums]) -> list[Sums]:
    return jax.tree.map(jnp.add, x, y)


def collector(
    model: Any,
    adapters: Sequence[Adapter],
    forward: Forward,
    *,
    source: str | Adapter = "own",
    mask: Mask | None = None,
    full: bool = False,
    **options: Any,
) -> Collector:
    """Returns a function from one batch of each task to `Statistics`; arguments are `collect`'s."""
    everyone = list(as_adapters(adapters))
    if not everyone:
        raise MismatchError("no adapters to collect inputs for; expected at least one")
    tasks = len(everyone)
    if isinstance(source, Adapter):
        everyone.append(source)
    elif source not in ("own", "base"):
        raise RecipeError(
            f"source={source!r}: expected 'own', 'base', or an adapter, such as a merge"
        )
    aligned = _aligned(everyone)
    present, last = aligned[:tasks], aligned[-1]
    every = _every(present)
    tree, run = as_tree(model, forward)
    rank = max(lora.rank for adapter in aligned for lora in adapter.values())
    whole = isinstance(model, nnx.Module)
    reader = find_reader(tree, _every(aligned), rank, options, whole=whole)
    ranks = {
        path: tuple(adapter[path].rank for adapter in present if path in adapter) for path in every
    }
    weights = reader.weights(
        list(every), lambda path: full or sum(ranks[path]) >= every[path].shape[1]
    )
    factors = {path: _rows(path, present) for path in every}
    readers: dict[str, Sequence[Adapter | None]] = {"own": present, "base": [None] * tasks}
    return Collector(
        tree=tree,
        adapters=tuple(readers[source] if isinstance(source, str) else [last] * tasks),
        stacks=tuple(jnp.asarray(_stack(weight, factors)) for weight in weights),
        squares={path: (a.astype(sum_dtype(a)) ** 2).sum(axis=-1) for path, a in factors.items()},
        plan=_Plan(
            forward=run,
            mask=mask,
            reader=reader,
            weights=tuple(weights),
            tasks={
                path: tuple(t for t, adapter in enumerate(present) if path in adapter)
                for path in every
            },
            ranks=ranks,
            names=tuple(adapter.metadata.name for adapter in present),
            source=source if isinstance(source, str) else "merged",
            model=every.metadata.base_model,
        ),
    )


def _aligned(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Returns adapters with common names, in memory.

    Raises:
        UnsupportedError: one is more than low-rank updates.
    """
    for t, adapter in enumerate(adapters):
        if adapter.extras:
            raise UnsupportedError(
                f"{label(adapters, t)} has {len(adapter.extras)} tensors that are not low-rank "
                f"updates (first: {next(iter(adapter.extras))!r}), and where these belong in the "
                "model is not known; to read inputs without them, give adapter.replace(extras={})"
            )
    return [Adapter(x.read(x), metadata=x.metadata) for x in align(adapters)]


def _every(adapters: Sequence[Adapter]) -> Adapter:
    """Returns the modules of all adapters, with shapes in place of their factors.

    Raises:
        MismatchError: a module is not of one shape.
        UnsupportedError: a module is no linear layer.
    """
    found: dict[str, Any] = {}
    for t, adapter in enumerate(adapters):
        for path, lora in adapter.outline.items():
            if lora.kind.name in ("conv2d", "embedding"):
                raise UnsupportedError(
                    f"module {path!r} is of kind {lora.kind.name!r}, of which inputs cannot be "
                    "collected; merge it by another rule, or leave it out of the adapters"
                )
            if found.setdefault(path, lora).shape != lora.shape:
                raise MismatchError(
                    f"module {path!r} has shape (m, n) {found[path].shape} in others, but "
                    f"{lora.shape} in {label(adapters, t)}; adapters of one base model agree in it"
                )
    # A common type of task does not matter here.
    plain = [
        adapter.replace(metadata=dataclasses.replace(adapter.metadata, task_type=None))
        for adapter in adapters
    ]
    return Adapter(found, metadata=common_metadata(plain, {}))


def _rows(path: str, adapters: Sequence[Adapter]) -> Array:
    """Returns ``(R, n)``, the A factors of all adapters that have a module, below each other."""
    rows = [adapter[path].a for adapter in adapters if path in adapter]
    dtype = sum_dtype(*rows)
    return numpy_or_jax(rows).concatenate([x.astype(dtype) for x in rows])


def _stack(weight: Weight, factors: Mapping[str, Array]) -> Array:
    """Returns ``(L, R, n)``, the A factors of a weight's layers; zeros fill up fewer rows."""
    mine = [None if path is None else factors[path] for path in weight.paths]
    there = [a for a in mine if a is not None]
    size = max(len(a) for a in there)
    empty = there[0][:0]
    xp = numpy_or_jax(there)
    return xp.stack(
        [xp.pad(a, ((0, size - len(a)), (0, 0))) for a in (empty if a is None else a for a in mine)]
    )


def _check_tasks(batches: Any, names: Sequence[Any]) -> None:
    """Checks that there are batches of each task.

    Raises:
        MismatchError: there are more or fewer.
    """
    if len(batches) != len(names):
        raise MismatchError(
            f"batches of {len(batches)} tasks for {len(names)} adapters; expected those of each, "
            "in the order of the adapters"
        )


def collect(
    model: Any,
    adapters: Sequence[Adapter],
    batches: Sequence[Iterable[Any]],
    forward: Forward,
    *,
    source: str | Adapter = "own",
    mask: Mask | None = None,
    full: bool = False,
    **options: Any,
) -> Statistics:
    """Returns Gram matrices of modules' inputs while a model reads unlabelled examples.

    ``forward`` is traced, and what it multiplies with the weights of the adapters' modules is
    summed up as it runs: by `jax.numpy` and `jax.lax` products, in loops (`jax.lax.scan`), mapped,
    rematerialized and jitted functions. Sums are in float32 (of float64 factors, in float64), of
    the coordinates z = A x in the factors A of all adapters, or of x where these are fewer.

    Args:
        model: an `nnx.Module`, or a pytree of parameters: with LoRA factors as `from_tree` reads
            them, or without, as `fold_tree` takes them. Dropout is to be off (`nnx.Module.eval`).
        adapters: T adapters, with the names that `from_tree` gives the model's modules
            (`coremerge_jax.trees.translate` has other implementations' names).
        batches: of each task, batches of unlabelled inputs; any pytrees of arrays. Each shape of a
            batch is compiled once.
        forward: runs the model on a batch, as ``forward(model, batch)``; its result is not used.
        source: the model that reads the inputs: ``"own"``, with the task's own adapter;
            ``"base"``, without adapters; or with an adapter that is given, such as a merge.
        mask: returns weights of a batch's inputs, such as ``(N, L)`` of tokens: 0 or False for
            padding. These are the first axes of all modules' inputs, or joined into one; a module
            with other inputs is refused. Pooled inputs ``(N,)`` count if any of their tokens does.
        full: collect Σ x xᵀ ``(n, n)`` of all modules, as rules need that change row spaces.
        **options: the fields of `TreeFormat`, such as ``alpha`` of qwix; of a model without LoRA
            factors, ``scan_axis`` and ``axes`` of `fold_tree`.

    Raises:
        MismatchError: a module has no place in the model, or no inputs in ``forward``; the mask
            does not fit a module's inputs; or there are no batches of a task.
        FormatError: how the model stores factors or kernels is not clear; or inputs are not finite.
        UnsupportedError: a module is an embedding or a convolution, or its weight is used in a
            way that does not show its inputs.
    """
    made = collector(model, adapters, forward, source=source, mask=mask, full=full, **options)
    if isinstance(batches, Mapping):
        raise RecipeError("batches: got a mapping; expected a list, in the order of the adapters")
    given = list(batches)
    _check_tasks(given, made.plan.names)
    for t, several in enumerate(given):
        if isinstance(several, jax.Array | np.ndarray | Mapping):
            raise RecipeError(f"batches[{t}] is a single batch; expected several, such as [batch]")
    sums = [jax.tree.map(fetched, made.sums(t, several)) for t, several in enumerate(given)]
    statistics = made.plan.statistics(sums, jax.tree.map(fetched, made.squares))
    for path, gram in statistics.items():
        if not np.isfinite(gram.matrices).all():
            raise FormatError(
                f"module {path!r} has inputs that are not finite; check the model and its batches, "
                "or leave padding out with mask"
            )
    return statistics
