"""Merging adapters: a space and a rule over all modules."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from coremerge_jax.errors import RecipeError
from coremerge_jax.lora import Adapter, AdapterSource, Array
from coremerge_jax.merging.checks import (
    Scale,
    as_adapters,
    as_space,
    as_weights,
    check_rule,
    module_scales,
)
from coremerge_jax.merging.job import Job
from coremerge_jax.merging.mesh import Devices, is_host, refuse_explicit
from coremerge_jax.merging.precision import are_traced
from coremerge_jax.merging.present import Present, find_present
from coremerge_jax.merging.statistics import (
    Matched,
    Statistics,
    check_missing,
    match,
    refuse_missing,
)
from coremerge_jax.merging.stream import MergeStream
from coremerge_jax.rules import Chain, Rule, as_rule, chain
from coremerge_jax.rules.rule import AUTO
from coremerge_jax.spaces import Space


def merge(
    adapters: Sequence[Adapter],
    rule: Rule | Callable[[jax.Array], jax.Array],
    *,
    space: Space | None = None,
    weights: Sequence[float] | Array | None = None,
    scale: Scale = AUTO,
    key: jax.Array | None = None,
    precision: str | None = None,
    extras: str = "error",
    allow_other_base: bool = False,
    allow_disjoint: bool = False,
    mesh: Mesh | None = None,
    statistics: Statistics | None = None,
    missing_statistics: str = "error",
) -> Adapter:
    """Merges adapters of one base model into one adapter.

    Modules of equal signature are merged by one compiled program. A module that only some
    adapters have is merged from those. May be called inside a jitted or differentiated function
    with traced factors.

    Args:
        adapters: at least one.
        rule: how to merge, see `coremerge_jax.rules`; or a function ``(T, p, q) -> (p, q)``.
        space: where to merge, see `coremerge_jax.spaces`; core space by default. Linear rules give
            the same in every lossless space and are computed without any.
        weights: one per adapter, multiplies its updates before anything else. An adapter of
            weight 0 counts as absent, unless weights are traced.
        scale: multiplies the merged updates. ``"auto"`` is a number that falls with the number of
            adapters, or by which the whole merge gets the norm that it should have
            (`Rule.auto_scale`, `Rule.auto_norm`); 1 is the rule as it was published. A mapping from
            patterns (as in `fnmatch`) of module paths to scales takes, for each module, the first
            pattern that matches, else ``"auto"``.
        key: PRNG key, for rules that draw random numbers.
        precision: ``"float64"`` or ``"float32"`` for the computation. By default float64, except
            on TPU and for traced factors, which keep their precision (at least float32). JAX's
            global x64 switch is neither needed nor changed.
        extras: what to do with tensors that are not low-rank updates: ``"error"``, ``"first"``,
            ``"mean"``, ``"drop"`` or ``"keep=ADAPTER"`` (a name, a folder, or a number from 1 on).
        allow_other_base: merge also adapters that name different base models.
        allow_disjoint: merge also adapters without a module in common.
        mesh: devices to share the work. Modules are spread over its first axis; along a second
            one, for modules or ranks too large for one device, so are the columns of A and the
            rows of B. May have devices of several processes (`jax.distributed`), which then all
            have to call this.
        statistics: of the modules' inputs (`collect`, `load_statistics`), for rules that need them.
        missing_statistics: what to do with modules without statistics: ``"error"``, or ``"tsv"``
            to merge them by that rule.

    Returns:
        The merged adapter, its rank at most the sum of the ranks (and at most m and n). Factors
        have the widest dtype of the sources', and are NumPy arrays where all of theirs are. With
        a mesh, others are where those of the first adapter are.

    Raises:
        MismatchError: the adapters do not belong together; or what is merged of finite values
            is none, as it is too large.
        FormatError: a factor has NaN or infinite values.
        ProcessError: another process has failed.
        RecipeError: an argument is of another kind, or a parameter is out of range.
        UnsupportedError: adapters have extras and no policy for them was given; or the mesh has
            other axes, or the space cannot spread a module over devices.
    """
    return merge_stream(
        adapters,
        rule,
        space=space,
        weights=weights,
        scale=scale,
        key=key,
        precision=precision,
        extras=extras,
        allow_other_base=allow_other_base,
        allow_disjoint=allow_disjoint,
        mesh=mesh,
        statistics=statistics,
        missing_statistics=missing_statistics,
    ).collect()


def merge_stream(
    adapters: Sequence[Adapter],
    rule: Rule | Callable[[jax.Array], jax.Array],
    *,
    space: Space | None = None,
    weights: Sequence[float] | Array | None = None,
    scale: Scale = AUTO,
    key: jax.Array | None = None,
    precision: str | None = None,
    extras: str = "error",
    allow_other_base: bool = False,
    allow_disjoint: bool = False,
    base_model: str | None = None,
    mesh: Mesh | None = None,
    max_memory: int | None = None,
    statistics: Statistics | None = None,
    missing_statistics: str = "error",
) -> MergeStream:
    """Merges adapters part by part, for those that are larger than memory.

    With adapters from `open_peft` and the stream given to `save_peft`, modules are read, merged
    and written in batches, at the same time, and memory does not grow with their number. With a
    mesh of several processes, each of them reads, merges and writes a share.

    Args:
        adapters: at least one.
        rule: how to merge. This and the following are the arguments of `merge`.
        space: where to merge.
        weights: one per adapter.
        scale: multiplies the merged updates.
        key: PRNG key, for rules that draw random numbers.
        precision: for the computation.
        extras: what to do with tensors that are not low-rank updates.
        allow_other_base: merge also adapters that name different base models.
        allow_disjoint: merge also adapters without a module in common.
        base_model: name of the base model in the result; by default, that of the adapters.
        mesh: devices to share the work.
        max_memory: bytes that the batches on their way may take together; by default, batches
            are as large as is good for speed.
        statistics: of the modules' inputs, for rules that need them.
        missing_statistics: what to do with modules without statistics.

    Raises:
        MemoryError: a single module needs more than ``max_memory``.
    """
    adapters = as_adapters(adapters)
    parts = chain(as_rule(rule))
    key = check_rule(parts, key, len(adapters))
    weights = as_weights(weights, len(adapters))
    present = find_present(adapters, weights, extras, allow_other_base, allow_disjoint)
    if base_model is not None:
        metadata = dataclasses.replace(present.metadata, base_model=base_model)
        present = dataclasses.replace(present, metadata=metadata)
    matched = None
    if parts.needs_inputs:
        matched = _match_inputs(parts, present, statistics, len(adapters), missing_statistics)
        present = present.with_inputs(matched.kind)
    devices, processes = _devices(mesh, present.adapters, (parts, weights, scale, matched))
    job = Job(
        present=present,
        space=as_space(space),
        rule=parts,
        weights=weights,
        scales=module_scales(present.paths, scale),
        key=key,
        precision=precision,
        devices=devices,
        statistics=matched,
    )
    return MergeStream(job, max_memory, processes)


def _devices(
    mesh: Mesh | None, adapters: Sequence[AdapterSource], parameters: Any
) -> tuple[Devices | None, Mapping[int, int]]:
    """Returns the devices that this process merges with, and the processes that have shares.

    What is on the host, or in files, each process can read for itself.
    """
    factors = jax.tree.leaves([[x[path] for path in x] for x in adapters if x.in_memory])
    if mesh is not None and not isinstance(mesh, Mesh):
        raise RecipeError(f"mesh: expected a jax.sharding.Mesh, got {type(mesh).__name__}")
    if mesh is None:
        refuse_explicit(factors)
        return None, {}
    devices, processes = Devices(mesh), {}
    if are_traced(parameters) or not all(map(is_host, factors)):
        return devices, {}
    if len(devices.processes) > 1:
        devices, processes = devices.local(), devices.processes
    # On its one device, a process does better with batches side by side.
    return None if devices.is_default else devices, processes


def _match_inputs(
    rule: Chain, present: Present, statistics: Statistics | None, given: int, missing: str
) -> Matched:
    """Matches statistics with the adapters that take part, for a rule that needs them.

    Args:
        rule: the rule.
        present: the adapters.
        statistics: of the inputs.
        given: the number of adapters that the user gave.
        missing: ``"error"``, or ``"tsv"`` for modules without statistics.

    Raises:
        MismatchError: there are no statistics of an adapter or a module.
        RecipeError: an argument is of another kind.
        UnsupportedError: there are no statistics.
    """
    check_missing(missing)
    if statistics is None:
        refuse_missing(None, rule, ())
    found = match(statistics, present.adapters, present.places.tolist(), given)
    if missing == "error":
        refuse_missing(found.paths, rule, present.paths)
    return found
