"""Whatever holds an adapter, by what is in it."""

import hashlib
import stat
from pathlib import Path
from typing import Any

from coremerge_jax.errors import RecipeError
from coremerge_jax.io import peft
from coremerge_jax.io.orbax import open_orbax
from coremerge_jax.io.orbax_tree import is_orbax, walk
from coremerge_jax.io.untrusted import check_path, refuse_url
from coremerge_jax.lora import Adapter


def open_adapter(source: str | Path, *, name: str | None = None, **options: Any) -> Adapter:
    """Opens a PEFT folder, a Hugging Face id, or an orbax checkpoint.

    Args:
        source: see `open_peft` and `open_orbax`.
        name: a name for messages and tables; that of the folder by default.
        **options: of `open_orbax`; PEFT folders tell all of it themselves.

    Raises:
        FormatError: there is no such adapter, or it is broken.
        RecipeError: options for a PEFT folder.
        UnsupportedError: it is more than a low-rank update of the base model.
    """
    refuse_url(source)
    check_path(source)
    if is_orbax(source):
        return open_orbax(source, name=name, **options)
    if options:
        raise RecipeError(
            f"{source}: no orbax checkpoint; {', '.join(options)} can be said of these only"
        )
    return peft.open_peft(source, name=name)


def hash_source(source: str | Path) -> dict[str, str]:
    """Returns the SHA-256 of what an adapter was read from.

    Args:
        source: see `open_adapter`.

    Returns:
        File name to hexadecimal digest; of a checkpoint, one digest of all its names and files.

    Raises:
        FormatError: see `open_adapter`.
    """
    refuse_url(source)
    if not is_orbax(source):
        return peft.hash_source(source)
    whole = hashlib.sha256()
    for file in sorted(path for path, mode in walk(Path(source)) if mode and stat.S_ISREG(mode)):
        whole.update(str(file.relative_to(source)).encode())
        with file.open("rb") as stream:
            whole.update(hashlib.file_digest(stream, "sha256").digest())
    return {"all files": whole.hexdigest()}
