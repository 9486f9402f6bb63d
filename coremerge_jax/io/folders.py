"""Folders of adapters and models: local ones, and those of the Hugging Face hub.

huggingface_hub is imported late: it takes half a second that local folders need not wait.
"""

import re
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from coremerge_jax.errors import CoreMergeError, FormatError
from coremerge_jax.io.outputs import find_left
from coremerge_jax.io.single_file import SUFFIX
from coremerge_jax.io.unknown import describe
from coremerge_jax.io.untrusted import check_path

# Revisions are names that git takes.
_HUB_ID = re.compile(
    r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?P<folder>(/(?!\.+(/|$|@))[\w.-]+)*)"
    r"(@(?P<revision>(?!.*\.\.)[^@\s~^:?*\[\\\x00-\x1f\x7f]+))?"
)

# Endings of the names of files, which repositories do not have.
_ENDINGS = (SUFFIX, ".bin", ".ckpt", ".gguf", ".json", ".npz", ".pt", ".yaml")


def is_hub_id(source: str | Path) -> bool:
    """Returns True for ``owner/name[/folder][@revision]``, unless it may be a local path."""
    found = _HUB_ID.fullmatch(source) if isinstance(source, str) else None
    if found is None or found["repo"].endswith(_ENDINGS):  # a file that is not there
        return False
    path = Path(source)
    return not path.exists() and not Path(path.parts[0]).exists()


def source_name(source: str | Path) -> str:
    """Returns the name of a folder, or of a repository on the hub, for messages and tables."""
    folder = Path(source)
    return folder.resolve().name if folder.is_dir() else Path(str(source).partition("@")[0]).name


def not_found(source: str | Path, expected: str) -> FormatError:
    """Returns the error for a source that no format recognises.

    Args:
        source: the path that was given.
        expected: the files or folders that could be there.
    """
    path, found = Path(source), describe(source)
    if path.is_dir():
        what = f"it has {found}" if found else f"expected {expected}"
        return FormatError(f"{source}: no adapter in this folder; {what}")
    if path.exists():
        return FormatError(f"{source}: {found or f'is a file; expected {expected}'}")
    if str(source).startswith("~"):
        return FormatError(f"{source}: no such folder; give the path itself in place of ~")
    for kind, left in find_left(path.absolute()):
        if kind == "old":
            return FormatError(
                f"{source}: no such folder; a run that was killed has moved it to {left}: rename "
                "it back"
            )
    return FormatError(f"{source}: no such {'file' if path.suffix == SUFFIX else 'folder'}")


def find_folder(source: str | Path, download: Callable[..., Path], config: str) -> Path:
    """Returns a folder, or that of a Hugging Face id.

    Args:
        source: a folder or an id.
        download: gives the folder of a repository; takes ``revision``, ``local_files_only`` to look
            into the local cache alone, and for a folder in the repository, ``subfolder``.
        config: a file that the folder has, for messages.

    Raises:
        FormatError: there is no such folder, or the id can neither be found nor downloaded.
    """
    check_path(source)
    folder = Path(source)
    if folder.is_dir():
        return folder
    if not is_hub_id(source):
        raise not_found(source, f"the folder that contains {config}")
    from huggingface_hub.errors import LocalEntryNotFoundError

    repo, options = split_id(str(source))
    for local in (True, False):
        if not local and not hub_answers():
            break
        try:
            return download(repo, local_files_only=local, **options)
        except LocalEntryNotFoundError:
            continue
        except CoreMergeError:
            raise
        except (OSError, ValueError) as error:
            lines = (line for line in str(error).splitlines() if line.strip())
            line = next(lines, type(error).__name__)
            raise FormatError(f"{source}: not on the Hugging Face hub ({line})") from error
    raise FormatError(
        f"{source}: no such folder, not in the Hugging Face cache, and the hub cannot be reached"
    )


def split_id(source: str) -> tuple[str, dict[str, str | None]]:
    """Splits a Hugging Face id into the repository, and options of a download."""
    found = _HUB_ID.fullmatch(source)
    assert found is not None
    options = {"revision": found["revision"]}
    if found["folder"]:
        options["subfolder"] = found["folder"][1:]
    return found["repo"], options


def hub_answers() -> bool:
    """Asks once: huggingface_hub itself would retry for half a minute without a network."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        with urllib.request.urlopen(constants.ENDPOINT, timeout=5):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
