"""Folders of adapters and models: local ones, and those of the Hugging Face hub."""

import re
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

from coremerge_jax.errors import CoreMergeError, FormatError
from coremerge_jax.io.outputs import find_left
from coremerge_jax.io.untrusted import check_path, refuse_url

# Revisions are names that git takes.
_HUB_ID = re.compile(
    r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>(?!.*\.\.)[^@\s~^:?*\[\\\x00-\x1f\x7f]+))?"
)


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
