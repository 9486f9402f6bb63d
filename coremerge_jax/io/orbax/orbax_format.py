"""Orbax checkpoints as a format. JAX is imported in methods only, for the sake of help."""

import hashlib
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coremerge_jax.io.orbax.orbax_folder import FAMILIES, MARKER, TREE, TREE_OPTIONS, is_orbax, walk
from coremerge_jax.io.outputs import CHECKPOINT

if TYPE_CHECKING:
    from coremerge_jax.lora import Adapter


class OrbaxFormat:
    """Orbax checkpoints, of version 0 or 1 of its interface. See `formats.Format`."""

    name = CHECKPOINT
    description = f"an orbax checkpoint, or a folder of its steps ({MARKER} or {TREE} in it)"
    targets: Mapping[str, tuple[str, ...]] = {
        "orbax": ("like", *TREE_OPTIONS),
        **dict.fromkeys(FAMILIES, ("head_dim",)),
    }
    options = (*TREE_OPTIONS, "alpha", "rank", "item", "step", "scan_axes")

    def recognises(self, source: str | Path) -> bool:
        """Returns True for a checkpoint, whole or not, and for a folder of steps."""
        return is_orbax(source)

    def open(self, source: str | Path, *, name: str | None = None, **options: Any) -> "Adapter":
        """Calls `open_orbax`."""
        from coremerge_jax.io.orbax.orbax_adapter import open_orbax

        return open_orbax(source, name=name, **options)

    def save(self, adapter: "Adapter", out: str | Path, *, to: str, **options: Any) -> None:
        """Calls `save_orbax`."""
        from coremerge_jax.io.orbax.orbax_adapter import save_orbax

        save_orbax(adapter, out, to=to if to in FAMILIES else None, **options)

    def hash(self, source: str | Path) -> dict[str, str]:
        """Returns one SHA-256 of the names and contents of all files."""
        whole = hashlib.sha256()
        for file in sorted(
            path for path, mode in walk(Path(source)) if mode and stat.S_ISREG(mode)
        ):
            whole.update(str(file.relative_to(source)).encode())
            with file.open("rb") as stream:
                whole.update(hashlib.file_digest(stream, "sha256").digest())
        return {"all files": whole.hexdigest()}
