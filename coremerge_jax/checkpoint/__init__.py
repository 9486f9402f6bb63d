"""Files to adapters and back."""

from coremerge_jax.checkpoint.base_model import apply_adapter
from coremerge_jax.checkpoint.peft import check_output, hash_source, load_peft, open_peft, save_peft

__all__ = ["apply_adapter", "check_output", "hash_source", "load_peft", "open_peft", "save_peft"]
