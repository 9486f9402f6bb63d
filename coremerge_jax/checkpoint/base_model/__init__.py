"""Adapters folded into the base models that they adapt: Hugging Face safetensors folders."""

from coremerge_jax.checkpoint.base_model.apply import Applied, Folding, apply_adapter

__all__ = ["Applied", "Folding", "apply_adapter"]
