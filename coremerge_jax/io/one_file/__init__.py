"""Formats of one safetensors file, whose keys and header tell all: kohya, diffusers and others."""
