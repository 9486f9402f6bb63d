"""gemma's ``peft`` and ``gm.nn.LoRA`` (gemma/peft/_lora.py, gemma/gm/nn/_lora.py).

Factors are split as qwix splits those of an einsum, and not scaled.
"""

from coremerge_jax.layouts.layout import Layout

GEMMA = Layout(
    name="gemma",
    key="{module}/lora/{factor}",
    patterns=(
        r"(?P<module>.+)/_LoRAEinsum_\d+/lora/(?P<factor>[ab])",
        r"(?P<module>.+)/_LoRAEinsum_(?P<param>[^/]+)/lora/(?P<factor>[ab])",
        r"(?P<module>.+)/lora/(?P<factor>[ab])",
    ),
)
