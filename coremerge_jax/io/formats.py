"""The formats that adapters are read from and written to: a table with one row for each.

A new format is one file with a class like `Format`, and one row of `FORMATS`. A program adds its
own with `register_format`. Opening, hashing, messages and the command line go by this table.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from coremerge_jax.errors import FormatError, RecipeError
from coremerge_jax.io.folders import is_hub_id, not_found, source_name
from coremerge_jax.io.gguf.gguf_format import GgufFormat
from coremerge_jax.io.hub_files import find_hub_file
from coremerge_jax.io.mlx.mlx_format import MlxFormat
from coremerge_jax.io.one_file.diffusers import DiffusersFormat
from coremerge_jax.io.one_file.kohya import KohyaFormat
from coremerge_jax.io.one_file.original import OriginalFormat
from coremerge_jax.io.one_file.peft_file import PeftFileFormat
from coremerge_jax.io.orbax.orbax_format import OrbaxFormat
from coremerge_jax.io.outputs import WRITER_OPTIONS
from coremerge_jax.io.packs.pack_format import PackFormat
from coremerge_jax.io.peft.format import PeftFormat
from coremerge_jax.io.single_file import SUFFIX
from coremerge_jax.io.untrusted import check_path

if TYPE_CHECKING:
    from coremerge_jax.io.adapter_writer import Written
    from coremerge_jax.io.file_layout import FileLayout
    from coremerge_jax.lora import Adapter


class Format(Protocol):
    """A format of adapters on disk.

    The command line imports it for its help, so its file should import JAX within methods only.
    """

    @property
    def name(self) -> str:
        """Name of what is written, in messages and records, such as ``"PEFT adapter"``."""

    @property
    def description(self) -> str:
        """One line for help and messages: what it is, and the files that show it.

        Empty for a format that is only written.
        """

    @property
    def targets(self) -> Mapping[str, Collection[str]]:
        """The names that ``coremerge convert --to`` has for it; for each, the options of `save`."""

    @property
    def options(self) -> Collection[str]:
        """The options of `open`, beside the name."""

    def recognises(self, source: str | Path) -> bool:
        """Returns True if a source is of this format, whole or broken. Must not raise."""

    def open(self, source: str | Path, *, name: str | None = None, **options: Any) -> "Adapter":
        """Opens an adapter.

        Args:
            source: what `recognises` has accepted.
            name: a name for messages and tables; by default that of the folder or file.
            **options: some of `options`.

        Raises:
            FormatError: it is broken.
            UnsupportedError: it is more than a low-rank update of the base model.
        """

    def save(
        self, adapter: "Adapter", out: str | Path, *, to: str, force: bool = False, **options: Any
    ) -> "Written | None":
        """Writes an adapter: all of it, or nothing (see `atomic.atomic_folder`).

        Args:
            adapter: what to write. Of a target with `WRITER_OPTIONS`, it may also be a stream, as
                ``coremerge merge --to`` gives; such a format calls `adapter_writer.write_adapter`.
            out: the folder to make.
            to: one of `targets`.
            force: replace an older output of this format.
            **options: some of those that `targets` has for it.

        Returns:
            The result of `adapter_writer.write_adapter`, of a format that calls it.

        Raises:
            FormatError: the output may not be written.
        """

    def hash(self, source: str | Path) -> dict[str, str]:
        """Returns the SHA-256 of the files of a source, by name."""


@runtime_checkable
class Layouts(Protocol):
    """A format that says where modules go, and refuses what it cannot hold, before it writes."""

    def layout(self, outline: "Adapter", **options: Any) -> "FileLayout":
        """Returns the places of an adapter's modules in the files.

        Args:
            outline: the adapter, of which only names and shapes are used.
            **options: those of `Format.save` that are for this format alone.

        Raises:
            UnsupportedError: the format cannot hold the adapter.
        """


# Orbax first: its checkpoints may have an adapter_config.json beside them. So have MLX's folders,
# which are no PEFT adapters.
FORMATS: list[Format] = [
    PackFormat(),
    OrbaxFormat(),
    MlxFormat(),
    KohyaFormat(),
    DiffusersFormat(),
    OriginalFormat(),
    PeftFileFormat(),
    PeftFormat(),
    GgufFormat(),
]


def register_format(added: Format) -> None:
    """Adds a format: `open_adapter`, merges and the command line then know it.

    It is asked last whether it recognises a source.

    Raises:
        FormatError: there already is a format with this name or one of its targets.
    """
    taken = {name for known in FORMATS for name in (known.name, *known.targets)}
    if twice := taken & {added.name, *added.targets}:
        raise FormatError(f"format {added.name!r}: {min(twice)!r} is another format's already")
    FORMATS.append(added)


def find_format(source: str | Path) -> Format:
    """Returns the format of a source.

    Raises:
        FormatError: there is no such source, or no format recognises it.
    """
    return _find(source)[0]


def _find(source: str | Path) -> tuple[Format, str | Path]:
    """Returns the format of a source, and the source; of a single file on the hub, a copy of it."""
    check_path(source)
    place = find_hub_file(source) or source
    for known in FORMATS:
        if known.recognises(place):
            return known, place
    raise not_found(source, described())


def check_source(source: str | Path) -> None:
    """Checks that a source is an adapter by its files, or the name of something on the hub.

    Raises:
        FormatError: it is neither.
    """
    if not is_hub_id(source):
        find_format(source)


def find_target(to: str) -> Format:
    """Returns the format that a name for ``coremerge convert --to`` stands for.

    Raises:
        RecipeError: there is no such name.
    """
    for known in FORMATS:
        if to in known.targets:
            return known
    raise RecipeError(f"--to {to!r}: expected one of {', '.join(all_targets())}")


def all_targets() -> list[str]:
    """Returns the names for ``coremerge convert --to``."""
    return [to for known in FORMATS for to in known.targets]


def merge_targets() -> list[str]:
    """Returns the names for ``coremerge merge --to``: formats that take a stream of modules."""
    return [to for to in all_targets() if set(WRITER_OPTIONS) <= set(find_target(to).targets[to])]


def find_merge_target(to: str) -> Format:
    """Returns the format that a name for ``coremerge merge --to`` stands for.

    Raises:
        RecipeError: there is no such name, or only ``coremerge convert`` writes this format.
    """
    possible = merge_targets()
    if to in possible:
        return find_target(to)
    if to not in all_targets():
        raise RecipeError(f"--to {to!r}: expected one of {', '.join(possible)}")
    raise RecipeError(
        f"--to {to!r}: merges are written as {', '.join(possible)}; then run coremerge convert "
        f"--to {to}"
    )


def described() -> str:
    """Returns what adapters look like, in each format, for help and messages."""
    return ", or ".join(known.description for known in FORMATS if known.description)


def open_adapter(source: str | Path, *, name: str | None = None, **options: Any) -> "Adapter":
    """Opens an adapter of any format: a folder, a file, or a Hugging Face id.

    Factors stay in the files until they are asked for.

    Args:
        source: what one of the formats has, see `open_peft` and `open_orbax`.
        name: a name for messages and tables; that of the folder by default.
        **options: of `open_orbax`; or ``alpha``, for PEFT's weights without their configuration.
            Other formats record all of this themselves.

    Raises:
        FormatError: there is no such adapter, or it is broken.
        RecipeError: an option is not for adapters of this format.
        UnsupportedError: it is more than a low-rank update of the base model.
    """
    known, place = _find(source)
    if wrong := ", ".join(option for option in options if option not in known.options):
        others = [x.name for x in FORMATS if options.keys() & set(x.options)]
        told = f"no {' or '.join(others)}; {wrong} can be given for these only"
        raise RecipeError(f"{source}: {told if others else f'unknown option {wrong}'}")
    if place is not source and name is None:
        name = source_name(source).removesuffix(SUFFIX)
    return known.open(place, name=name, **options)


def hash_source(source: str | Path) -> dict[str, str]:
    """Returns the SHA-256 of the files that an adapter is read from.

    Args:
        source: see `open_adapter`.

    Returns:
        File name to hexadecimal digest; of a checkpoint, one digest of all its names and files.

    Raises:
        FormatError: see `open_adapter`.
    """
    known, place = _find(source)
    return known.hash(place)
