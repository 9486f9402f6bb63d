"""Adapters in trees of parameters: layouts, names, axes, and kernels of JAX models."""
