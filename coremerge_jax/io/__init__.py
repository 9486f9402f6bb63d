"""Files to adapters and back. Names are imported at first use: some need JAX, and help must not."""

from typing import Any

import lazy_loader

_load, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    """Returns a public name, after registering the pytrees that it makes. Others do without JAX."""
    if name in __all__:
        import coremerge_jax.pytrees  # noqa: F401

    return _load(name)
