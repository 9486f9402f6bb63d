"""A small vision transformer for 8×8 digits, as a pure function of its parameters.

Parameters are a flat mapping from dotted path (``"blocks.0.q_proj.kernel"``) to array: the path of
an adapter's module plus ``".kernel"`` is the weight that it updates.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

from coremerge_jax.lora import Adapter

SIZE, PATCH, CLASSES = 8, 2, 10

WIDTH, DEPTH, HEADS = 80, 2, 4

Params = Mapping[str, jax.Array]


class Block(nnx.Module):
    """Self-attention and a two-layer perceptron, each after a layer norm."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.q_proj = nnx.Linear(width, width, rngs=rngs)
        self.k_proj = nnx.Linear(width, width, rngs=rngs)
        self.v_proj = nnx.Linear(width, width, rngs=rngs)
        self.o_proj = nnx.Linear(width, width, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.up_proj = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down_proj = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``(N, patches, width)`` to the same shape."""
        y = self.norm1(x)
        q, k, v = (
            layer(y).reshape(*y.shape[:-1], HEADS, -1)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        x = x + self.o_proj(jax.nn.dot_product_attention(q, k, v).reshape(x.shape))
        return x + self.down_proj(jax.nn.gelu(self.up_proj(self.norm2(x))))


class DigitTransformer(nnx.Module):
    """A transformer: patches of 2×2 pixels, `DEPTH` blocks, mean over patches, linear head."""

    def __init__(self, *, rngs: nnx.Rngs):
        patches = (SIZE // PATCH) ** 2
        self.embed = nnx.Linear(PATCH * PATCH, WIDTH, rngs=rngs)
        self.position = nnx.Param(0.1 * jax.random.normal(rngs.params(), (1, patches, WIDTH)))
        self.blocks = nnx.List([Block(WIDTH, rngs=rngs) for _ in range(DEPTH)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns logits ``(N, 10)`` of images ``(N, 8, 8)``."""
        grid = SIZE // PATCH
        x = images.reshape(-1, grid, PATCH, grid, PATCH).swapaxes(2, 3)
        x = self.embed(x.reshape(-1, grid * grid, PATCH * PATCH)) + self.position[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(axis=1))


def init(seed: int = 0) -> Params:
    """Returns the parameters before training."""
    state = nnx.to_pure_dict(nnx.state(DigitTransformer(rngs=nnx.Rngs(seed))))
    flat = traverse_util.flatten_dict(state)
    return {".".join(map(str, path)): value for path, value in flat.items()}


def forward(params: Params, images: jax.Array) -> jax.Array:
    """Returns logits ``(N, 10)`` of images ``(N, 8, 8)`` with pixels in [0, 1]."""
    graph = nnx.graphdef(nnx.eval_shape(lambda: DigitTransformer(rngs=nnx.Rngs(0))))
    paths = {path: tuple(int(p) if p.isdigit() else p for p in path.split(".")) for path in params}
    state = traverse_util.unflatten_dict({paths[path]: value for path, value in params.items()})
    return nnx.merge(graph, state)(images)


def fold(params: Params, adapter: Adapter, scale: float | jax.Array = 1.0) -> Params:
    """Returns the parameters plus an adapter's updates (kernels are stored input by output)."""
    kernels = {f"{path}.kernel": lora.dense().T for path, lora in adapter.items()}
    return {**params, **{path: params[path] + scale * dense for path, dense in kernels.items()}}


@jax.jit
def accuracy(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the share of right answers in each task: images ``(T, N, 8, 8)``, labels ``(N,)``."""
    return jax.lax.map(
        lambda task: jnp.mean(forward(params, task).argmax(axis=-1) == labels), images
    )
