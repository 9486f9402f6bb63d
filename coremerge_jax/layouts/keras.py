"""Keras ``Dense``, ``EinsumDense`` and ``Embedding`` (keras/src/layers/core).

For EinsumDense, a has all axes of the kernel but the last, and b the last one: merged in that
form, whatever the equation contracts. The update is scaled by lora_alpha / lora_rank of the layer.
"""

from coremerge_jax.layouts.layout import Layout
from coremerge_jax.lora import Kind

KERAS = Layout(
    name="keras",
    key="{module}/lora_{param}_{factor}",
    patterns=(r"(?P<module>.+)/lora_(?P<param>kernel|embeddings)_(?P<factor>[ab])",),
    scaled=True,
    kinds={"embeddings": Kind("embedding", transposed=True)},
)
