"""Statistics of modules' inputs, collected while a model reads unlabelled examples."""

import lazy_loader

# Those for PyTorch are imported when they are asked for, as it is an optional library.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
