"""Whatever holds an adapter, by what is in it."""

from pathlib import Path
from typing import Any

from coremerge_jax.checkpoint.orbax import is_orbax, open_orbax
from coremerge_jax.checkpoint.peft import open_peft
from coremerge_jax.lora import Adapter


def open_adapter(source: str | Path, *, name: str | None = None, **options: Any) -> Adapter:
    """Opens a PEFT folder, a Hugging Face id, or an orbax checkpoint.

    Args:
        source: see `open_peft` and `open_orbax`.
        name: a name for messages and tables; that of the folder by default.
        **options: of `open_orbax`.

    Raises:
        FormatError: there is no such adapter, or it is broken.
        UnsupportedError: it is more than a low-rank update of the base model.
    """
    if Path(source).is_dir() and is_orbax(source):
        return open_orbax(source, name=name, **options)
    return open_peft(source, name=name)
