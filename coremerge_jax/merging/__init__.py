"""The engine: merges of adapters, whole or part by part, on one device or many."""
