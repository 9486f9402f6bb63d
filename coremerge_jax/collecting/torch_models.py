"""PyTorch models that read unlabelled inputs: statistics of their modules, and their predictions.

Of the package's files, only those with ``torch`` in their name import torch, and no other imports
them before it is needed.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from coremerge_jax.collecting.torch_modules import as_tensor, first_input
from coremerge_jax.collecting.torch_reading import Batch, Reader
from coremerge_jax.errors import FormatError, RecipeError
from coremerge_jax.lora import Adapter, AdapterSource
from coremerge_jax.merging.groups import label
from coremerge_jax.merging.statistics import Gram, Statistics
from coremerge_jax.text import short

# Of a prediction, so many of the most likely tokens or labels are kept one by one.
_KEPT = 256

_ROWS = 512  # predictions that are compared at once, as a vocabulary may be large
_LEAST = -80.0  # logarithm of a probability, so that 0 times it is 0


def collect_torch(
    model: torch.nn.Module,
    adapters: Sequence[Adapter],
    batches: Sequence[Iterable[Batch]],
    *,
    source: str | Adapter = "own",
    limit: int | None = None,
    full: bool = False,
    allow_missing: bool = False,
) -> Statistics:
    """Collects statistics of the inputs of modules, while a PyTorch model reads examples.

    The model is as before afterwards, also after an error.

    Args:
        model: the base model: of transformers, or any module that is called with the fields of a
            batch; or a `peft.PeftModel`, of which the base model is used.
        adapters: the T adapters to merge.
        batches: for each adapter, unlabelled examples of its task, as arguments of the model by
            name. Tokens where ``attention_mask``, ``(batch, length)``, is 0 do not count.
        source: the model that reads the inputs of a task: ``"own"``, the base model with the task's
            own adapter; ``"base"``, the base model alone; or an adapter, a merge of them all.
        limit: no further batch of a task is read once so many of its inputs have been.
        full: collect ``(n, n)`` for all modules, as a merge with free rows needs; by default only
            where the ranks of the adapters add up to n or more.
        allow_missing: leave out modules that are no linear layers, and what adapters add to them.

    Returns:
        The statistics, with arrays of NumPy in float32.

    Raises:
        FormatError: a module has had inputs that are not finite.
        MismatchError: adapters, batches and the model do not fit together.
        RecipeError: an argument is of another kind.
        UnsupportedError: a module is no linear layer, unless such are left out.

    Warns:
        CoreMergeWarning: modules are left out, or an adapter has trained weights that the model has
            no place for.
    """
    reader = Reader(model, adapters, batches, limit)
    if not isinstance(source, Adapter) and source not in ("own", "base"):
        raise RecipeError(f"source={short(source)}: expected 'own', 'base' or an adapter")
    found = reader.host.find(reader.adapters, allow_missing=allow_missing)
    merge, places = None, found
    if isinstance(source, Adapter):
        merge, places = source, reader.host.find([source], allow_missing=allow_missing)
    stacks = _stacks(reader.adapters, list(found.modules), full)
    with reader.host.quiet():
        for t, adapter in enumerate(reader.adapters):
            sums = {path: _Sum(path, x, reader) for path, x in stacks.items() if t in x.tasks}
            hooks = [(found.modules[path], sum_.add) for path, sum_ in sums.items()]
            with (
                places.adapted(adapter if source == "own" else merge) as weights,
                found.hooked(hooks),
            ):
                for _ in reader.read(t, weights):
                    reader.seen = max((sum_.count for sum_ in sums.values()), default=0)
            for path, sum_ in sums.items():
                stacks[path].sums.append(sum_.finished(label(reader.adapters, t)))
    return Statistics(
        {path: stack.gram() for path, stack in stacks.items()},
        [adapter.metadata.name for adapter in reader.adapters],
        source="merged" if merge is not None else str(source),
        model=reader.base_model,
    )


def agreement_torch(
    model: torch.nn.Module,
    adapters: Sequence[Adapter],
    batches: Sequence[Iterable[Batch]],
    *,
    limit: int | None = None,
    allow_missing: bool = False,
) -> Callable[[Adapter], dict[str, float]]:
    """Returns a function that compares a merge with each task's own adapter, without labels.

    It reads the unlabelled examples of each task with the merge, and the task's own head if the
    adapter has one. Predictions are those of all labels, or of all next tokens. They are compared
    with those of the base model with the task's own adapter, which are made at once, here. For
    `coremerge_jax.search.sweep`.

    Args:
        model: as for `collect_torch`; its output has ``logits``.
        adapters: the adapters that are merged.
        batches: for each adapter, unlabelled examples of its task; kept in memory.
        limit: no further batch of a task is read once there are so many predictions.
        allow_missing: leave out modules that are no linear layers, in the merge and in adapters.

    Returns:
        A function from a merged adapter to ``"agreement"``, the share of equal predictions, and
        ``"kl"``, the mean Kullback-Leibler divergence of the merge from the own adapter, in nats.
        Both are means over tasks of means over predictions. In ``"kl"``, all but the 256 most
        likely tokens count as one.

    Raises:
        MismatchError: adapters, batches and the model do not fit together.
        UnsupportedError: the model gives no logits.
    """
    reader = Reader(model, adapters, batches, limit)
    found = reader.host.find(reader.adapters, allow_missing=allow_missing)
    tasks: list[list[tuple[Batch, _Predictions]]] = []
    with reader.host.quiet():
        for t, adapter in enumerate(reader.adapters):
            tasks.append([])
            with found.adapted(adapter) as weights:
                for batch, output in reader.read(t, weights):
                    tasks[t].append((batch, _Predictions.of(reader.predictions(output))))
                    reader.seen += len(tasks[t][-1][1].best)

    def evaluate(merged: Adapter) -> dict[str, float]:
        is_known = merged.keys() <= found.paths
        there = found if is_known else reader.host.find([merged], allow_missing=allow_missing)
        scores = []
        with reader.host.quiet(), there.adapted(merged.replace(extras={})):
            for adapter, examples in zip(reader.adapters, tasks, strict=True):
                heads, _ = reader.host.weights(found.names, adapter.extras)
                parts = [
                    own.compare(reader.predictions(reader.run(batch, heads)))
                    for batch, own in examples
                ]
                scores.append(torch.cat(parts).mean(0))
        agreement, kl = torch.stack(scores).mean(0).tolist()
        return {"agreement": agreement, "kl": kl}

    return evaluate


# --- Sums -----------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Stack:
    """A module's statistics, as they come.

    Attributes:
        tasks: the adapters that have the module.
        ranks: theirs.
        size: k of the statistics ``(T, k, k)``.
        rows: ``(k, n)``, their A factors below each other; None for statistics ``(T, n, n)``.
        sums: ``(k, k)`` and the number of inputs of each task that has been read.
    """

    tasks: tuple[int, ...]
    ranks: tuple[int, ...]
    size: int
    rows: torch.Tensor | None
    sums: list[tuple[np.ndarray, int]] = dataclasses.field(default_factory=list)

    def gram(self) -> Gram:
        """Returns the statistics."""
        matrices, counts = zip(*self.sums, strict=True)
        return Gram(
            matrices=np.stack(matrices),
            counts=np.asarray(counts, np.float32),
            squares=None if self.rows is None else self.rows.square().sum(1).numpy(),
            tasks=self.tasks,
            ranks=self.ranks,
        )


def _stacks(
    adapters: Sequence[AdapterSource], paths: Sequence[str], full: bool
) -> dict[str, _Stack]:
    """Returns the stack of each module; those with ``full``, or R >= n, are without rows."""
    factors: dict[str, dict[int, torch.Tensor]] = {path: {} for path in paths}
    for t, adapter in enumerate(adapters):
        for path, lora in adapter.read(path for path in paths if path in adapter).items():
            factors[path][t] = as_tensor(lora.a)
    stacks = {}
    for path, there in factors.items():
        rows = torch.cat([*there.values()])
        ranks, (rank, width) = tuple(len(a) for a in there.values()), rows.shape
        whole = full or rank >= width
        stacks[path] = _Stack(
            tuple(there), ranks, width if whole else rank, None if whole else rows
        )
    return stacks


class _Sum:
    """The sum over the inputs of a module, of one task.

    Args:
        path: of the module.
        stack: of the module.
        reader: the model that reads.

    Attributes:
        count: number of inputs.
    """

    def __init__(self, path: str, stack: _Stack, reader: Reader) -> None:
        self._path, self._rows, self._reader = path, stack.rows, reader
        self._total = torch.zeros(stack.size, stack.size)
        self.count = 0

    def add(self, module: torch.nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """Adds the inputs of a call; a `Hook`."""
        del module, output
        x = self._reader.select(self._path, first_input(args, kwargs)).float()
        self._total = self._total.to(x.device)  # moved once, as are the rows
        if self._rows is not None:
            self._rows = self._rows.to(x.device)
            x = x @ self._rows.T
        self._total.addmm_(x.T, x)
        self.count += len(x)

    def finished(self, adapter: str) -> tuple[np.ndarray, int]:
        """Returns the sum ``(k, k)`` and the number of inputs.

        Raises:
            FormatError: the sum is not finite; it names the adapter.
        """
        total = self._total.cpu().numpy()
        if not np.isfinite(total).all():
            raise FormatError(
                f"{adapter}: inputs of module {self._path!r} have NaN or infinite values, or their "
                "sums do not fit into float32; load the model in bfloat16 or float32"
            )
        return total, self.count


# --- Predictions ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Predictions:
    """Predictions of labels or tokens, to compare others with.

    Attributes:
        best: ``(N, k)``, the most likely labels, the first first.
        logs: ``(N, k)`` or ``(N, k + 1)``, logarithms of their probabilities; and of that of all
            others, if there are any.
    """

    best: torch.Tensor
    logs: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor) -> "_Predictions":
        """Returns the predictions of logits ``(N, labels)``, on the host."""
        kept = min(_KEPT, logits.shape[1])
        best = logits.topk(kept).indices
        pairs = zip(logits.split(_ROWS), best.split(_ROWS), strict=True)
        return cls(best.cpu(), torch.cat([_logs(rows, labels) for rows, labels in pairs]).cpu())

    def compare(self, logits: torch.Tensor) -> torch.Tensor:
        """Returns ``(N, 2)``: 1 where logits have the same first label, else 0; and divergences."""
        parts = zip(*(x.split(_ROWS) for x in (logits, self.best, self.logs)), strict=True)
        scores = []
        for rows, best, own in parts:
            labels, expected = best.to(rows.device), own.to(rows.device)
            same = rows.gather(1, labels[:, :1])[:, 0] >= rows.amax(1)  # of equals, any is first
            kl = (expected.exp() * (expected - _logs(rows, labels))).sum(1)
            scores.append(torch.stack([same.float(), kl], 1).cpu())
        return torch.cat(scores)


def _logs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns the logarithms of the probabilities of labels, and of that of all others."""
    logs = logits.float().log_softmax(1)
    found = logs.gather(1, labels)
    if labels.shape[1] < logits.shape[1]:
        others = logs.scatter(1, labels, -torch.inf).logsumexp(1, keepdim=True)
        found = torch.cat([found, others], 1)
    return found.clamp_min(_LEAST)
