"""`Adapter`, or a stream of its modules, to PEFT adapter folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coremerge_jax.io.adapter_writer import Written, write_adapter
from coremerge_jax.io.outputs import ADAPTER
from coremerge_jax.io.peft.layout import PeftLayout
from coremerge_jax.lora import Adapter, ModuleStream
from coremerge_jax.merging.metric import metric_or_none
from coremerge_jax.merging.statistics import Statistics


def save_peft(
    adapter: Adapter | ModuleStream,
    out: str | Path,
    *,
    dtype: str = "float32",
    rank: int | None = None,
    energy: float | None = None,
    budget: float | None = None,
    parameters: int | None = None,
    statistics: Statistics | None = None,
    sources: Sequence[Adapter] | None = None,
    uniform_rank: bool = False,
    force: bool = False,
    card: Mapping[str, Any] | None = None,
) -> dict[str, float] | None:
    """Writes a PEFT adapter folder that peft loads, with a scaling of 1 in every module.

    The folder appears whole or not at all; one that is replaced is deleted last. Modules are
    written as they come. Memory holds one part of the stream, and the modules that wait for others
    of their group (the experts of a parameter, an attention and its output projection).

    If several processes share a merge, each writes its modules into a folder that all of them see,
    and process 0 joins the files.

    Args:
        adapter: an adapter, in memory or in a file, or a stream of its modules.
        out: the folder to write.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        rank: cut every module to this rank first.
        energy: cut every module to the lowest rank that keeps this share of energy: of
            ``||ΔW||_F^2``, or with statistics of the outputs' energy.
        budget: cut the whole adapter to this mean rank, see `truncate`. This and `parameters`
            iterate over a stream twice.
        parameters: cut the whole adapter to so many entries of factors.
        statistics: of inputs of the modules, to cut by their outputs, see `truncate`.
        sources: the adapters that were merged, in whose A factors the statistics have coordinates.
        uniform_rank: give all modules the largest rank among them, filled up with zeros, for
            programs that have one rank for all: llama.cpp takes other scales where ranks differ.
        force: replace a folder that is already there, if coremerge wrote all that is in it.
        card: origin of the adapter, for README.md and coremerge.json; ``"sources"`` is a list of
            mappings with ``"name"``, ``"path"`` and ``"sha256"``.

    Returns:
        The share of energy that each module kept, if there is a limit of ranks.

    Raises:
        FormatError: the output may not be replaced, or a value does not fit into `dtype`.
        MismatchError: the modules of a stream are not those of its outline; or statistics are of
            other modules or factors.
        ProcessError: another process has failed.
    """
    written = write_peft(
        adapter,
        out,
        dtype=dtype,
        rank=rank,
        energy=energy,
        budget=budget,
        parameters=parameters,
        metric=metric_or_none(statistics, sources, adapter.outline),
        uniform_rank=uniform_rank,
        force=force,
        card=card,
    )
    return dict(written.kept) or None


def write_peft(adapter: Adapter | ModuleStream, out: str | Path, **options: Any) -> Written:
    """Writes as `save_peft` does, and also returns the rank of each module."""
    layout = PeftLayout(adapter.outline)
    return write_adapter(adapter, out, layout, kind=ADAPTER, library="peft", **options)
