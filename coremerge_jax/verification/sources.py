"""Matches the sources of a merge with those in its record."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from coremerge_jax.errors import FormatError, MismatchError
from coremerge_jax.io.formats import hash_source, open_adapter
from coremerge_jax.io.statistics_files import hash_statistics
from coremerge_jax.lora import Adapter
from coremerge_jax.record import MergeRecord, Source
from coremerge_jax.verification.findings import Finding, some

AdapterOrPath = Adapter | str | Path


def opened(source: AdapterOrPath) -> Adapter:
    """Returns an adapter as it is, and opens a path."""
    return source if isinstance(source, Adapter) else open_adapter(source)


def match_sources(
    record: MergeRecord, given: Sequence[AdapterOrPath] | None
) -> tuple[list[Adapter], list[Finding]]:
    """Puts sources in the order of the record: by hash, else by name, else as they come.

    Args:
        record: the record of the merge.
        given: the sources; None for those that the record names.

    Returns:
        The adapters, and findings on those that do not match.

    Raises:
        FormatError: a source is missing or broken.
        MismatchError: there are fewer than the record names.
    """
    if given is None:
        given = paths = [f"{source.path}" for source in record.sources]
        adapters = [_open_recorded(path) for path in paths]
    else:
        adapters = [opened(x) for x in given]
    rest = {i: _describe(*pair) for i, pair in enumerate(zip(given, adapters, strict=True))}
    found: dict[int, tuple[int, Source]] = {}  # by place in the record

    def match(same: Callable[[Source, Source], bool]) -> None:
        for place, recorded in enumerate(record.sources):
            fitting = (i for i in rest if place not in found and same(recorded, rest[i]))
            if (i := next(fitting, None)) is not None:
                found[place] = i, rest.pop(i)

    match(lambda recorded, x: bool(x.sha256) and recorded.sha256 == x.sha256)
    match(lambda recorded, x: recorded.name == x.name)
    if len(given) == len(record.sources):
        match(lambda *_: True)
    missing = [f"{x.name}" for place, x in enumerate(record.sources) if place not in found]
    if missing:
        raise MismatchError(
            f"{some(missing)} not among the sources: {len(record.sources)} adapters were merged, "
            f"got {len(given)}; name all of them (--sources)"
        )
    ordered = [found[place] for place in range(len(record.sources))]
    findings = [
        _changed(*pair) for pair in zip(record.sources, (x for _, x in ordered), strict=True)
    ]
    if rest:
        names = [f"{x.name}" for x in rest.values()]
        message = f"the record does not name {some(names)}: merged without it; merge again"
        findings.append(Finding("left-out", message))
    return [adapters[i] for i, _ in ordered], [x for x in findings if x]


def changed_statistics(record: MergeRecord) -> list[Finding]:
    """Returns findings on statistics that are not those of the record.

    Raises:
        FormatError: they are not where the record says.
    """
    found = []
    for recorded in record.statistics:
        there = Source(recorded.name, recorded.path, hash_statistics(f"{recorded.path}"))
        named = dataclasses.replace(recorded, name="statistics")
        found.append(_changed(named, there))
    return [finding for finding in found if finding]


def _open_recorded(path: str) -> Adapter:
    try:
        return open_adapter(path)
    except FormatError as error:
        raise FormatError(
            f"{error}; the record says that it was merged from there: say where it is (--sources)"
        ) from error


def _describe(given: AdapterOrPath, adapter: Adapter) -> Source:
    if isinstance(given, Adapter):
        return Source(adapter.metadata.name, None)
    return Source(adapter.metadata.name, str(given), hash_source(given))


def _changed(recorded: Source, found: Source) -> Finding | None:
    """Returns a finding for a source that is not the recorded one: a note, as it may be equal."""
    files = [name for name, x in recorded.sha256.items() if found.sha256.get(name, x) != x]
    if not files and (not found.sha256 or found.sha256.keys() == recorded.sha256.keys()):
        return None
    file = files[0] if files else next(iter(recorded.sha256))
    message = (
        f"source {recorded.name!r} ({found.path}) has changed since the merge, or is another: "
        f"sha256 of {file} is {found.sha256.get(file, 'unknown')[:12]}…, recorded "
        f"{recorded.sha256[file][:12]}…; find the file that was merged, or merge again"
    )
    return Finding("changed-source", message, defect=False)
