"""Files to adapters and back."""

from coremerge_jax.checkpoint.peft import check_output, hash_source, load_peft, open_peft, save_peft

__all__ = ["check_output", "hash_source", "load_peft", "open_peft", "save_peft"]
