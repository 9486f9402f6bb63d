"""Base models in files, and adapters folded into them."""
