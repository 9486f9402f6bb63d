"""flax ``nnx.LoRA`` and ``nnx.LoRALinear`` (flax/nnx/nn/lora.py); EasyDeL's are the same.

Factors a (inputs, r) and b (r, outputs), and no scaling.
"""

from coremerge_jax.layouts.layout import Layout

NNX = Layout(
    name="nnx",
    key="{module}/lora_{factor}",
    patterns=(r"(?P<module>.+?)(/lora)?/lora_(?P<factor>[ab])",),
)
