"""GGUF adapters, for llama.cpp."""
