"""Files to adapters and back."""

from coremerge_jax.checkpoint.base_model import apply_adapter
from coremerge_jax.checkpoint.orbax import open_orbax, save_orbax
from coremerge_jax.checkpoint.peft import load_peft, open_peft, save_peft
from coremerge_jax.checkpoint.source import hash_source, open_adapter

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
