"""Layouts: how the LoRA factors of JAX training stacks sit in trees of parameters.

A layout is a small file: how keys are named, and how updates are scaled. Adding one is adding it
to `LAYOUTS`.
"""

from coremerge_jax.layouts.axes import Axes
from coremerge_jax.layouts.gemma import GEMMA
from coremerge_jax.layouts.keras import KERAS
from coremerge_jax.layouts.layout import Layout
from coremerge_jax.layouts.maxtext import MAXTEXT_SERVING
from coremerge_jax.layouts.nnx import NNX
from coremerge_jax.layouts.qwix import QWIX

LAYOUTS = {layout.name: layout for layout in (NNX, QWIX, GEMMA, MAXTEXT_SERVING, KERAS)}

__all__ = ["LAYOUTS", "Axes", "Layout"]
