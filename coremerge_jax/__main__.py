"""``python -m coremerge_jax`` is the command ``coremerge``."""

from coremerge_jax.cli import main

main()
