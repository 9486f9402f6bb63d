"""SmolLM2-135M-Instruct of a GGUF file, as a Flax NNX module.

The tree of parameters has the names and shapes of Tunix's ``Llama3``. Tunix's own class is not
used: it rotates with base 1,000,000 whatever its configuration says (this model has 100,000), and
computes the logits of all positions.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
"""Modules that may have LoRA factors."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a model, and of its LoRA factors.

    Attributes:
        rank: of LoRA factors; 0 for none.
        adapted: names of the modules that have factors.
    """

    vocabulary: int
    layers: int
    width: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_base: float
    epsilon: float
    rank: int = 0
    adapted: tuple[str, ...] = ATTENTION


@jax.custom_vjp
def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """Returns ``x @ w`` in float32; the factors of the product are rounded to the dtype of w.

    So are those of its derivatives. JAX's own rule would multiply float32 with bfloat16, which
    takes twice the time on CPUs.
    """
    return _dot(x, w, w.dtype)


def _dot(x: jax.Array, y: jax.Array, dtype: Any) -> jax.Array:
    return jnp.matmul(x.astype(dtype), y.astype(dtype), preferred_element_type=jnp.float32)


def _forward(x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return matmul(x, w), (x, w)


def _backward(kept: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = kept
    rows, columns = (y.reshape(-1, y.shape[-1]) for y in (x, g))
    return _dot(g, w.T, w.dtype).astype(x.dtype), _dot(rows.T, columns, w.dtype).astype(w.dtype)


matmul.defvjp(_forward, _backward)


Rotation = tuple[jax.Array, jax.Array]
"""Sines and cosines."""
Heads = tuple[jax.Array, jax.Array]
"""Keys and values."""


class Norm(nnx.Module):
    """A root mean square norm."""

    def __init__(self, config: Config) -> None:
        self.w = nnx.Param(jnp.ones(config.width))
        self.epsilon = config.epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``(..., d)`` to ``(..., d)``."""
        square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(square + self.epsilon) * self.w[...]


