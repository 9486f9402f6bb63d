"""PEFT adapter folders: adapter_config.json and adapter_model.safetensors."""

from coremerge_jax.io.peft.files import hash_source
from coremerge_jax.io.peft.reader import load_peft, open_peft
from coremerge_jax.io.peft.writer import save_peft

__all__ = ["hash_source", "load_peft", "open_peft", "save_peft"]
