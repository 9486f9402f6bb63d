"""A benchmark of eight text tasks: see `command`."""
