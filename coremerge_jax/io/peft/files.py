"""PEFT adapters as a format: where their files are, how they are recognised."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coremerge_jax.errors import FormatError, UnsupportedError
from coremerge_jax.io.adapter_config import CONFIG
from coremerge_jax.io.folders import find_folder, is_hub_id
from coremerge_jax.io.outputs import ADAPTER
from coremerge_jax.io.untrusted import is_regular

if TYPE_CHECKING:
    from coremerge_jax.lora import Adapter, ModuleStream

WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"


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


def locate(source: str | Path) -> Path:
    """Returns the folder that holds an adapter's files.

    Args:
        source: a folder, or a Hugging Face id ``owner/name`` or ``owner/name@revision``, which is
            looked for in the local cache and then downloaded.

    Raises:
        FormatError: there is no such folder, or the id can neither be found nor downloaded.
    """
    return find_folder(source, _download, CONFIG)


def _download(repo: str, **options: Any) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for file in (WEIGHTS, CONFIG):
        try:
            path = huggingface_hub.hf_hub_download(repo, file, **options)
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError as error:
            raise FormatError(
                f"{repo}: the repository has no {file}; expected a PEFT adapter with "
                f"{CONFIG} and {WEIGHTS}"
            ) from error
    return Path(path).parent


def weights_file(folder: Path) -> Path:
    """Returns the adapter's safetensors file.

    Raises:
        FormatError: there are no weights.
        UnsupportedError: there is only a pickle file.
    """
    file = folder / WEIGHTS
    if is_regular(file):
        return file
    if (folder / PICKLE).is_file():
        raise UnsupportedError(
            f"{folder / PICKLE}: pickle files can run code when they are read, so they are not; "
            "load the adapter with peft and save it again, which writes safetensors"
        )
    raise FormatError(f"{folder}: no {WEIGHTS}")
