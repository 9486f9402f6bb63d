"""Adapters folded into the base models that they adapt, on disk."""

from coremerge_jax.checkpoint.base_model.apply import apply_adapter, find_folding
from coremerge_jax.checkpoint.base_model.folding import Folding, Report

__all__ = ["Folding", "Report", "apply_adapter", "find_folding"]
