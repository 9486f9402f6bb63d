"""PEFT adapters as a format. JAX is imported in methods only, for the sake of help."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coremerge_jax.io.adapter_config import CONFIG
from coremerge_jax.io.folders import is_hub_id
from coremerge_jax.io.outputs import ADAPTER
from coremerge_jax.io.peft.files import PICKLE, WEIGHTS, locate, weights_file

if TYPE_CHECKING:
    from coremerge_jax.lora import Adapter, ModuleStream


class PeftFormat:
    """PEFT's adapters, in a folder or on the Hugging Face hub. See `formats.Format`."""

    name = ADAPTER
    description = f"a PEFT adapter folder ({CONFIG} and {WEIGHTS}) or its Hugging Face id"
    targets: Mapping[str, tuple[str, ...]] = {"peft": ("dtype",)}
    options = ()

    def recognises(self, source: str | Path) -> bool:
        """Returns True for a folder with one of peft's files, and for a Hugging Face id."""
        files = (Path(source, name) for name in (CONFIG, WEIGHTS, PICKLE))
        return any(map(os.path.lexists, files)) or is_hub_id(source)

    def open(self, source: str | Path, *, name: str | None = None, **options: Any) -> "Adapter":
        """Calls `open_peft`."""
        from coremerge_jax.io.peft.reader import open_peft

        return open_peft(source, name=name, **options)

    def save(
        self, adapter: "Adapter | ModuleStream", out: str | Path, *, to: str, **options: Any
    ) -> None:
        """Calls `save_peft`."""
        from coremerge_jax.io.peft.writer import save_peft

        del to  # the only target
        save_peft(adapter, out, **options)

    def hash(self, source: str | Path) -> dict[str, str]:
        """Returns the SHA-256 of both files by name."""
        folder = locate(source)
        digests = {}
        for file in (folder / CONFIG, weights_file(folder)):
            with file.open("rb") as stream:
                digests[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
        return digests
