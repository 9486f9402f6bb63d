"""Adapters of packs as a format."""

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coremerge_jax.errors import FormatError, UnsupportedError
from coremerge_jax.io.outputs import PACK
from coremerge_jax.io.packs.pack_record import file_of, find_member, is_pack, member_names

if TYPE_CHECKING:
    from coremerge_jax.lora import Adapter


class PackFormat:
    """Adapters of packs, ``PACK/NAME``. See `formats.Format`."""

    name = PACK
    description = "an adapter of a pack (PACK/NAME)"
    targets: Mapping[str, Collection[str]] = {}
    options = ()

    def recognises(self, source: str | Path) -> bool:
        """Returns True for an adapter of a pack, and for a whole pack."""
        return is_pack(source) or find_member(source) is not None

    def open(self, source: str | Path, *, name: str | None = None, **options: Any) -> "Adapter":
        """Opens an adapter of a pack."""
        from coremerge_jax.io.packs.pack_folder import open_member

        del options  # there are none
        folder, own = self._member(source)
        found = open_member(folder, own)
        if name is not None and name != own:
            raise UnsupportedError(f"{source}: an adapter of a pack has the name {own!r} there")
        return found

    def save(self, adapter: "Adapter", out: str | Path, *, to: str, **options: Any) -> None:
        """Refuses to write a single adapter: `pack_files.save_pack` writes packs."""
        del adapter, to, options
        raise UnsupportedError(f"{out}: use coremerge pack to write packs")

    def hash(self, source: str | Path) -> dict[str, str]:
        """Returns the SHA-256 of the adapter's file."""
        folder, own = self._member(source)
        with (folder / file_of(own)).open("rb") as stream:
            return {file_of(own): hashlib.file_digest(stream, "sha256").hexdigest()}

    def _member(self, source: str | Path) -> tuple[Path, str]:
        found = find_member(source)
        if found is None:
            names = member_names(source)
            raise FormatError(
                f"{source}: a pack of {len(names)} adapters ({', '.join(names[:6])}"
                f"{', …' if len(names) > 6 else ''}), where one adapter is expected; give one of "
                f"them, such as {Path(source) / names[0]}"
            )
        return found
