"""Core Space merging of LoRA adapters in JAX (arXiv 2509.17786).

The public names are those of `__init__.pyi`. They are imported at first use, so that help and
tab-completion of the command line do not wait for JAX. No public name is that of a module.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