class Linear(nnx.Module):
    """A linear map without bias, with LoRA factors if the configuration asks for them.

    Args:
        config: says which modules have factors.
        name: of the module.
        shape: of the kernel; its first or last axis is the model's width.
        kernel: name of the kernel.
        inputs: number of axes of the kernel that are inputs.
    """

    def __init__(
        self,
        config: Config,
        name: str,
        shape: tuple[int, ...],
        rngs: nnx.Rngs,
        kernel: str = "w",
        inputs: int = 1,
    ) -> None:
        setattr(self, kernel, nnx.Param(0.02 * jax.random.normal(rngs.params(), shape)))
        self.weight = kernel
        self.flat = (int(np.prod(shape[:inputs])), int(np.prod(shape[inputs:])))
        if config.rank and name in config.adapted:
            i, o = self.flat
            self.lora = nnx.LoRA(i, config.rank, o, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``(..., i)`` to ``(..., o)``."""
        y = matmul(x, getattr(self, self.weight)[...].reshape(self.flat))
        return y + self.lora(x) if hasattr(self, "lora") else y


class Attention(nnx.Module):
    """Causal attention; groups of heads share keys and values."""

    def __init__(self, config: Config, rngs: nnx.Rngs) -> None:
        d, h = config.width, config.head_dim
        self.q_proj = Linear(config, "q_proj", (d, config.heads, h), rngs)
        self.k_proj = Linear(config, "k_proj", (d, config.kv_heads, h), rngs)
        self.v_proj = Linear(config, "v_proj", (d, config.kv_heads, h), rngs)
        self.o_proj = Linear(config, "o_proj", (config.heads, h, d), rngs, inputs=2)
        self.kv_heads, self.head_dim = config.kv_heads, h

    def __call__(
        self, x: jax.Array, turn: Rotation, before: Heads | None = None
    ) -> tuple[jax.Array, Heads]:
        """Maps ``(N, L, d)`` to ``(N, L, d)``; also returns the keys and values.

        Args:
            x: the inputs.
            turn: see `rotation`.
            before: keys and values ``(1, P, kv_heads, head_dim)`` of what comes before all rows.
        """
        n, length, _ = x.shape
        shape = (n, length, self.kv_heads, -1, self.head_dim)
        q, k = (_rotate(y(x).reshape(shape), *turn) for y in (self.q_proj, self.k_proj))
        own = k[:, :, :, 0], self.v_proj(x).reshape(shape)[:, :, :, 0]
        k, v = own if before is None else map(_after, before, own)
        scores = jnp.einsum("ntkgh,nskh->nkgts", q, k) * self.head_dim**-0.5
        causal = jnp.tri(length, k.shape[1], k.shape[1] - length, bool)
        weights = jax.nn.softmax(jnp.where(causal, scores, -1e30), axis=-1)
        mixed = jnp.einsum("nkgts,nskh->ntkgh", weights, v)
        return self.o_proj(mixed.reshape(n, length, -1)), own


def _after(first: jax.Array, second: jax.Array) -> jax.Array:
    """Returns ``(1, P, ...)`` before each row of ``(N, L, ...)``."""
    return jnp.concatenate([jnp.broadcast_to(first, (len(second), *first.shape[1:])), second], 1)


def rotation(size: int, base: float, length: int) -> Rotation:
    """Returns the sines and cosines of rotary embeddings of heads, ``(L, 1, 1, size / 2)`` each."""
    half = size // 2
    speeds = base ** -(jnp.arange(half) / half)
    angles = (jnp.arange(length)[:, None] * speeds)[:, None, None]
    return jnp.sin(angles), jnp.cos(angles)


def _rotate(x: jax.Array, sin: jax.Array, cos: jax.Array) -> jax.Array:
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class FeedForward(nnx.Module):
    """A gated feed-forward layer."""

    def __init__(self, config: Config, rngs: nnx.Rngs) -> None:
        shape = (config.width, config.hidden)
        self.gate_proj = Linear(config, "gate_proj", shape, rngs, "kernel")
        self.up_proj = Linear(config, "up_proj", shape, rngs, "kernel")
        self.down_proj = Linear(config, "down_proj", shape[::-1], rngs, "kernel")

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``(..., d)`` to ``(..., d)``."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nnx.Module):
    """Attention, then feed-forward."""

    def __init__(self, config: Config, rngs: nnx.Rngs) -> None:
        self.input_layernorm = Norm(config)
        self.attn = Attention(config, rngs)
        self.mlp = FeedForward(config, rngs)
        self.post_attention_layernorm = Norm(config)

    def __call__(
        self, x: jax.Array, turn: Rotation, before: Heads | None = None
    ) -> tuple[jax.Array, Heads]:
        """Maps ``(N, L, d)`` to ``(N, L, d)``; see `Attention`."""
        y, own = self.attn(self.input_layernorm(x), turn, before)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), own


class Embedder(nnx.Module):
    """Embeddings of tokens, which also make the logits."""

    def __init__(self, config: Config, rngs: nnx.Rngs) -> None:
        shape = (config.vocabulary, config.width)
        self.input_embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))

    def encode(self, tokens: jax.Array) -> jax.Array:
        """Maps ``(...)`` to ``(..., d)``."""
        return self.input_embedding[...][tokens].astype(jnp.float32)

    def decode(self, x: jax.Array) -> jax.Array:
        """Maps ``(..., d)`` to logits ``(..., V)``."""
        return matmul(x, self.input_embedding[...].T)


class SmolLM(nnx.Module):
    """A language model of the Llama architecture."""

    def __init__(self, config: Config, rngs: nnx.Rngs) -> None:
        self.head_dim, self.rope_base = config.head_dim, config.rope_base
        self.embedder = Embedder(config, rngs)
        self.layers = nnx.List(Layer(config, rngs) for _ in range(config.layers))
        self.final_norm = Norm(config)

    def __call__(
        self,
        tokens: jax.Array,
        places: jax.Array | None = None,
        prefix: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the logits of the tokens that follow.

        Args:
            tokens: ``(N, L)``. Padding is at the end, where attention does not reach it.
            places: ``(N, A)``, the positions whose logits are computed; by default all.
            prefix: ``(P,)``, tokens before those of every row, which are read once for all.

        Returns:
            ``(N, A, V)``.
        """
        start = 0 if prefix is None else len(prefix)
        turn = rotation(self.head_dim, self.rope_base, start + tokens.shape[1])
        first, then = ([y[part] for y in turn] for part in (slice(start), slice(start, None)))
        x, before = self.embedder.encode(tokens), None
        common = self.embedder.encode(prefix[None]) if start else None
        for layer in self.layers:
            if common is not None:
                common, before = layer(common, first)
            x, _ = layer(x, then, before)
        if places is not None:
            x = jnp.take_along_axis(x, places[:, :, None], axis=1)
        return self.embedder.decode(self.final_norm(x))


class Base(Protocol):
    """A base model, such as a `File`."""

    config: Config
    end: int

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yields names and values of tensors."""

    def tokenizer(self) -> Tokenizer:
        """Returns the tokenizer."""


class File:
    """A model in a GGUF file.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        import gguf

        self._reader = gguf.GGUFReader(path)
        self._dequantize = gguf.dequantize

    def _field(self, name: str) -> Any:
        return self._reader.fields[name].contents()

    @cached_property
    def config(self) -> Config:
        """Returns the sizes of the model."""
        return Config(
            vocabulary=self._field("llama.vocab_size"),
            layers=self._field("llama.block_count"),
            width=self._field("llama.embedding_length"),
            hidden=self._field("llama.feed_forward_length"),
            heads=self._field("llama.attention.head_count"),
            kv_heads=self._field("llama.attention.head_count_kv"),
            head_dim=self._field("llama.rope.dimension_count"),
            rope_base=self._field("llama.rope.freq_base"),
            epsilon=self._field("llama.attention.layer_norm_rms_epsilon"),
        )

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yields the names of tensors in the file, and their values in float32."""
        for tensor in self._reader.tensors:
            yield tensor.name, self._dequantize(tensor.data, tensor.tensor_type)

    def tokenizer(self) -> Tokenizer:
        """Returns the tokenizer: byte pairs, and each digit for itself."""
        tokens, kinds = (self._field(f"tokenizer.ggml.{x}") for x in ("tokens", "token_type"))
        merges = [tuple(pair.split(" ")) for pair in self._field("tokenizer.ggml.merges")]
        vocabulary = {token: i for i, token in enumerate(tokens)}
        tokenizer = Tokenizer(models.BPE(vocabulary, merges))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
        tokenizer.add_special_tokens([AddedToken(x, normalized=False) for x in control])
        return tokenizer

    @property
    def end(self) -> int:
        """Returns the token at the end of an answer."""
        return self._field("tokenizer.ggml.eos_token_id")


CONTROL = 3
"""Kind of tokens that no text has, in GGUF files."""

NAMES = {
    "token_embd.weight": "embedder.input_embedding",
    "output_norm.weight": "final_norm.w",
    "attn_norm.weight": "input_layernorm.w",
    "ffn_norm.weight": "post_attention_layernorm.w",
    "attn_q.weight": "attn.q_proj.w",
    "attn_k.weight": "attn.k_proj.w",
    "attn_v.weight": "attn.v_proj.w",
    "attn_output.weight": "attn.o_proj.w",
    "ffn_gate.weight": "mlp.gate_proj.kernel",
    "ffn_up.weight": "mlp.up_proj.kernel",
    "ffn_down.weight": "mlp.down_proj.kernel",
}
"""Names of parameters, by those in GGUF files; both without the number of the layer."""


def load(
    base: Base, rank: int = 0, adapted: Sequence[str] = ATTENTION, seed: int = 0, dtype: Any = None
) -> SmolLM:
    """Returns a base model.

    Args:
        base: the model's file.
        rank: of new LoRA factors, 0 for none; B is zero.
        adapted: modules that have factors.
        seed: of their A.
        dtype: of kernels and embeddings, by default float32; products are of this dtype.
    """
    config = dataclasses.replace(base.config, rank=rank, adapted=tuple(adapted))
    return with_weights(config, dict(base.tensors()), seed, dtype)


def with_weights(
    config: Config, tensors: Mapping[str, np.ndarray], seed: int = 0, dtype: Any = None
) -> SmolLM:
    """Returns the model with tensors by their names in a GGUF file."""
    graph, lora, rest = nnx.split(
        nnx.eval_shape(lambda: SmolLM(config, nnx.Rngs(seed))), nnx.LoRAParam, ...
    )
    values = dict(_converted(config, name, value) for name, value in tensors.items())

    def filled(path: tuple, leaf: nnx.Variable) -> nnx.Variable:
        value = values.pop(".".join(map(str, path)))
        if value.shape != leaf.shape and value.size != np.prod(leaf.shape):
            raise ValueError(f"{path}: {value.shape}, expected {leaf.shape}")
        kept = jnp.float32 if value.ndim == 1 or dtype is None else dtype
        return leaf.replace(jnp.asarray(value.reshape(leaf.shape), kept))

    rngs = nnx.Rngs(seed)
    a = nnx.initializers.he_uniform()

    def fresh(path: tuple, leaf: nnx.Variable) -> nnx.Variable:
        new = a(rngs.params(), leaf.shape) if path[-1] == "lora_a" else jnp.zeros(leaf.shape)
        return leaf.replace(new)

    return nnx.merge(graph, nnx.map_state(fresh, lora), nnx.map_state(filled, rest))


def _converted(config: Config, name: str, value: np.ndarray) -> tuple[str, np.ndarray]:
    """Returns the name and the value of a parameter; kernels have their inputs first."""
    parts = name.split(".")
    layer = f"layers.{parts[1]}." if parts[0] == "blk" else ""
    ours = NAMES[".".join(parts[-2:])]
    if ours.startswith(("attn.q", "attn.k")):
        # llama.cpp rotates neighbours, where others rotate the halves of a head.
        value = value.reshape(-1, config.head_dim // 2, 2, value.shape[-1])
        value = value.swapaxes(1, 2).reshape(-1, value.shape[-1])
    return layer + ours, value.T if value.ndim == 2 and layer else value
