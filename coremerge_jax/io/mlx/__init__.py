"""MLX adapters."""
