"""Adapters folded into the base models that they adapt: Hugging Face safetensors folders."""

from coremerge_jax.checkpoint.base_model.apply import Folding, Report, apply_adapter

__all__ = ["Folding", "Report", "apply_adapter"]
