"""LoRA and Adapter, registered as pytrees of JAX.

All that hands them to JAX imports this first: `linalg`, `trees`, and the lists of public names.
"""

import jax

from coremerge_jax.lora import Adapter, LoRA

jax.tree_util.register_dataclass(LoRA)
jax.tree_util.register_pytree_with_keys_class(Adapter)
