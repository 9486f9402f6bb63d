"""Files to adapters and back. Names are imported at first use: some need JAX, and help must not."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
