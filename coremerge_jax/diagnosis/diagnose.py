"""Measures adapters module by module, with a few modules in memory at a time."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from coremerge_jax.diagnosis.measures import measure
from coremerge_jax.diagnosis.results import Module, Results, RuleCost
from coremerge_jax.errors import MismatchError
from coremerge_jax.io.atomic import atomic_file
from coremerge_jax.linalg.threads import processors
from coremerge_jax.lora import Adapter
from coremerge_jax.merging.base_names import best_name
from coremerge_jax.merging.belonging import present_adapters
from coremerge_jax.merging.checks import as_adapter, as_adapters, refuse_values
from coremerge_jax.merging.cost import Machine, batch_size, cost, expected_seconds
from coremerge_jax.merging.groups import Group, group_modules, label
from coremerge_jax.merging.mesh import implicit
from coremerge_jax.merging.packed import stack_coordinates
from coremerge_jax.merging.precision import computing
from coremerge_jax.merging.stacks import stack_factors, stacked_shapes
from coremerge_jax.rules import RULES, chain, mean
from coremerge_jax.spaces import core

_measure = jax.jit(measure, static_argnames=("ranks", "dtype", "given"))


class Diagnosis(Results):
    """Results of `diagnose`, which can be rendered as an HTML page."""

    def to_html(self, path: str | Path | None = None) -> str:
        """Renders a page with plots and findings that needs no other file and no network.

        Needs matplotlib and jinja2.

        Args:
            path: file to write, if any; it appears whole or not at all. An existing file is
                replaced only if it is such a page.

        Returns:
            The HTML text.

        Raises:
            FormatError: the file may not be written.
        """
        from coremerge_jax.diagnosis.page import MARK, render

        if path is None:
            return render(self)
        with atomic_file(path, mark=MARK, force=True) as file:  # refuses before it is rendered
            text = render(self)
            file.write_text(text, encoding="utf-8")
        return text


def diagnose(
    adapters: Sequence[Adapter],
    merged: Adapter | None = None,
    *,
    machine: Machine | None = None,
    allow_other_base: bool = False,
    allow_disjoint: bool = False,
) -> Diagnosis:
    """Measures how adapters relate to each other, and a merged adapter to them.

    Adapters from `open_peft` are read a few modules at a time. No update is ever formed.

    Args:
        adapters: adapters of one base model; concrete, not traced.
        merged: an adapter that was made of them, by any method.
        machine: speed of the machine (`Machine.measure`), to estimate the seconds of a merge.
        allow_other_base: compare even if the adapters name different base models.
        allow_disjoint: compare even if an adapter has no module in common with the others.

    Raises:
        FormatError: a factor has NaN or infinite values.
        MismatchError: the adapters, or these and the merged one, do not belong together.
    """
    adapters = [implicit(adapter) for adapter in as_adapters(adapters)]
    merged = None if merged is None else implicit(as_adapter(merged, "merged"))
    given = [*adapters, *([] if merged is None else [merged])] if adapters else []
    found = present_adapters(given, None, allow_other_base, allow_disjoint)
    everything: list[Any] = list(found.values())
    group_modules(everything)  # refuses modules of different shapes
    adapters = everything[: len(adapters)]
    if merged is not None:
        merged = everything[-1]
        _check_merged(adapters, merged)
    groups = group_modules(adapters)
    modules = {
        module.path: module for group in groups for module in _modules(group, adapters, merged)
    }
    order = dict.fromkeys(path for adapter in adapters for path in adapter)
    return Diagnosis(
        adapters=tuple(_names(adapters)),
        merged=None if merged is None else merged.metadata.name or "merged",
        base_model=best_name(x.metadata.base_model for x in adapters if x.metadata.base_model),
        modules=tuple(modules[path] for path in order),
        costs=tuple(_costs(groups, machine)),
    )


def _check_merged(adapters: Sequence[Adapter], merged: Adapter) -> None:
    known = {path for adapter in adapters for path in adapter}
    for path in merged:
        if path not in known:
            raise MismatchError(
                f"the merged adapter has module {path!r}, which none of the adapters has; give "
                "the adapters that it was made of"
            )


def _names(adapters: Sequence[Adapter]) -> Iterator[str]:
    """Yields the adapters' names; equal ones get numbers."""
    taken: set[str] = set()
    for t, adapter in enumerate(adapters):
        name = base = adapter.metadata.name or f"adapter {t}"
        number = 1
        while name in taken:
            number += 1
            name = f"{base} ({number})"
        taken.add(name)
        yield name


def _modules(group: Group, adapters: Sequence[Adapter], merged: Adapter | None) -> Iterator[Module]:
    """Measures the modules of one signature, all by the same compiled program."""
    size = batch_size(group, chain(mean()), core(), 1, None)
    for batch in group.split(size):
        small = None if merged is not None else stack_coordinates(batch, adapters)
        given = stacked_shapes(batch, [x.outline for x in adapters])[0].dtype
        a, b = stack_factors(batch, adapters) if small is None else (small.a, small.b)
        results = {} if merged is None else merged.read([x for x in batch.paths if x in merged])
        with computing(None) as dtype:
            run = partial(_measure, ranks=batch.ranks, dtype=dtype, given=given)
            for path, tasks, x, y in zip(batch.paths, batch.tasks, a, b, strict=False):
                found = jax.device_get(run(x, y, results.get(path)))
                energy = 0.0 if found.contribution is None else found.contribution.norm
                if not np.isfinite([*found.norms, energy]).all():
                    everything = [*adapters, *([] if merged is None else [merged])]
                    refuse_values(everything, [path], label)
                yield Module(path, batch.shape, tuple(tasks.tolist()), batch.ranks, found)


def _costs(groups: Sequence[Group], machine: Machine | None) -> Iterator[RuleCost]:
    workers = processors()
    for name, make in RULES.items():
        rule = chain(make())
        costs = [cost(group, rule, core()) for group in groups]
        seconds = None
        if machine is not None:
            stages = expected_seconds(costs, rule, machine, workers, len(groups))
            seconds = sum(value for stage, value in stages.items() if stage != "compile")
        yield RuleCost(
            rule=name,
            products=sum(one.products for one in costs),
            core=sum(one.core for one in costs),
            memory=max(one.held + one.work for one in costs),
            seconds=seconds,
        )
