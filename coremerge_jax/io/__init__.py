"""Files to adapters and back."""

from coremerge_jax.io.base_model.apply import apply_adapter
from coremerge_jax.io.formats import hash_source, open_adapter
from coremerge_jax.io.orbax import open_orbax, save_orbax
from coremerge_jax.io.peft.reader import load_peft, open_peft
from coremerge_jax.io.peft.writer import save_peft

__all__ = [
    "apply_adapter",
    "hash_source",
    "load_peft",
    "open_adapter",
    "open_orbax",
    "open_peft",
    "save_orbax",
    "save_peft",
]
