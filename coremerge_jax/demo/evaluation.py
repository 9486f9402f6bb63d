"""Merges the shipped adapters in many ways, and measures each merge on every task."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
import numpy as np
from rich.table import Table

import coremerge_jax as cm
from coremerge_jax.demo.data import DATA, adapters, base, questions
from coremerge_jax.demo.model import accuracy, fold
from coremerge_jax.demo.tasks import TASKS
from coremerge_jax.demo.unlabelled import WITH_INPUTS
from coremerge_jax.recipe import parse_rule, parse_space

METHODS: tuple[tuple[str, str], ...] = (
    ("mean", "core"),
    ("task_arithmetic", "core"),
    ("ties", "full"),
    ("ties", "knots"),
    ("ties", "core"),
    ("dare + ties", "core"),
    ("tsv", "core"),
    ("flatten + tsv", "core"),
    ("cart", "core"),
    ("task_arithmetic + isotropize", "core"),
    ("ties + isotropize", "core"),
    ("tsv + isotropize", "core"),
    ("cart + isotropize", "core"),
)
"""Rules, as on the command line, and spaces. Linear rules give the same result in any space."""


@dataclasses.dataclass(frozen=True)
class Score:
    """Accuracy of a merge.

    Attributes:
        name: the rule; or ``"base model"``, or ``"one adapter per task"``.
        space: the merge space; None if nothing is merged.
        scale: factor of the merged update, chosen on the validation images; None if no label has
            chosen anything.
        accuracy: test accuracy by task.
        normalized: mean over tasks of the accuracy relative to the task's own adapter.
    """

    name: str
    space: str | None
    scale: float | None
    accuracy: dict[str, float]
    normalized: float

    @property
    def average(self) -> float:
        """The mean accuracy over tasks."""
        return float(np.mean(list(self.accuracy.values())))


def evaluate(
    adapter: cm.Adapter | None = None,
    *,
    scale: float = 1.0,
    split: str = "test",
    folder: Path = DATA,
) -> dict[str, float]:
    """Returns the accuracy on each task of the base model, with an adapter if one is given."""
    params = base(folder)
    if adapter is not None:
        params = fold(params, adapter, scale)
    return dict(zip(TASKS, accuracy(params, *questions(split, folder)).tolist(), strict=True))


def parse_chain(text: str) -> cm.rules.Chain:
    """Returns the rules of a text such as ``"ties:density=0.3 + isotropize"``."""
    return cm.chain(*(parse_rule(part.strip()) for part in text.split("+")))


def merge(rule: str, space: str, folder: Path = DATA) -> cm.Adapter:
    """Merges the shipped adapters by a rule as `parse_chain` reads it."""
    return cm.merge(
        [cm.load_peft(path) for path in adapters(folder)],
        parse_chain(rule),
        space=parse_space(space),
        scale=1.0,
        key=jax.random.key(0),
    )


def run(
    methods: Sequence[tuple[str, str]] = METHODS,
    progress: Callable[[str], object] | None = None,
    *,
    with_inputs: Iterable[str] = (),
) -> list[Score]:
    """Measures the base model, each task's own adapter, and the merged adapters.

    Args:
        methods: pairs of rule and space, see `METHODS`; those not listed there get scale 1.
        progress: function that is called with the name of each score as it comes.
        with_inputs: names of merges with unlabelled inputs, see `unlabelled.WITH_INPUTS`.

    Returns:
        One score of the base model, one of the adapters on their own tasks, one per merge.
    """
    records: list[Score] = []
    alone = {path.name: evaluate(cm.load_peft(path))[path.name] for path in adapters()}

    def add(name: str, space: str | None, scale: float | None, found: dict[str, float]) -> None:
        normalized = float(np.mean([found[task] / alone[task] for task in TASKS]))
        records.append(Score(name, space, scale, found, normalized))
        if progress:
            progress(name)

    add("base model", None, None, evaluate())
    add("one adapter per task", None, None, alone)
    scales = json.loads((DATA / "scales.json").read_text())
    for rule, space in methods:
        scale = scales.get(f"{rule} in {space}", 1.0)
        add(rule, space, scale, evaluate(merge(rule, space), scale=scale))
    for name in with_inputs:
        add(name, "core", None, evaluate(WITH_INPUTS[name]()))
    return records


def table(records: Sequence[Score]) -> Table:
    """Returns the scores for a terminal of 80 columns, the best merge of each column in bold."""
    grid = Table(title="Accuracy on test images, %", box=None, padding=(0, 1, 0, 0))
    grid.add_column("rule", min_width=17)
    for column in ("space", "scale", *TASKS, "average", "norm."):
        grid.add_column(column, justify="right", no_wrap=True)
    merged = [_numbers(record) for record in records if record.space]
    best = np.max(merged, axis=0) if merged else np.inf
    for record in records:
        cells = [f"{100 * value:.1f}" for value in _numbers(record)]
        if record.space:
            bold = _numbers(record) >= best
            cells = [f"[bold]{c}[/]" if b else c for c, b in zip(cells, bold, strict=True)]
        grid.add_row(record.name, record.space or "", f"{record.scale or ''}", *cells)
    return grid


def _numbers(record: Score) -> np.ndarray:
    return np.array([*record.accuracy.values(), record.average, record.normalized])
