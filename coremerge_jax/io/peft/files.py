"""Files of PEFT adapters, in a folder or on the Hugging Face hub."""

from pathlib import Path
from typing import Any

from coremerge_jax.errors import FormatError, UnsupportedError
from coremerge_jax.io.adapter_config import CONFIG
from coremerge_jax.io.folders import find_folder
from coremerge_jax.io.untrusted import is_regular

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
