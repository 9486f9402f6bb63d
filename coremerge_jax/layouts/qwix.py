"""qwix, as used by Tunix and MaxText (qwix/_src/providers/lora.py).

Factors stand beside the parameter: ``<param>_lora_a`` and ``<param>_lora_b``. For an einsum, a has
those axes of the kernel that the input has too, and b the others, so that fused projections share
one a, and experts one b. For a linear layer (dot_general), inputs are one axis, outputs are one
axis, and both factors have the axes of a batch in front. The update is scaled by alpha / rank of
the rule, which is not saved with the parameters.
"""

from coremerge_jax.layouts.layout import Layout

QWIX = Layout(
    name="qwix",
    key="{module}/{param}_lora_{factor}",
    patterns=(r"(?P<module>.+)/(?P<param>[^/]+)_lora_(?P<factor>[ab])",),
    scaled=True,
)
