"""Location of an adapter's files: a folder, or the Hugging Face cache."""

import hashlib
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from coremerge_jax.errors import FormatError, UnsupportedError
from coremerge_jax.io.folders import find_folder
from coremerge_jax.io.untrusted import is_regular

CONFIG = "adapter_config.json"

WEIGHTS = "adapter_model.safetensors"

PICKLE = "adapter_model.bin"


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


def hash_source(source: str | Path) -> dict[str, str]:
    """Returns the SHA-256 of each file that an adapter was read from.

    Args:
        source: what `load_peft` takes.

    Returns:
        File name to hexadecimal digest.
    """
    folder = locate(source)
    digests = {}
    for file in (folder / CONFIG, weights_file(folder)):
        with file.open("rb") as stream:
            digests[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return digests
