"""A benchmark of generative tasks with a small language model: see `command`."""
