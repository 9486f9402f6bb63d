"""Core Space merging of LoRA adapters in JAX (arXiv 2509.17786).

The stub, `__init__.pyi`, lists the public names. They are imported at first use, so that help and
tab-completion of the command line do not wait for JAX.
"""

import ast
from pathlib import Path
from typing import Any

import lazy_loader

__version__ = "0.1.0"

# Every import of the stub can be reached; its `__all__`, read here so that there is one list, is
# shorter.
_load, __dir__, _public = lazy_loader.attach_stub(__name__, __file__)
_stub = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
__all__ = next(ast.literal_eval(node.value) for node in _stub.body if isinstance(node, ast.Assign))


def __getattr__(name: str) -> Any:
    """Returns a public name, after registering the pytrees that users may hand to JAX."""
    if name in _public:
        import coremerge_jax.pytrees  # noqa: F401

    return _load(name)
