"""MaxText's adapters for serving (maxtext/utils/lora_utils.py): ``lora_a.kernel`` and so on.

Layers are scanned along axis 1 by default. The update is scaled by lora_alpha / r of the
adapter_config.json beside the checkpoint. What MaxText trains with qwix has qwix's layout.
"""

from coremerge_jax.layouts.layout import Layout

MAXTEXT_SERVING = Layout(
    name="maxtext-serving",
    key="{module}/lora_{factor}.kernel",
    patterns=(r"(?P<module>.+)/lora_(?P<factor>[ab])[./]kernel",),
    scaled=True,
)
