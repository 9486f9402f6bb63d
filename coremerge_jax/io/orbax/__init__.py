"""Adapters and parameters in orbax checkpoints."""
