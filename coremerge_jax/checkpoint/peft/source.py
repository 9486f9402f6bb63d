"""Location of an adapter's files: a folder, or the Hugging Face cache."""

import hashlib
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from coremerge_jax.checkpoint.outputs import find_left
from coremerge_jax.checkpoint.urls import refuse_url
from coremerge_jax.errors import CoreMergeError, FormatError, UnsupportedError
from coremerge_jax.untrusted import check_path, is_regular

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"

# Revisions are names that git takes.
_HUB_ID = re.compile(
    r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>(?!.*\.\.)[^@\s~^:?*\[\\\x00-\x1f\x7f]+))?"
)


def locate(source: str | Path) -> Path:
    """Returns the folder that holds an adapter's files.

    Args:
        source: a folder, or a Hugging Face id ``owner/name`` or ``owner/name@revision``, which is
            looked for in the local cache and then downloaded.

    Raises:
        FormatError: there is no such folder, or the id can neither be found nor downloaded.
    """
    return find_folder(source, _download, CONFIG)


def find_folder(source: str | Path, download: Callable[..., Path], config: str) -> Path:
    """Returns a folder, or that of a Hugging Face id.

    Args:
        source: see `locate`.
        download: gives the folder of a repository and revision; its ``local_files_only`` says
            whether it may only look into the local cache.
        config: a file that the folder has, for messages.

    Raises:
        FormatError: there is no such folder, or the id can neither be found nor downloaded.
    """
    refuse_url(source)
    check_path(source)
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise FormatError(f"{source}: is a file; give the folder that contains {config}")
    hub_id = _HUB_ID.fullmatch(source) if isinstance(source, str) else None
    if not hub_id or folder.parent.exists():
        told = "; give the path itself in place of ~" if str(source).startswith("~") else ""
        for kind, left in find_left(folder.absolute()):
            if kind == "old":
                told = f"; a run that was killed has moved it to {left}: rename it back"
        raise FormatError(f"{source}: no such folder{told}")
    for local in (True, False):
        if not local and not _hub_answers():
            break
        try:
            return download(hub_id["repo"], revision=hub_id["revision"], local_files_only=local)
        except LocalEntryNotFoundError:
            continue
        except CoreMergeError:
            raise
        except (OSError, ValueError) as error:
            raise FormatError(f"{source}: not on the Hugging Face hub ({_line(error)})") from error
    raise FormatError(
        f"{source}: no such folder, not in the Hugging Face cache, and the hub cannot be reached"
    )


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


def _hub_answers() -> bool:
    """Asks once: huggingface_hub itself would retry for half a minute without a network."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        with urllib.request.urlopen(constants.ENDPOINT, timeout=5):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


def _line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


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
