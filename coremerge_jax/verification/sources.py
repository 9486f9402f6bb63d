"""The record of a merge, and the sources that it names."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from coremerge_jax.errors import FormatError, MismatchError
from coremerge_jax.io.formats import hash_source, open_adapter
from coremerge_jax.lora import Adapter
from coremerge_jax.record import MergeRecord, Source
from coremerge_jax.verification.findings import Finding, some


def match_sources(
    record: MergeRecord, given: Sequence[Adapter | str | Path] | None
) -> tuple[list[Adapter], list[Finding]]:
    """Puts sources in the order of the record: by hash, else by name, else as they come.

    Args:
        record: of the merge.
        given: the sources; None for those that it names.

    Returns:
        The adapters, and what does not match.

    Raises:
        FormatError: a source is missing or broken.
        MismatchError: there are fewer than the record names.
    """
    if given is None:
        recorded = [f"{source.path}" for source in record.sources]
        given, adapters = recorded, [_open_recorded(path) for path in recorded]
    else:
        adapters = [x if isinstance(x, Adapter) else open_adapter(x) for x in given]
    rest = {i: _describe(*pair) for i, pair in enumerate(zip(given, adapters, strict=True))}
    places: dict[int, int] = {}
    found: dict[int, Source] = {}

    def match(same: Callable[[Source, Source], bool]) -> None:
        for slot, recorded in enumerate(record.sources):
            fitting = (i for i in rest if same(recorded, rest[i])) if slot not in places else ()
            if (i := next(iter(fitting), None)) is not None:
                places[slot] = i
                found[slot] = rest.pop(i)

    match(lambda recorded, x: bool(x.sha256) and recorded.sha256 == x.sha256)
    match(lambda recorded, x: recorded.name == x.name)
    if len(given) == len(record.sources):
        match(lambda *_: True)
    missing = [f"{x.name}" for slot, x in enumerate(record.sources) if slot not in places]
    if missing:
        raise MismatchError(
            f"{some(missing)} not among the sources: {len(record.sources)} adapters were merged, "
            f"got {len(given)}; name all of them (--sources)"
        )
    findings = [_changed(record.sources[slot], found[slot]) for slot in sorted(found)]
    if rest:
        names = [f"{x.name}" for x in rest.values()]
        message = f"the record does not name {some(names)}: the merge was made without; merge again"
        findings.append(Finding("left-out", message))
    return [adapters[places[slot]] for slot in sorted(places)], [x for x in findings if x]


def _open_recorded(path: str) -> Adapter:
    try:
        return open_adapter(path)
    except FormatError as error:
        raise FormatError(
            f"{error}; the record says that it was merged from there: say where it is (--sources)"
        ) from error


def _describe(given: Adapter | str | Path, adapter: Adapter) -> Source:
    if isinstance(given, Adapter):
        return Source(adapter.metadata.name, None)
    return Source(adapter.metadata.name, str(given), hash_source(given))


def _changed(recorded: Source, found: Source) -> Finding | None:
    """Returns a finding for a source that is not the recorded one: a note, as it may be equal."""
    files = [name for name, x in recorded.sha256.items() if found.sha256.get(name, x) != x]
    if not files and (not found.sha256 or found.sha256.keys() == recorded.sha256.keys()):
        return None
    told: Any = files[0] if files else next(iter(recorded.sha256))
    message = (
        f"source {recorded.name!r} ({found.path}) has changed since the merge, or is another: "
        f"sha256 of {told} is {found.sha256.get(told, 'unknown')[:12]}…, recorded "
        f"{recorded.sha256[told][:12]}…; find the file that was merged, or merge again"
    )
    return Finding("changed-source", message, defect=False)
